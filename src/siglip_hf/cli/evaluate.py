"""`siglip-hf evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from siglip_hf.cli.common import (
    Device,
    LabelBankFolder,
    MaxPixels,
    Model,
    console,
    embedded_note,
    largest_picture,
    no_library_progress,
    print_json,
    progress_bar,
    refuse_source,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from siglip_hf.evaluation import Evaluation, RetrievalRecall, ZeroShotAccuracy

# Rows of a table that is read on a screen, and lines of what was left out.
_MOST_CLASSES = 40
_MOST_LINES = 20


def evaluate(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="A folder of class folders, a table, tar shards, a saved dataset, or a folder of CLIP_benchmark's.",
        ),
    ],
    model: Model = None,
    task: Annotated[
        str, typer.Option(help="classify (labels), retrieve (captions), or auto: whatever DATA has.")
    ] = "auto",
    templates: Annotated[
        str | None, typer.Option(help="A set of prompts: default, label, photo, imagenet, imagenet7, cifar.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Text with {} for the label; given several times, they are averaged.")
    ] = None,
    labels_file: Annotated[
        Path | None,
        typer.Option(help="A text file with a label on each line: the candidates, or the names of numbered classes."),
    ] = None,
    truth: Annotated[Path | None, typer.Option(help='JSON of right labels, {"a.png": "a cat"}.')] = None,
    confusion: Annotated[
        Path | None, typer.Option(help="Draw which class is taken for which into this picture file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    image_column: Annotated[str | None, typer.Option(help="Column with the pictures.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column with the captions.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the class.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of a saved dataset (train by default), or of CLIP_benchmark's folder (test)."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or captions in one forward.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that read pictures; one per core by default.")
    ] = None,
    max_pixels: MaxPixels = None,
    label_bank: LabelBankFolder = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="What the towers compute in: float32, or the faster bfloat16, float16.")
    ] = "float32",
) -> int:
    """Measure zero-shot accuracy on labelled pictures, and retrieval recall on captioned ones."""
    from siglip_hf.data.embedder import SiglipEmbedder
    from siglip_hf.data.sources import open_source
    from siglip_hf.evaluation import as_clip_benchmark, open_benchmark, with_truth
    from siglip_hf.evaluation import evaluate as measure
    from siglip_hf.evaluation.clip_benchmark import is_benchmark
    from siglip_hf.evaluation.confusion_picture import check_picture_file, draw_confusion
    from siglip_hf.inference.classify import read_labels_file, read_truth_file
    from siglip_hf.inference.label_bank import parse_templates
    from siglip_hf.inference.prompt_templates import template_set

    if templates and template:
        raise ValueError("--templates and --template are both given; pass one of them.")
    labels: Sequence[str] | None = read_labels_file(labels_file) if labels_file else None
    if confusion is not None:
        check_picture_file(confusion)
    # What belongs to a benchmark is taken where nothing else is asked for.
    benchmark = open_benchmark(data[0], split or "test") if len(data) == 1 and is_benchmark(data[0]) else None
    if benchmark is not None:
        if column := image_column or caption_column or label_column:
            raise ValueError(f"{data[0]} is a folder of CLIP_benchmark's and has no columns; leave {column!r} out.")
        source, labels = benchmark.source, labels or benchmark.labels
        task = benchmark.task if task == "auto" else task
        template = template or (list(benchmark.templates) if benchmark.templates and not templates else None)
    else:
        source = open_source(
            data if len(data) > 1 else data[0],
            image_column=image_column,
            caption_column=caption_column,
            label_column=label_column,
            split=split or "train",
        )
    prompts = parse_templates(template) if template else template_set(templates or "default")
    if confusion is not None:
        refuse_source(confusion, [record.path for record in source if record.path is not None], "--confusion")
    if truth is not None:
        source = with_truth(source, read_truth_file(truth))

    with largest_picture(max_pixels), no_library_progress(), progress_bar() as progress:
        bar = progress.add_task("loading the model", total=None)
        embedder = SiglipEmbedder(model, device=device, dtype=dtype, batch_size=batch_size, workers=workers)
        embedded_note(model)()
        found = measure(
            embedder,
            source,
            task=task,
            templates=prompts,
            labels=labels,
            numbered=benchmark is not None and truth is None,
            label_bank=label_bank,
            on_progress=lambda what, done, total: progress.update(bar, description=what, completed=done, total=total),
        )

    if as_json:
        numbers = {} if benchmark is None else {"clip_benchmark": as_clip_benchmark(found)}
        print_json({"source": source.name, "model": embedder.name, **numbers, **found.as_dict()})
    else:
        _print_tables(found, prompts)
    if confusion is not None:
        if found.zero_shot is None:
            raise ValueError(f"--confusion {confusion}: {source.name} has no labels to confuse.")
        draw_confusion(found.zero_shot, confusion)
        print(f"confusion picture: {confusion}", file=sys.stderr)
    return _report_skipped(found)


def _print_tables(found: Evaluation, prompts: tuple[str, ...]) -> None:
    out = console()
    if found.zero_shot is not None:
        _print_accuracy(out, found.zero_shot, prompts)
    if found.retrieval is not None:
        _print_recall(out, found.retrieval)


def _print_accuracy(out: Console, accuracy: ZeroShotAccuracy, prompts: tuple[str, ...]) -> None:
    from rich.markup import escape
    from rich.table import Table

    rows = accuracy.per_class()
    out.print("classes, worst first", style="bold")
    table = Table()
    table.add_column("class", min_width=16)
    for name in ("accuracy", "right", "pictures"):
        table.add_column(name, justify="right")
    table.add_column("most often taken for")
    for row in rows[:_MOST_CLASSES]:
        other = f"{escape(row.confused_with)} ({row.confused})" if row.confused_with else ""
        table.add_row(escape(row.label), f"{row.accuracy:.1%}", str(row.right), str(row.pictures), other)
    out.print(table)
    if len(rows) > _MOST_CLASSES:
        out.print(f"and {len(rows) - _MOST_CLASSES} better classes; --json has them all")
    told = f'"{prompts[0]}"' if len(prompts) == 1 else f"{len(prompts)} templates, averaged"
    sizes = f"{len(accuracy.truth)} pictures, {len(accuracy.labels)} labels"
    out.print(f"zero-shot accuracy: {sizes}, {escape(told)}", style="bold", highlight=False)
    table = Table()
    values = {"top-1": accuracy.top(1)}
    if len(accuracy.labels) > 5:
        values["top-5"] = accuracy.top(5)
    values["mean per class"] = accuracy.mean_per_class
    for name in values:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.1%}" for value in values.values()))
    out.print(table)
    low, high = accuracy.interval(1)
    out.print(f"with 95% confidence, top-1 for pictures of this kind is {low:.1%} to {high:.1%}", highlight=False)


def _print_recall(out: Console, recall: RetrievalRecall) -> None:
    from rich.table import Table

    out.print(f"retrieval: {recall.images} pictures, {recall.texts} captions", style="bold", highlight=False)
    table = Table()
    table.add_column("searched with")
    for k in recall.image_to_text:
        table.add_column(f"recall@{k}", justify="right")
    for name, values in (("pictures", recall.image_to_text), ("captions", recall.text_to_image)):
        table.add_row(name, *(f"{value:.1%}" for value in values.values()))
    out.print(table)


def _report_skipped(found: Evaluation) -> int:
    lines = [f"skipped {line}" for line in found.skipped] + [f"not used: {line}" for line in found.unused]
    for line in lines[:_MOST_LINES]:
        print(line, file=sys.stderr)
    if len(lines) > _MOST_LINES:
        print(f"... and {len(lines) - _MOST_LINES} more; --json has them all", file=sys.stderr)
    if found.skipped:
        print(f"{len(found.skipped)} of {found.pictures + len(found.skipped)} pictures skipped", file=sys.stderr)
    if found.unused:
        print(f"{len(found.unused)} {'entry' if len(found.unused) == 1 else 'entries'} not used", file=sys.stderr)
    return 1 if lines else 0
