"""From settings to a server that listens: one process, several workers, or replicas on a cluster."""

from __future__ import annotations

from collections.abc import Callable

from siglip_hf.serving.app import create_app
from siglip_hf.serving.door import Door
from siglip_hf.serving.front import create_front
from siglip_hf.serving.server import address_of, listen, log_request, run
from siglip_hf.serving.settings import Settings
from siglip_hf.serving.workers import LocalWorkers


def serve(
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    engine: str = "local",
    most_workers: int | None = None,
    ray_address: str | None = None,
    log_requests: bool = True,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serves a model until the process is told to end.

    Args:
        settings: what is served and how.
        host: the address to listen on; see `check_exposure`.
        port: 0 takes a free one.
        workers: processes with a model each; more than one are watched by this one, which then has none.
        engine: "local", or "ray" for replicas on a cluster.
        most_workers: with Ray, as many replicas as the load asks for, from `workers` up to this.
        ray_address: "auto", "host:6379", ...; one of this machine by default.
        log_requests: write a line for each request.
        on_ready: called with the URL when requests are taken.

    Raises:
        ImportError: naming the extra, if something is not installed.
        OSError: if the port is taken, or an index is not there.
        ValueError: if something cannot be loaded.
    """
    with listen(host, port) as listening:
        log = log_request if log_requests else lambda entry: None
        door: Door
        if engine == "ray":
            from siglip_hf.serving.ray_engine import RayReplicas

            replicas = RayReplicas(settings, workers, most_workers or workers, ray_address)
            door = create_front(settings, replicas, log)
        elif workers > 1:
            door = create_front(settings, LocalWorkers(settings, workers), log)
        else:
            door = create_app(settings, log=log)
        run(door, settings, listening, lambda: on_ready(address_of(listening)))
