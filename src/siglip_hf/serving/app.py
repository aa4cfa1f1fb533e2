"""The application: routes, their description for OpenAPI, and the door in front."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from siglip_hf._version import __version__
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.extras import missing
from siglip_hf.serving.settings import Settings

try:
    import prometheus_client  # noqa: F401
    from fastapi import FastAPI
except ImportError as _error:
    raise missing("the server needs FastAPI, uvicorn and prometheus-client", "serve") from _error

from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from siglip_hf.serving import routes, schemas
from siglip_hf.serving.door import Door
from siglip_hf.serving.problems import MEDIA_TYPE, Problem
from siglip_hf.serving.service import Service

_REFERENCE = "#/components/schemas/{model}"
# Path -> the function, the shape of the request, that of the reply, and the field of a form that holds pictures.
_POSTS: dict[str, tuple[Callable[..., Any], type[schemas.Body], Any, str]] = {
    "/v1/embeddings": (routes.embeddings, schemas.EmbeddingsRequest, schemas.EmbeddingsReply, "input"),
    "/v1/classify": (routes.classify, schemas.ClassifyRequest, schemas.ClassifyReply, "image"),
    "/v1/rerank": (routes.rerank, schemas.RerankRequest, schemas.RerankReply, "image"),
    "/v1/search": (routes.search, schemas.SearchRequest, schemas.SearchReply, "image"),
}
_GETS: dict[str, tuple[Callable[..., Any], Any]] = {
    "/v1/indexes": (routes.indexes, schemas.IndexesReply),
    "/v1/models": (routes.models, schemas.ModelsReply),
    "/v1/models/{model_id:path}": (routes.model, schemas.ModelInfo),
    "/health/live": (routes.live, None),
    "/health/ready": (routes.ready, None),
    "/metrics": (routes.metrics, None),
}


def create_app(
    settings: Settings | None = None,
    *,
    embedder: SiglipEmbedder | None = None,
    log: Callable[[dict[str, Any]], None] = lambda entry: None,
    behind_front: bool = False,
) -> Door:
    """An ASGI application that serves a model, for any ASGI server.

    Args:
        settings: what is served and how; the embedded checkpoint by default.
        embedder: the model, if it is loaded already.
        log: called with a dict for each request: id, client, method, path, status, bytes, seconds; no contents.
        behind_front: requests come from a `create_front` of another process, which has looked at keys.

    Raises:
        ImportError: naming the extra, if FastAPI is missing.
        OSError: if an index is not there.
        ValueError: if something cannot be loaded, or does not fit together.
    """
    settings = settings or Settings()
    service = Service(settings, embedder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="siglip-hf", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    for error in (Problem, HTTPException):
        app.add_exception_handler(error, routes.refused)
    problems: dict[int | str, dict[str, Any]] = {"default": {"model": schemas.ProblemReply}}
    for path, (function, _, reply, _) in _POSTS.items():
        app.add_api_route(path, function, methods=["POST"], responses={200: {"model": reply}, **problems})
    for path, (function, reply) in _GETS.items():
        app.add_api_route(path, function, responses={200: {"model": reply}, **problems} if reply else {})
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]

    if behind_front:  # which counts and logs
        return Door(app, settings, behind_front=True)
    return Door(app, settings, service.metrics.on_answer, log)


def _description(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that the routes read themselves."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = found["components"]["schemas"]
        for path, (_, shape, _, upload) in _POSTS.items():
            schema = shape.model_json_schema(ref_template=_REFERENCE)
            components.update(schema.pop("$defs", {}))
            examples = schema.pop("examples")
            components[shape.__name__] = schema
            reference = {"$ref": _REFERENCE.format(model=shape.__name__)}
            file = {"type": "array", "items": {"type": "string", "format": "binary"}}
            form = {"allOf": [reference, {"type": "object", "properties": {upload: file}}]}
            named = {str(number): {"value": example} for number, example in enumerate(examples, 1)}
            found["paths"][path]["post"]["requestBody"] = {
                "required": True,
                "content": {
                    "application/json": {"schema": reference, "examples": named},
                    "multipart/form-data": {"schema": form},
                },
            }
        for operations in found["paths"].values():
            for operation in operations.values():
                default = operation["responses"].get("default")
                if default:
                    default["content"] = {MEDIA_TYPE: default["content"]["application/json"]}
                    default["description"] = "What went wrong."
        app.openapi_schema = found
    return app.openapi_schema
