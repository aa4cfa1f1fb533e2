"""`siglip-hf learn`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from siglip_hf.cli.common import (
    ComputeDtype,
    Device,
    MaxPixels,
    Model,
    console,
    counted,
    embedded_note,
    largest_picture,
    no_library_progress,
    print_json,
    print_some,
    progress_bar,
    refuse_source,
)

if TYPE_CHECKING:
    from siglip_hf.training.learn import Learned

# Classifiers shown of those that were compared.
_MOST_CANDIDATES = 5


def learn(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA", help="A folder of class folders, a table with a column of labels, tar shards."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write, for `siglip-hf classify --head`.")],
    model: Model = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Where the pictures' embeddings are kept; OUT.emb by default.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Text with {} for the class, for the comparison with zero-shot.")
    ] = None,
    unknown_rate: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of pictures of the classes that may be called unknown.")
    ] = 0.05,
    folds: Annotated[int, typer.Option(min=2, help="Parts of the cross-validation.")] = 5,
    confusion: Annotated[
        Path | None, typer.Option(help="Draw which class is taken for which into this picture file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    image_column: Annotated[str | None, typer.Option(help="Column with the pictures.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the class.")] = None,
    split: Annotated[str, typer.Option(help="Split of a saved dataset that has several.")] = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one forward.")] = 64,
    max_pixels: MaxPixels = None,
    device: Device = None,
    dtype: ComputeDtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> int:
    """Learn classes of your own from a few pictures of each; the towers stay as they are."""
    from siglip_hf.data.sources import open_source
    from siglip_hf.evaluation.confusion_picture import check_picture_file, draw_confusion
    from siglip_hf.inference.label_bank import parse_templates
    from siglip_hf.inference.pipeline import DEFAULT_TEMPLATE
    from siglip_hf.training.learn import learn as teach

    templates = parse_templates(template) if template else (DEFAULT_TEMPLATE,)
    if confusion is not None:
        check_picture_file(confusion)
    source = open_source(
        data if len(data) > 1 else data[0], image_column=image_column, label_column=label_column, split=split
    )
    if confusion is not None:
        refuse_source(confusion, [record.path for record in source if record.path is not None], "--confusion")
    start = time.perf_counter()
    with largest_picture(max_pixels), no_library_progress(), progress_bar() as progress:
        bar = progress.add_task("loading the model", total=None)
        embedded_note(model)()
        found = teach(
            source,
            out,
            model=model,
            embeddings=embeddings,
            templates=templates,
            folds=folds,
            unknown_rate=unknown_rate,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            on_progress=lambda what, done, total: progress.update(bar, description=what, completed=done, total=total),
        )
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found, out, time.perf_counter() - start)
    if confusion is not None:
        draw_confusion(found.confusion, confusion)
        print(f"confusion picture: {confusion}", file=sys.stderr)
    print_some([f"left out {line}" for line in found.unused])
    print_some([f"skipped {line}" for line in found.skipped])
    return 1 if found.skipped else 0


def _print(found: Learned, out: Path, seconds: float) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("classifier, best first", min_width=24)
    table.add_column("accuracy", justify="right")
    table.add_column("log loss", justify="right")
    shown = found.candidates[:_MOST_CANDIDATES]
    for one in [*shown, *(one for one in found.candidates if one.name == "zero-shot" and one not in shown)]:
        table.add_row(one.name, f"{one.accuracy:.1%}", f"{one.log_loss:.3f}")
    console().print(table)
    classes = len(found.classifier.labels)
    print(f"{out}: {counted(found.pictures, 'picture')} of {classes} classes in {seconds:.0f} s; {found.method}")
    print(
        f"accuracy {found.accuracy:.1%} on pictures that it had not seen; their names alone give {found.zero_shot:.1%}"
    )
    print(
        f"unknown: {found.unknown_rate:.1%} of pictures of these classes, "
        f"and {found.unknown_found:.1%} of pictures of a class that is left out"
    )
