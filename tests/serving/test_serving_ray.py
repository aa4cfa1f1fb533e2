"""Replicas on a local Ray cluster: the same answers, and one for every request while a replica is killed."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from serving_client import client_of, png, uri
from siglip_hf.serving.front import create_front
from siglip_hf.serving.settings import Settings

# Needs `pip install "ray[serve]"`, which the extra `dev` does not have: it makes each start of Ray slower.
pytestmark = pytest.mark.slow


def test_a_replica_is_killed_and_every_request_is_answered(checkpoint, embedder, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.serve")
    from siglip_hf.serving.ray_engine import RayReplicas

    for patience in ("RAY_agent_register_timeout_ms", "RAY_raylet_start_wait_time_s"):  # for a busy machine
        monkeypatch.setenv(patience, "300000" if patience.endswith("ms") else "300")
    settings = Settings(model=str(checkpoint), device="cpu", dtype="float32", fast=False, threads=1)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        replicas = RayReplicas(settings, 2, 2)
        front = create_front(settings, replicas)
        expected = embedder.embed_images([png(1)])[0], embedder.embed_texts("cat")[0]
        answers = asyncio.run(ask_while_killing(ray, front, replicas))
        asyncio.run(replicas.stop())
    finally:
        ray.shutdown()
    assert len(answers) > 40
    assert {reply.status_code for reply in answers} == {200}
    for reply in answers:
        rows = [row["embedding"] for row in reply.json()["data"]]
        np.testing.assert_allclose(rows, expected, atol=1e-5)


async def ask_while_killing(ray, front, replicas):
    """Answers to requests of four clients, in the midst of which a replica is killed."""
    answers, is_over = [], False

    async def keep_asking(client):
        while not is_over:
            answers.append(await client.post("/v1/embeddings", json={"input": [uri(png(1)), "cat"]}))

    async def some_more():
        least = len(answers) + 20
        while len(answers) < least:
            await asyncio.sleep(0.05)

    async with client_of(front) as client:
        assert (await client.get("/health/ready")).status_code == 200
        askers = [asyncio.create_task(keep_asking(client)) for _ in range(4)]
        await some_more()
        ray.kill(next(iter(ray_replicas(ray))))
        await some_more()
        is_over = True
        await asyncio.gather(*askers)
    return answers


def ray_replicas(ray):
    """The actors that are replicas."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if "_Replica#" in actor["name"]:
            yield ray.get_actor(actor["name"], namespace=actor["namespace"])
