"""The door: keys, bytes, time, those who have gone, faults, the end; and what is logged of it."""

from __future__ import annotations

import asyncio

import pytest

from serving_client import ask
from siglip_hf.serving.door import Door
from siglip_hf.serving.problems import Problem
from siglip_hf.serving.settings import Limits, Settings

KEYS = ("a-secret-of-many-letters", "another-secret-of-mine")


class App:
    """Answers "ok"; or waits forever, or fails, by its path."""

    def __init__(self):
        self.cancelled, self.clients = 0, []

    async def __call__(self, scope, receive, send):
        self.clients.append(scope["state"]["client"])
        await receive()
        if scope["path"] == "/wait":
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        if scope["path"] == "/fail":
            raise RuntimeError("a secret detail")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def door_of(log=lambda entry: None, **options):
    limits = Limits(**{name: options.pop(name) for name in list(options) if name in Limits.__dataclass_fields__})
    return Door(App(), Settings(limits=limits, **options), log=log)


def test_any_of_the_keys_opens_and_nothing_else_does():
    door = door_of(api_keys=KEYS)
    for key in KEYS:
        assert ask(door, "/v1/models", headers={"Authorization": f"Bearer {key}"}, method="GET")[0] == 200
    names = set(door.app.clients)
    assert len(names) == 2
    assert all(name.startswith("key ") for name in names)
    for header in (
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {KEYS[0]}x",
        f"Basic {KEYS[0]}",
        f"Bearer {KEYS[0][:-1]}",
        KEYS[0],
    ):
        status, said = ask(door, "/v1/models", headers={"Authorization": header}, method="GET")
        assert (status, said["detail"]) == (401, "this server wants a key: Authorization: Bearer KEY.")
    assert ask(door, "/health/live")[0] == 200


def test_an_answer_that_takes_too_long_is_not_waited_for():
    door = door_of(seconds=0.05)
    status, said = ask(door, "/wait", {})
    assert (status, said["detail"]) == (504, "the answer was not ready after 0.05 s.")
    assert door.app.cancelled == 1
    status, said = ask(door_of(), "/wait", {}, headers={"X-Request-Timeout": "0.02"})
    assert (status, said["detail"]) == (504, "the answer was not ready after 0.02 s.")
    for value in ("soon", "-1", "nan"):
        assert ask(door_of(), "/wait", {}, headers={"X-Request-Timeout": value})[0] == 400


def test_work_ends_when_whoever_asked_has_gone():
    entries = []
    door = door_of(entries.append)

    async def scenario():
        gone = asyncio.Event()
        messages = [{"type": "http.request", "body": b"123", "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            raise AssertionError("nobody is there")

        scope = {"type": "http", "method": "POST", "path": "/wait", "headers": [], "client": ("1.2.3.4", 5)}
        request = asyncio.create_task(door(scope, receive, send))
        while not door.app.clients:
            await asyncio.sleep(0)
        assert door.held.bytes == 3
        gone.set()
        await request

    asyncio.run(scenario())
    assert (door.app.cancelled, door.held.bytes) == (1, 0)
    assert [(entry["status"], entry["client"]) for entry in entries] == [(499, "1.2.3.4")]


def test_all_requests_together_hold_so_many_bytes():
    door = door_of(body_bytes=100, held_bytes=100)
    door.held.take(60)
    assert ask(door, "/v1/x", content=b"x" * 40)[0] == 200
    status, said = ask(door, "/v1/x", content=b"x" * 41)
    assert (status, said["detail"]) == (429, "the server holds as much as it may; come again in 1 s.")
    assert door.held.bytes == 60
    with pytest.raises(Problem):
        door.held.take(41)


def test_a_fault_is_logged_and_not_told(caplog):
    entries = []
    door = door_of(entries.append)
    status, said = ask(door, "/fail", {})
    assert status == 500
    assert said["detail"] == f"a fault of the server, not of your request; its log has it as {entries[0]['id']}."
    assert "secret" not in str(said)
    assert "a secret detail" in caplog.text
    assert entries[0]["fault"] == "RuntimeError"


def test_at_the_end_nothing_more_is_taken():
    door = door_of()
    door.is_draining = True
    assert ask(door, "/v1/models")[0] == 503
    assert ask(door, "/health/ready")[0] == 503
    assert ask(door, "/health/live")[0] == 200


def test_the_log_has_no_contents():
    entries = []
    ask(door_of(entries.append), "/v1/embeddings?q=secret", content=b"secret")
    assert set(entries[0]) == {"id", "client", "method", "path", "status", "bytes", "seconds"}
    assert (entries[0]["path"], entries[0]["bytes"]) == ("/v1/embeddings", 6)
    assert "secret" not in str(entries)
    ask(door_of(entries.append), "/secret")
    assert entries[1]["path"] == "other"
