"""The same application as replicas of a Ray Serve deployment, on one machine or many, behind the same front."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

from siglip_hf.extras import missing
from siglip_hf.serving.app import create_app
from siglip_hf.serving.front import Reply, WorkerDied
from siglip_hf.serving.settings import Settings

_NAME = "siglip-hf"
#: Requests on their way in each replica by which Ray decides how many replicas there should be.
TARGET_REQUESTS = 64
# Batches are made inside, so that a replica should have many requests; the lanes bound what waits.
_MOST_REQUESTS = 4096
_RETRY_HEALTH = 0.2


class _Replica:
    """A model on a node of the cluster; Ray makes as many as are wanted."""

    def __init__(self, settings: Settings) -> None:
        import httpx2 as httpx

        door: Any = create_app(settings, behind_front=True)
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://worker", timeout=None)

    async def __call__(
        self, method: str, url: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        reply = await self._http.request(method, url, headers=headers, content=body)
        return reply.status_code, dict(reply.headers), reply.content


class RayReplicas:
    """Replicas, asked through a handle of Ray Serve.

    Attributes:
        handle: the deployment's handle.
    """

    def __init__(self, settings: Settings, least: int = 1, most: int = 1, address: str | None = None) -> None:
        """Starts the replicas, and waits until they are ready.

        Args:
            settings: what they serve; models and indexes must be at the same place on all nodes.
            least: replicas that there always are.
            most: replicas that there may be under load.
            address: of the cluster; one on this machine by default.

        Raises:
            ImportError: naming the extra, if Ray Serve is missing.
            ValueError: if there is no cluster at the address, or the replicas cannot work.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            from ray import serve
            from ray.exceptions import RayError
            from ray.serve.exceptions import RayServeException
        except ImportError as error:
            raise missing("this needs Ray Serve", "serve-ray") from error
        if not 1 <= least <= most:
            raise ValueError(f"{least} to {most} replicas: the first number must be 1 or more, and at most the second.")
        self._errors = (RayError, RayServeException)
        self._ends_ray = not ray.is_initialized()
        if self._ends_ray:
            try:
                ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ValueError(f"no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from error
        serve.start(http_options={"location": "NoServer"})
        gpus = sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
        uses_gpu = gpus > 0 and settings.device in (None, "cuda")
        options: dict[str, Any] = {
            "name": _NAME,
            "max_ongoing_requests": _MOST_REQUESTS,
            "ray_actor_options": {"num_gpus": 1} if uses_gpu else {"num_cpus": settings.threads or 1},
        }
        if least == most:
            options["num_replicas"] = least
        else:
            options["autoscaling_config"] = {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": TARGET_REQUESTS,
            }
        deployment: Any = serve.deployment(_Replica, **options)
        try:
            self.handle = serve.run(deployment.bind(settings), name=_NAME, route_prefix=None)
        except (RuntimeError, *self._errors) as error:
            raise ValueError(f"the replicas cannot work: {str(error).strip().splitlines()[-1]}") from error

    @property
    def is_ready(self) -> bool:
        """Whether Ray says that the deployment runs."""
        from ray import serve

        return serve.status().applications[_NAME].status == "RUNNING"

    async def start(self) -> None:
        """Ray watches them already."""

    async def stop(self) -> None:
        """Ends them, and Ray if it was started for them."""
        import ray
        from ray import serve

        await asyncio.to_thread(serve.delete, _NAME)
        if self._ends_ray:
            await asyncio.to_thread(ray.shutdown)

    async def ask(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """The answer of the replica that Ray chooses.

        Raises:
            WorkerDied: if it ended meanwhile.
        """
        response = self.handle.remote(method, url, dict(headers), body)
        try:
            return Reply(*await response)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except self._errors as error:
            await asyncio.sleep(_RETRY_HEALTH)  # until Ray has noticed
            raise WorkerDied from error

    async def ask_all(self, url: str) -> Sequence[bytes]:
        """Nothing: what each replica counts, Ray's own metrics have by replica."""
        return []
