"""Several workers behind one door: the same answers, and one for every request, whichever worker is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import pytest

from serving_client import ask, client_of, png, uri
from siglip_hf.serving.front import Reply, WorkerDied, create_front
from siglip_hf.serving.metrics import Metrics, summed
from siglip_hf.serving.settings import Settings
from siglip_hf.serving.workers import LocalWorkers

KEY = "a-secret-of-many-letters"


class Fake:
    """Workers that die so many times, and note what they are asked."""

    is_ready = True

    def __init__(self, deaths=0):
        self.deaths, self.asked = deaths, []

    async def ask(self, method, url, headers, body):
        self.asked.append((method, url, headers, body))
        if len(self.asked) <= self.deaths:
            raise WorkerDied
        return Reply(200, {"content-type": "text/x", "x-request-id": "inner"}, b"done")

    async def ask_all(self, url):
        metrics = Metrics()
        metrics.on_batch("texts", 3, 0.5)
        return [metrics.text(), metrics.text()]


def test_a_request_goes_to_another_worker_when_one_dies():
    workers = Fake(deaths=2)
    front = create_front(Settings(api_keys=(KEY,)), workers)
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Timeout": "9", "Cookie": "a", "Content-Type": "text/y"}
    assert ask(front, "/v1/x?q=1", content=b"body", headers=headers) == (200, "done")
    assert len(workers.asked) == 3
    method, url, sent, body = workers.asked[-1]
    assert (method, url, body) == ("POST", "/v1/x", b"body")
    client = sent.pop("x-siglip-hf-client")
    assert client.startswith("key ")
    assert {name: sent[name] for name in sent if name != "accept"} == {
        "content-type": "text/y",
        "x-request-timeout": "9",
    }
    assert ask(front, "/v1/x", {})[0] == 401


def test_a_request_that_kills_everyone_is_given_up():
    workers = Fake(deaths=99)
    status, said = ask(create_front(Settings(), workers), "/v1/x", {})
    assert (status, said["detail"]) == (503, "3 workers ended over this request; come again later.")
    assert len(workers.asked) == 3


def test_health_is_that_of_the_workers():
    workers = Fake()
    front = create_front(Settings(), workers)
    assert ask(front, "/health/ready")[0] == ask(front, "/health/live")[0] == 200
    workers.is_ready = False
    assert (ask(front, "/health/ready")[0], ask(front, "/health/live")[0]) == (503, 200)


def test_metrics_of_all_are_added_up():
    front = create_front(Settings(), Fake())
    ask(front, "/v1/models")
    _, text = ask(front, "/metrics")
    lines = text.splitlines()
    assert 'siglip_items_total{lane="texts"} 6.0' in lines
    assert (
        'siglip_batch_size_bucket{lane="texts",le="4"} 2.0' in lines
        or 'siglip_batch_size_bucket{lane="texts",le="4.0"} 2.0' in lines
    )
    assert 'siglip_requests_total{path="/v1/models",status="200"} 1.0' in lines
    assert lines.count("# TYPE siglip_items_total counter") == 1
    assert summed([text.encode()]) == text.encode()


def test_a_worker_that_cannot_load_says_why(tmp_path):
    with pytest.raises(ValueError, match="cannot load"):
        LocalWorkers(Settings(model=str(tmp_path)), 1)


def test_workers_are_killed_and_every_request_is_answered(checkpoint, embedder):
    """Requests without a pause while each worker is killed in turn; the answers are right, and new workers come."""
    settings = Settings(model=str(checkpoint), device="cpu", dtype="float32", fast=False, wait=0.02)
    workers = LocalWorkers(settings, 2)
    front = create_front(settings, workers)
    expected = embedder.embed_images([png(1)])[0], embedder.embed_texts("cat")[0]
    first = workers.pids
    answers = []

    async def keep_asking(client, until):
        while not until():
            reply = await client.post("/v1/embeddings", json={"input": [uri(png(1)), "cat"]})
            answers.append(reply)

    async def wait_for(condition):
        end = time.monotonic() + 300  # forever, as far as a test goes
        while not condition():
            assert time.monotonic() < end
            await asyncio.sleep(0.05)

    async def some_more():
        least = len(answers) + 8
        await wait_for(lambda: len(answers) > least)

    async def another_for(pid):
        await wait_for(lambda: pid not in workers.pids and all(one.can_work for one in workers._workers))

    async def scenario():
        await workers.start()
        is_over = False
        async with client_of(front) as client:
            askers = [asyncio.create_task(keep_asking(client, lambda: is_over)) for _ in range(4)]
            for pid in first:
                await some_more()
                os.kill(pid, signal.SIGKILL)
                await another_for(pid)
            await some_more()
            is_over = True
            await asyncio.gather(*askers)
        await workers.stop()

    asyncio.run(scenario())
    assert {reply.status_code for reply in answers} == {200}
    for reply in answers:
        rows = [row["embedding"] for row in reply.json()["data"]]
        np.testing.assert_allclose(rows, expected, atol=1e-5)
    for pid in (*first, *workers.pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
