"""`siglip-hf embed`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from siglip_hf.cli.common import (
    ComputeDtype,
    Device,
    Fast,
    MaxPixels,
    Model,
    counted,
    embedded_note,
    largest_picture,
    no_library_progress,
    print_some,
    progress_bar,
)

if TYPE_CHECKING:
    from siglip_hf.data.embed import Embedded


def embed(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Folders and globs of pictures, a CSV, JSONL or Parquet table, .tar shards, a dataset on disk, or a "
            ".txt file with a text on each line.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of embeddings, made or brought up to date.")],
    model: Model = None,
    kind: Annotated[
        str | None, typer.Option(help="image or text; pictures by default, texts if there are no pictures.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="The table's column of pictures.")] = None,
    text_column: Annotated[str | None, typer.Option(help="The table's column of texts.")] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset on disk.")] = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or texts in one forward.")] = 64,
    max_pixels: MaxPixels = None,
    device: Device = None,
    dtype: ComputeDtype = None,
    store_dtype: Annotated[str, typer.Option(help="float16 or float32, of the numbers on disk.")] = "float16",
    fast: Fast = True,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode, one per core by default; with Ray, actors.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="The Ray cluster; by default one on this machine.")] = None,
) -> int:
    """Turn pictures or texts into embeddings on disk.

    It may be interrupted at any moment: the same command goes on where it stopped. Run again later, it does what is new
    or has changed, and takes away what is gone.
    """
    from siglip_hf.data.embed import embed_source

    if max_pixels is not None and engine != "local":
        raise ValueError(
            "--max-pixels holds in this process, not in Ray's; leave one of --max-pixels and --engine out."
        )
    note = embedded_note(model)
    with largest_picture(max_pixels), no_library_progress(), progress_bar() as progress:
        task = progress.add_task("loading the model", total=None)
        start = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal start
            note()
            start = start if done else time.monotonic()
            rate = f" {done / (time.monotonic() - start):.0f}/s" if done else ""
            progress.update(task, description=f"embedding{rate}", completed=done, total=total)

        result = embed_source(
            source[0] if len(source) == 1 else source,
            out,
            model=model,
            kind=kind,  # type: ignore[arg-type]
            image_column=image_column,
            caption_column=text_column,
            split=split,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            store_dtype=store_dtype,  # type: ignore[arg-type]
            fast=fast,
            workers=workers,
            engine=engine,  # type: ignore[arg-type]
            address=address,
            on_progress=show,
        )
    print(summary(result))
    return report_errors(result)


def summary(result: Embedded) -> str:
    """One line about a run."""
    manifest = result.manifest
    count = manifest.rows - manifest.errors
    things = counted(count, "picture" if manifest.kind == "image" else "text")
    speed = f" at {result.done / result.seconds:.0f}/s" if result.done else ""
    return (
        f"{result.path}: {things} of {manifest.dimension} numbers; "
        f"{result.done} done{speed}, {result.kept} kept, {result.removed} removed"
    )


def report_errors(result: Embedded) -> int:
    """Names what has no embedding on stderr; the exit code."""
    print_some([f"{result.path}: {name} was damaged; its rows have been rebuilt" for name in result.damaged])
    print_some([f"left out {line}" for line in result.unused])
    print_some(
        [f"skipped {id_}: {error}" for id_, error in result.errors], f"; all are in the column error of {result.path}"
    )
    if result.errors:
        print(f"{len(result.errors)} of {result.manifest.rows} skipped", file=sys.stderr)
    return 1 if result.errors else 0
