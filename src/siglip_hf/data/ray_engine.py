"""The embedding job on a Ray cluster: actors with a model each, of which Ray Data keeps all busy.

The process that was started by the user plans and writes, as it does without Ray; so the result and what happens after
a kill are the same. Only pixels and towers are elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from siglip_hf.data.items import Batch, Item, embed_items
from siglip_hf.extras import missing
from siglip_hf.files import first_line

if TYPE_CHECKING:
    from siglip_hf.data.embedder import SiglipEmbedder
    from siglip_hf.data.items import Batch, Item

# Batches that an actor gets at once: within them, it decodes the next one while its GPU computes.
_TASK_BATCHES = 4


class _Actor:
    """Embeds ranges of the items; Ray makes one for each place in the pool."""

    def __init__(self, items: Any, options: dict[str, Any], cores: int) -> None:
        import ray
        import torch

        from siglip_hf.data.embedder import SiglipEmbedder

        torch.set_num_threads(cores)
        self.items: Sequence[Item] = ray.get(items[0])
        self.embedder = SiglipEmbedder(workers=cores, **options)

    def __call__(self, task: dict[str, Any]) -> dict[str, list[Any]]:

        results: dict[str, list[Any]] = {"start": [], "batches": []}
        for start, stop in zip(task["start"].tolist(), task["stop"].tolist(), strict=True):
            results["start"].append(start)
            results["batches"].append(pickle.dumps(list(embed_items(self.embedder, self.items[start:stop]))))
        return results


def embed_on_ray(
    embedder: SiglipEmbedder,
    items: Sequence[Item],
    *,
    device: str | None = None,
    actors: int | None = None,
    address: str | None = None,
) -> Iterator[Batch]:
    """As `embed_items`, by actors of a Ray cluster. The batches are the same and come in the same order.

    Args:
        embedder: tells the model, dtype and batch size. The actors load it again, on their nodes.
        items: what to embed. Their files must be at the same place on all nodes.
        device: of the actors; by default a GPU each if the cluster has any, else the CPU.
        actors: how many; by default one for each GPU, or for each node.
        address: "auto", "host:6379", "ray://host:10001", ...; without it, a cluster that has been joined already, or
            one on this machine.

    Raises:
        ImportError: naming the extra, if Ray is missing.
        ValueError: if there is no cluster at the address, or the actors do not fit in it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise missing("this needs Ray", "ray", "search") from error

    with _cluster(ray, address):
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes)) if device in (None, "cuda") else 0
        cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        count = actors or gpus or len(cpus)
        if not cpus or (gpus and count > gpus) or (not gpus and count > sum(cpus)):
            raise ValueError(
                f"{count} workers do not fit in a cluster of {sum(cpus)} CPUs and {gpus} GPUs; pass fewer (--workers)."
            )
        cores = max(1, min(sum(cpus) // count, *cpus))
        options = {
            "model": embedder.name,
            "dtype": embedder.dtype,
            "batch_size": embedder.batch_size,
            "fast": embedder.fast,
            "device": device or (None if gpus else "cpu"),
        }
        step = embedder.batch_size * _TASK_BATCHES
        tasks = [{"start": i, "stop": min(i + step, len(items))} for i in range(0, len(items), step)]
        with ray.data.DataContext.current(context):
            # The reference is wrapped, because Ray would put the items themselves in its place.
            done = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
                _Actor,
                fn_constructor_args=([ray.put(list(items))], options, cores),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(count, len(tasks))),
                num_cpus=cores,
                num_gpus=1 if gpus else 0,
            )
            for task, result in zip(tasks, done.iter_rows(), strict=True):
                assert result["start"] == task["start"], "Ray Data keeps the order"
                yield from pickle.loads(result["batches"])


@contextlib.contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to a cluster, quiet, and without statistics of use sent anywhere."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"no Ray cluster at {address!r}: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()
