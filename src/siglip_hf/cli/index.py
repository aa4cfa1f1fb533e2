"""`siglip-hf index`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siglip_hf.cli.common import (
    Device,
    MaxPixels,
    counted,
    embedded_note,
    largest_picture,
    no_library_progress,
    print_some,
    progress_bar,
)

if TYPE_CHECKING:
    from siglip_hf.search.build import IndexReport


def index(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE", help="Embeddings (a folder of `siglip-hf embed`), or what that command takes."
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="The index folder to write; with --to, DATABASE/TABLE.")],
    update: Annotated[
        bool, typer.Option("--update", help="Add what is new to the index that is there, take out what is gone.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    kind: Annotated[
        str | None, typer.Option(help="flat, hnsw, ivf-sq8 or ivf-pq; chosen by size and memory by default.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What the index may take, such as 4GB; half of the machine's by default.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="lancedb or qdrant: fill a table of that database instead of a folder.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Where embeddings of a source are kept; OUT.embeddings by default.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A checkpoint to embed with; without it the embedded one, with no network.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or texts in one forward.")] = 64,
    max_pixels: MaxPixels = None,
    device: Device = None,
) -> int:
    """Make an index that `siglip-hf search` asks, of embeddings or straight from pictures."""
    from siglip_hf.search.kinds import parse_bytes
    from siglip_hf.search.sources_to_index import index_source

    note = embedded_note(model)
    options: dict[str, Any] = {
        "embeddings": embeddings,
        "model": model,
        "batch_size": batch_size,
        "device": device,
        "overwrite": overwrite,
        "update": update,
    }
    if to is not None and (kind or memory):
        raise ValueError("--kind and --memory are those of a FAISS index; the database of --to has its own.")
    with largest_picture(max_pixels), no_library_progress(), progress_bar() as progress:
        task = progress.add_task("embedding", total=None)

        def on_embedded(done: int, total: int) -> None:
            note()
            progress.update(task, completed=done, total=total)

        if to is not None:
            from siglip_hf.search.sources_to_index import export_source

            exported = export_source(source, to, out, on_embedded=on_embedded, **options)
            errors, unused, name = exported.errors, exported.unused, f"{to}:{out}"
            lines = [f"{exported.count:,} vectors; {exported.added:,} written, {exported.removed:,} removed"]
        else:
            made = index_source(
                source,
                out,
                kind=kind,
                memory=parse_bytes(memory) if memory else None,
                on_embedded=on_embedded,
                on_stage=lambda stage: progress.update(task, description=stage, total=None),
                **options,
            )
            errors, unused, name = made.errors, made.unused, out
            lines = _lines(made.index)
    for line in lines:
        print(f"{name}: {line}")
    print_some([*(f"skipped {id_}: {error}" for id_, error in errors), *(f"unused {line}" for line in unused)])
    if errors:
        print(f"{counted(len(errors), 'picture')} skipped", file=sys.stderr)
    return 1 if errors else 0


def _lines(report: IndexReport) -> list[str]:
    from siglip_hf.search.kinds import EFFORTS, gigabytes

    lines = [f"{report.kind}, {report.count:,} vectors, {gigabytes(report.bytes)}; {report.reason}"]
    if report.action != "built":
        lines.append(f"{report.action}: {report.added:,} added, {report.removed:,} removed")
    lines += report.notes
    effort = f" at {EFFORTS[report.kind][0]}={report.effort}" if report.effort is not None else ""
    texts = f", {report.recall_queries:.1%} for words" if report.recall_queries is not None else ""
    lines.append(f"recall@10 against exact search: {report.recall:.1%}{texts}{effort}")
    return lines
