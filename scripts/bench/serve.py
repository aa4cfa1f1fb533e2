"""`siglip-hf serve` under load, against the bare towers and a plain FastAPI loop over stock transformers; and abused.

    python scripts/bench/serve.py                # figures: the embedded checkpoint and base-patch16-224, 64 clients
    python scripts/bench/serve.py --abuse 600    # broken pictures, giant bodies, slow clients beside good traffic
    python scripts/bench/serve.py --kills 30     # workers killed under load

The bare tower is measured before and after each load, in this process, while the server waits. Clients and server share
the machine, and the clients' own work counts against the server. Each client sends its next request when the last one
is answered; they write prepared bytes to sockets, as a client of Python's would take more time than the server.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import siglip_hf
from common import machine, noise_picture, to_jpeg
from embed import write_base
from siglip_hf.data.embedder import SiglipEmbedder

KEY = "a-key-for-the-benchmark-only"
SIZE = (640, 427)
PLAIN = """
import base64, io, sys, threading
import torch, uvicorn
from fastapi import FastAPI, Request
from PIL import Image
from transformers.models.siglip import SiglipImageProcessor, SiglipModel, SiglipTokenizer
folder, dtype, port = sys.argv[1:]
model = SiglipModel.from_pretrained(folder, dtype=dtype).eval()
images, texts = SiglipImageProcessor.from_pretrained(folder), SiglipTokenizer.from_pretrained(folder)
app, lock = FastAPI(), threading.Lock()
@app.get("/health/ready")
def ready():
    return {}
@app.post("/v1/embeddings")
def embed(body: dict):
    found = []
    for one in body["input"]:
        with lock, torch.inference_mode():
            if isinstance(one, str):
                out = model.get_text_features(**texts([one], padding="max_length", return_tensors="pt"))
            else:
                data = one["image_url"]["url"].partition(",")[2]
                picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
                inputs = images(picture, return_tensors="pt")["pixel_values"].to(model.dtype)
                out = model.get_image_features(inputs)
        out = getattr(out, "pooler_output", out).float()
        row = torch.nn.functional.normalize(out, dim=-1)[0].numpy().astype("<f4")
        found.append({"embedding": base64.b64encode(row.tobytes()).decode()})
    return {"data": found}
uvicorn.run(app, port=int(port), log_level="error")
"""


def request_of(value: Any, key: str = KEY) -> bytes:
    """A request for embeddings, as bytes."""
    body = json.dumps({"input": [value], "encoding_format": "base64"}).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def picture_part(content: bytes) -> dict[str, Any]:
    uri = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of a reply."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lengths = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length")]
    return int(head.split(" ", 2)[1]), await reader.readexactly(int(lengths[0]))


async def load(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> tuple[float, list[float]]:
    """Answers per second of so many clients, and the time of each answer."""
    times: list[float] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        turn = number
        while time.monotonic() < end:
            start = time.monotonic()
            writer.write(requests[turn % len(requests)])
            status, body = await answer_of(reader)
            if status != 200:
                raise RuntimeError(f"status {status}: {body[:300]!r}")
            times.append(time.monotonic() - start)
            turn += clients
        writer.close()

    start = time.monotonic()
    await asyncio.gather(*map(client, range(clients)))
    return len(times) / (time.monotonic() - start), times


@contextlib.contextmanager
def running(command: Sequence[str], port: int | None = None) -> Iterator[tuple[int, int]]:
    """A server's port and process number, while it runs; the port is printed by it unless it is known."""
    environment = {**os.environ, "SIGLIP_HF_API_KEYS": KEY}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            if port is None:
                port = int(process.stdout.readline().strip().rpartition(":")[2])
            else:
                wait_for(port)
            yield port, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            asyncio.run(asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 1))
            return
        time.sleep(0.2)
    raise RuntimeError("the server does not start")


def serve_command(model: str, *options: str) -> list[str]:
    run = "import sys, siglip_hf_command; sys.exit(siglip_hf_command.main())"
    return [sys.executable, "-c", run, "serve", "--model", model, "--port", "0", "--no-log", *options]


def bare(embedder: SiglipEmbedder, pictures: Sequence[bytes], texts: Sequence[str], seconds: float) -> dict[str, float]:
    """Items per second of the towers alone, on prepared inputs in full batches; and seconds of a single one."""
    from siglip_hf.preprocessing.image_intake import load_picture

    size = embedder.batch_size
    inputs = embedder.prepare_images([load_picture(pictures[i % len(pictures)]) for i in range(size)])
    ids = embedder.prepare_texts([texts[i % len(texts)] for i in range(size)])
    assert inputs is not None
    one = {name: value[:1] for name, value in inputs.items()}
    found = {}
    runs = {
        "pictures": (lambda: embedder.encode_images(inputs), size),
        "texts": (lambda: embedder.encode_ids(ids), size),
        "one picture": (lambda: embedder.encode_images(one), 1),
        "one text": (lambda: embedder.encode_ids(ids[:1]), 1),
    }
    for name, (run, count) in runs.items():
        run()
        start, done = time.monotonic(), 0
        while time.monotonic() < start + seconds / len(runs):
            run()
            done += count
        found[name] = done / (time.monotonic() - start)
    return found


def figures(model: str, name: str, dtype: str, seconds: float, clients: int) -> None:
    """Prints a table's rows for one checkpoint."""
    rng = np.random.default_rng(0)
    pictures = [to_jpeg(noise_picture(rng, *SIZE)) for _ in range(16)]
    texts = [f"drawing number {i}" for i in range(64)]
    requests = {"pictures": [request_of(picture_part(p)) for p in pictures], "texts": list(map(request_of, texts))}
    embedder = SiglipEmbedder(model, device="cpu", dtype=dtype, batch_size=32)
    measured: dict[str, list[float]] = {}
    servers = {"siglip-hf serve": serve_command(model, "--dtype", dtype, "--device", "cpu")}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plain.py").write_text(PLAIN)
        servers["plain FastAPI"] = [sys.executable, str(Path(folder) / "plain.py"), model, dtype, "8765"]
        for server, command in servers.items():
            with running(command, 8765 if server.startswith("plain") else None) as (port, _):
                for kind, some in requests.items():
                    before = bare(embedder, pictures, texts, seconds / 2)
                    rate, times = asyncio.run(load(port, some, clients, seconds))
                    after = bare(embedder, pictures, texts, seconds / 2)
                    _, alone = asyncio.run(load(port, some, 1, seconds / 2))
                    tower = (before[kind] + after[kind]) / 2
                    one = 1000 / statistics.mean(b[f"one {kind[:-1]}"] for b in (before, after))
                    times.sort()
                    measured[f"{server}, {kind}"] = [rate, rate / tower]
                    print(
                        f"| {name} | {server} | {kind} | {tower:.0f} | {rate:.0f} | {rate / tower:.0%} "
                        f"| {1000 * statistics.median(times):.0f} | {1000 * times[int(0.99 * (len(times) - 1))]:.0f} "
                        f"| {one:.0f} | {1000 * statistics.median(alone):.0f} |",
                        flush=True,
                    )


async def abuse(port: int, model: str, seconds: float, on_second: Any = lambda second: None) -> Counter[str]:
    """Good requests, whose answers are compared with the library's, beside bad ones; how often each status came."""
    rng = np.random.default_rng(1)
    pictures = [to_jpeg(noise_picture(rng, 320, 213)) for _ in range(8)]
    embedder = SiglipEmbedder(model, device="cpu", dtype="float32")
    expected = [*embedder.embed_images(pictures), *embedder.embed_texts([f"text {i}" for i in range(8)])]
    good = [*(request_of(picture_part(p)) for p in pictures), *(request_of(f"text {i}") for i in range(8))]
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0" + b"\0" * 100
    bad = {
        "broken picture": request_of(picture_part(pictures[0][:500])),
        "no picture": request_of(picture_part(b"hello" * 100)),
        "bomb": request_of(picture_part(bomb)),
        "wrong key": request_of("a", "a-key-that-nobody-was-given"),
        "no JSON": good[-1].replace(b'"input"', b"'input'"),
        "deep JSON": b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer "
        + KEY.encode()
        + b"\r\nContent-Length: 20000\r\n\r\n"
        + b"[" * 20000,
        "giant": good[-1].split(b"Content-Length")[0] + b"Content-Length: 99999999999\r\n\r\n" + b"x" * 10000,
        "no HTTP": b"\0\1\2\3\r\n\r\n",
    }
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def honest(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end:
            which = random.randrange(len(good))
            writer.write(good[which])
            status, body = await answer_of(reader)
            if status == 429:
                seen["good: told to come again"] += 1
                await asyncio.sleep(1)
                continue
            right = False
            if status == 200:
                row = np.frombuffer(base64.b64decode(json.loads(body)["data"][0]["embedding"]), "<f4")
                right = bool(np.abs(row - expected[which]).max() <= 1e-5)
            seen["good: right" if right else f"good: WRONG ({status})"] += 1
        writer.close()

    async def hostile(number: int) -> None:
        while time.monotonic() < end:
            name = random.choice(list(bad))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
                writer.write(bad[name])
                status, _ = await asyncio.wait_for(answer_of(reader), 30)
                seen[f"{name}: {status}"] += 1
            writer.close()

    async def fickle(number: int) -> None:
        """Goes away in the midst of a request, or before its answer."""
        while time.monotonic() < end:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            whole = random.choice(good)
            writer.write(whole[: random.choice((50, len(whole) // 2, len(whole)))])
            await asyncio.sleep(random.random() / 20)
            writer.transport.abort()
            seen["gone"] += 1

    async def slow(number: int) -> None:
        """A byte now and then."""
        while time.monotonic() < end:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):
                for byte in random.choice(good)[:200]:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.2)
                    if time.monotonic() > end:
                        break
            writer.close()

    async def clock() -> None:
        while time.monotonic() < end:
            on_second(seen)
            await asyncio.sleep(1)

    people = [*map(honest, range(8)), *map(hostile, range(4)), *map(fickle, range(2)), *map(slow, range(8)), clock()]
    await asyncio.gather(*people)
    return seen


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def resident(pid: int) -> float:
    """Megabytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def run_abuse(model: str, seconds: float) -> None:
    memory: list[float] = []
    command = serve_command(model, "--dtype", "float32", "--device", "cpu", "--max-bytes", "4000000")
    with running(command) as (port, pid):
        seen = asyncio.run(abuse(port, model, seconds, lambda _: memory.append(resident(pid))))
    for name, count in sorted(seen.items()):
        print(f"| {name} | {count} |")
    third = max(len(memory) // 3, 1)
    print(f"memory: {max(memory[:third]):.0f} MB at most in the first third, {max(memory[-third:]):.0f} MB in the last")
    assert not [name for name in seen if "WRONG" in name or ": 5" in name], "a good request failed"


def run_kills(model: str, kills: int) -> None:
    command = serve_command(model, "--dtype", "float32", "--device", "cpu", "--workers", "2")
    done = 0
    last = time.monotonic()

    with running(command) as (port, pid):

        def workers() -> list[int]:
            """The front has a fork server, whose children they are."""
            return [worker for child in children(pid) for worker in children(child)]

        def kill(seen: Counter[str]) -> None:
            nonlocal done, last
            if done < kills and time.monotonic() > last + 2 and (some := workers()):
                os.kill(random.choice(some), signal.SIGKILL)
                done, last = done + 1, time.monotonic()

        async def scenario() -> Counter[str]:
            return await abuse(port, model, kills * 4.0, kill)

        seen = asyncio.run(scenario())
    good = {name: count for name, count in seen.items() if name.startswith("good")}
    print(f"{done} kills of a worker: {good}")
    assert set(good) == {"good: right"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--only", choices=["embedded", "base"])
    parser.add_argument("--abuse", type=float, metavar="SECONDS")
    parser.add_argument("--kills", type=int)
    arguments = parser.parse_args()
    print(machine(packages=("torch", "transformers", "fastapi", "uvicorn")))
    embedded = siglip_hf.default_checkpoint()
    if arguments.abuse:
        run_abuse(embedded, arguments.abuse)
    elif arguments.kills:
        run_kills(embedded, arguments.kills)
    else:
        titles = ("checkpoint", "server", "what", "tower/s", "served/s", "ratio", "p50 ms", "p99 ms")
        print(f"| {' | '.join((*titles, 'tower alone, one, ms', 'one client, p50 ms'))} |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            if arguments.only != "base":
                figures(embedded, "embedded", "float32", arguments.seconds, arguments.clients)
            if arguments.only != "embedded":
                dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
                figures(
                    write_base(Path(folder) / "base", text_layers=12),
                    "base-patch16-224",
                    dtype,
                    arguments.seconds,
                    arguments.clients,
                )


if __name__ == "__main__":
    main()
