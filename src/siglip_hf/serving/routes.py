"""The endpoints: each reads a request, asks the towers, and shapes the answer."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from siglip_hf.preprocessing.image_intake import PictureError
from siglip_hf.serving.inputs import fetched, labels_of, many, parse_items, parse_pictures
from siglip_hf.serving.problems import Problem, users_mistakes
from siglip_hf.serving.schemas import Body, ClassifyRequest, EmbeddingsRequest, RerankRequest, SearchRequest
from siglip_hf.serving.security import fetch
from siglip_hf.serving.service import Service
from siglip_hf.serving.towers import Embedding, Picture

Parsed = TypeVar("Parsed", bound=Body)

#: Bodies of more bytes are parsed in a thread; a smaller one takes less time than the way there.
_LARGE = 1 << 16
#: Fields of a form that hold uploaded pictures, by the field of the request that they are.
_UPLOADS = {
    "images": ("image", "images", "file"),
    "input": ("input", "image", "file"),
    "documents": ("image", "documents", "file"),
    "image": ("image", "file"),
}


async def embeddings(request: Request) -> Response:
    """Embeddings of texts and pictures, as OpenAI's endpoint gives them for texts."""
    service, client = _service(request)
    body = await _read(request, EmbeddingsRequest, "input")
    dimension = service.embedder.dimension
    if body.dimensions not in (None, dimension):
        raise Problem(400, f"dimensions={body.dimensions} is not what the model has, {dimension}.")
    items = parse_items(body.input, service.limits)
    rows = await _embed(service, items, client)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(row.vector, body.encoding_format)}
        for index, row in enumerate(rows)
    ]
    return _json({"object": "list", "data": data, "model": service.name, "usage": _usage(rows)})


async def classify(request: Request) -> Response:
    """Pictures by labels: which fit, by four scores."""
    service, client = _service(request)
    body = await _read(request, ClassifyRequest, "images")
    labels, templates = labels_of(body.labels, body.template, service.limits)
    pictures = parse_pictures(body.images, service.limits)
    count = len(pictures) * min(body.top_k or len(labels), len(labels))
    if count > service.limits.results:
        raise Problem(
            400, f"the reply would hold {count:,} labels; at most {service.limits.results:,} are given: lower top_k."
        )
    rows = await _embed(service, pictures, client)
    scored = await service.labels.classify(rows, labels, templates, body.top_k, client)
    data = [{"index": index, "labels": some} for index, some in enumerate(scored)]
    return _json({"object": "list", "data": data, "model": service.name})


async def rerank(request: Request) -> Response:
    """Documents in the order in which they fit a query; either may be texts or pictures."""
    service, client = _service(request)
    body = await _read(request, RerankRequest, "documents")
    query = parse_items(body.query, service.limits, "query")
    documents = parse_items(body.documents, service.limits, "documents")
    if len(query) > 1:
        raise Problem(400, f"query holds {len(query)} entries; give one.")
    kinds = {isinstance(document, Picture) for document in documents}
    if len(kinds) > 1:
        raise Problem(400, "documents holds texts and pictures, whose scores cannot be compared; ask for each kind.")
    rows = await _embed(service, [*query, *documents], client)
    cosines = np.stack([row.vector for row in rows[1:]]) @ rows[0].vector  # (N,)
    crosses = isinstance(query[0], Picture) not in kinds
    scores = service.embedder.probability(cosines) if crosses else cosines
    best = np.argsort(-cosines, kind="stable")[: body.top_n].tolist()
    results = []
    for place in best:
        result = {"index": place, "relevance_score": float(scores[place]), "cosine": float(cosines[place])}
        if body.return_documents and isinstance(documents[place], str):
            result["document"] = documents[place]
        results.append(result)
    return _json({"object": "list", "results": results, "model": service.name, "usage": _usage(rows)})


async def search(request: Request) -> Response:
    """Rows of an index for words, a picture, or both."""
    service, client = _service(request)
    body = await _read(request, SearchRequest, "image")
    name = body.index or (service.indexes.names[0] if len(service.indexes.names) == 1 else None)
    if name not in service.indexes.names:
        there = ", ".join(service.indexes.names) or "none (--index NAME=FOLDER)"
        raise Problem(404, f"index={name!r} is not there; the indexes are: {there}.")
    if body.image is None and not body.text:
        raise Problem(400, "nothing to look for: give a text or an image.")
    for words in filter(None, (body.text, body.not_text)):
        if isinstance(parse_items(words, service.limits, "text")[0], Picture):
            raise Problem(400, "text is a picture; give it as image.")
    picture = None
    if body.image is not None:
        pictures = await _fetched(service, parse_pictures(body.image, service.limits, "image"))
        if len(pictures) > 1:
            raise Problem(400, f"image holds {len(pictures)} pictures; give one.")
        picture = pictures[0]
    hits = await _told(service.indexes.search(name, body.text, picture, body.not_text, body.k, body.filter, client))
    data = [{"id": hit.id, "cosine": hit.cosine, "probability": hit.probability, "text": hit.text} for hit in hits]
    return _json({"object": "list", "data": data, "index": name, "model": service.name})


async def indexes(request: Request) -> Response:
    """The indexes that can be searched."""
    service, _ = _service(request)
    data = [
        {"name": name, "rows": len(index), "content": index.origin.content}
        for name, index in service.indexes.all().items()
    ]
    return _json({"object": "list", "data": data})


async def models(request: Request) -> Response:
    """The model that is served."""
    service, _ = _service(request)
    return _json({"object": "list", "data": [service.model_info()]})


async def model(request: Request) -> Response:
    """The model, by its name."""
    service, _ = _service(request)
    _check_model(service, request.path_params["model_id"])
    return _json(service.model_info())


async def live(request: Request) -> Response:
    """The process runs."""
    return _json({"status": "ok"})


async def ready(request: Request) -> Response:
    """The model is loaded, and requests are taken; the door says no when the server ends."""
    return _json({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Counters and times, for Prometheus."""
    text, media_type = _service(request)[0].metrics_text()
    return Response(text, media_type=media_type)


async def refused(request: Request, error: Exception) -> Response:
    """The answer to a request that a route, or the framework, refuses."""
    if isinstance(error, HTTPException):
        words = {404: "there is nothing here.", 405: f"{request.method} is not what this address takes."}
        error = Problem(error.status_code, words.get(error.status_code, "this request cannot be answered."))
    assert isinstance(error, Problem)
    return Response(error.body(), error.status, error.headers, "application/problem+json")


def _service(request: Request) -> tuple[Service, str]:
    return request.app.state.service, request.scope.get("state", {}).get("client", "")


async def _read(request: Request, shape: type[Parsed], uploads: str) -> Parsed:
    """The request's body: JSON, or a form whose uploads become a field."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            parsed = shape.model_validate(await _form(request, shape, uploads))
        elif kind == "application/json":
            content = await request.body()
            parse = shape.model_validate_json
            parsed = await asyncio.to_thread(parse, content) if len(content) > _LARGE else parse(content)
        else:
            raise Problem(
                415, f"the content type {kind[:100]} is not taken; send application/json or multipart/form-data."
            )
    except ValidationError as error:
        raise Problem(400, _sentence(error)) from None
    _check_model(request.app.state.service, parsed.model)
    return parsed


async def _form(request: Request, shape: type[Body], uploads: str) -> dict[str, Any]:
    most = request.app.state.service.limits.inputs
    try:
        form = await request.form(max_files=most, max_fields=most, max_part_size=1 << 20)
    except HTTPException as error:
        raise Problem(400, f"the form cannot be read: {str(error.detail).lower()}") from error
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        is_upload = isinstance(value, UploadFile)
        if is_upload and name not in _UPLOADS[uploads]:
            raise Problem(400, f"a file was sent as {name!r}; send it as {_UPLOADS[uploads][0]!r}.")
        target = uploads if name in _UPLOADS[uploads] else name
        content = await value.read() if isinstance(value, UploadFile) else value
        fields[target] = [*many(fields[target]), content] if target in fields else content
    await form.close()
    return fields


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"][:3])
    words = {
        "extra_forbidden": f"{place} is not a field of this request.",
        "missing": f"{place} is missing.",
        "json_invalid": f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}.",
    }
    return words.get(first["type"], f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}.")


def _check_model(service: Service, name: str | None) -> None:
    if name not in (None, service.name):
        raise Problem(404, f"the model {name[:200]!r} is not served here; {service.name!r} is.")


async def _embed(service: Service, items: Sequence[str | Picture], client: str) -> list[Embedding]:
    return await _told(service.towers.embed(await _fetched(service, items), client))


async def _told(work: Any) -> Any:
    """The result of work on pictures; one that cannot be read is the mistake of the client that sent it."""
    try:
        return await work
    except PictureError as error:
        raise Problem(400, str(error)) from error


async def _fetched(service: Service, items: Sequence[Any]) -> list[Any]:
    limits = service.limits

    def get(url: str) -> bytes:
        with users_mistakes():
            return fetch(url, limits.body_bytes, limits.slow_seconds)

    return await fetched(items, (lambda url: service.in_fetcher(get, url)) if service.allows_urls else None)


def _encoded(vector: np.ndarray, form: str) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def _usage(rows: Sequence[Embedding]) -> dict[str, int]:
    tokens = sum(row.tokens for row in rows)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _json(content: Any) -> Response:
    return Response(to_json(content), media_type="application/json")
