"""`siglip-hf serve`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from siglip_hf.cli.common import (
    ComputeDtype,
    Device,
    Fast,
    LabelBankFolder,
    embedded_note,
    no_library_progress,
)


class Engine(StrEnum):
    """Where the towers run."""

    local = "local"
    ray = "ray"


def serve(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint; without it that of the first --index, or the embedded one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model; the last part of its name.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one beyond this machine needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        Path | None,
        typer.Option(help="A file with a key on each line; SIGLIP_HF_API_KEYS (with commas) works as well."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Answer everyone who reaches --host.")] = False,
    index: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Search this index; may be given several times.")
    ] = None,
    label_bank: LabelBankFolder = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures from public addresses, never from private ones.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes with a model each; with Ray, replicas.")] = 1,
    max_workers: Annotated[
        int | None, typer.Option(min=1, help="Ray: as many replicas as the load asks for, up to this.")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="local, or ray for a cluster.")] = Engine.local,
    ray_address: Annotated[
        str | None, typer.Option(help='Ray: "auto", or host:port; one of its own by default.')
    ] = None,
    device: Device = None,
    dtype: ComputeDtype = None,
    fast: Fast = True,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures or texts in one forward; 32 on a CPU.")
    ] = None,
    wait: Annotated[float, typer.Option(min=0, max=1000, help="Milliseconds that a batch waits for company.")] = 2.0,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of one request.")] = 32 * 2**20,
    max_held_bytes: Annotated[int, typer.Option(min=1, help="Of all requests that are being answered.")] = 512 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture.")] = 50_000_000,
    max_inputs: Annotated[int, typer.Option(min=1, help="Pictures and texts in one request.")] = 2048,
    max_queued: Annotated[int, typer.Option(min=1, help="Pictures, and texts, that may wait for their tower.")] = 2048,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="For the answer to a request.")] = 60.0,
    log: Annotated[bool, typer.Option("--log/--no-log", help="A JSON line on stderr for each request.")] = True,
) -> int:
    """Answer over HTTP: embeddings as OpenAI's, labels, scores, search.

    curl localhost:8000/v1/embeddings -H 'Content-Type: application/json' -d '{"input": "a red car"}'
    """
    from siglip_hf.serving.security import check_exposure, key_file_warning, read_keys
    from siglip_hf.serving.settings import Limits, Settings

    keys = read_keys(api_key)
    check_exposure(host, keys, insecure)
    if api_key is not None and (warning := key_file_warning(api_key)):
        print(f"siglip-hf: {warning}", file=sys.stderr)
    if engine is Engine.local and (
        option := "--max-workers" if max_workers else "--ray-address" if ray_address else None
    ):
        raise ValueError(f"{option} is for --engine ray.")
    settings = Settings(
        model=model,
        name=name,
        device=device,
        dtype=dtype,
        fast=fast,
        batch_size=batch_size,
        wait=wait / 1000,
        indexes=_named(index or []),
        label_bank=None if label_bank is None else str(label_bank),
        api_keys=keys,
        allow_urls=allow_urls,
        limits=Limits(
            body_bytes=max_bytes,
            held_bytes=max(max_held_bytes, max_bytes),
            pixels=max_pixels,
            inputs=max_inputs,
            queued=max_queued,
            seconds=max_seconds,
        ),
    )
    from siglip_hf.serving.server import log_as_json
    from siglip_hf.serving.start import serve as start

    if not index:
        embedded_note(model)()
    with log_as_json(), no_library_progress():
        start(
            settings,
            host=host,
            port=port,
            workers=workers,
            engine=engine.value,
            most_workers=max_workers,
            ray_address=ray_address,
            log_requests=log,
            on_ready=lambda url: print(url, flush=True),
        )
    return 0


def _named(indexes: list[str]) -> dict[str, str]:
    """Folders by name."""
    named: dict[str, str] = {}
    for given in indexes:
        name, equals, folder = given.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--index {given}: write NAME=FOLDER, such as photos=photos.idx.")
        if name in named:
            raise ValueError(f"--index {given}: the name {name!r} is given twice.")
        named[name] = folder
    return named
