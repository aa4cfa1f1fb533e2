"""`siglip-hf classify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siglip_hf.cli.common import (
    Device,
    LabelBankFolder,
    MaxPixels,
    Model,
    check_sheet,
    console,
    counted,
    embedded_note,
    largest_picture,
    no_library_progress,
    print_json,
    print_some,
    progress_bar,
)

if TYPE_CHECKING:
    from siglip_hf.inference.classify import Classified


# How the scores of a label are printed, in their order.
_FORMATS = {"cosine": ".3f", "logit": ".2f", "sigmoid": ".2%", "softmax": ".1%", "probability": ".1%"}


def classify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Files, folders (with all below), globs, URLs.")],
    labels: Annotated[str | None, typer.Option(help='Labels, as "a cat, a dog".')] = None,
    labels_file: Annotated[Path | None, typer.Option(help="A text file with a label on each line.")] = None,
    model: Model = None,
    onnx: Annotated[
        Path | None, typer.Option(help="A folder made by `siglip-hf export`, run by ONNX Runtime; instead of --model.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option(help="A folder made by `siglip-hf learn`: its classes, and no labels to pass.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Text with {} for the label; given several times, they are averaged.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels shown for each picture.")] = 5,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON array, an object per picture: source, labels (label, cosine, logit, sigmoid, softmax; "
            "best first) or error, and truth where it is known. With --head: labels (label, probability), unknown, "
            "similarity.",
        ),
    ] = False,
    sheet: Annotated[Path | None, typer.Option(help="Draw a contact sheet into this picture file.")] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            help='JSON of right labels, {"a.png": "a cat"}: prints the accuracy; its labels serve for --labels.'
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one forward.")] = 8,
    max_pixels: MaxPixels = None,
    label_bank: LabelBankFolder = None,
    language: Annotated[
        str | None,
        typer.Option(help="Of the labels, for NLLB-CLIP (--model open_clip:...): a code of FLORES-200, like kor_Hang."),
    ] = None,
    device: Device = None,
    fast: Annotated[
        bool, typer.Option(help="On a CPU: packed weights, bfloat16 where the CPU has it; scores rounded to that.")
    ] = True,
) -> int:
    """Say which of some labels fit each picture.

    cosine: the bare similarity. logit: cosine x temperature + bias.
    sigmoid: the probability that the label fits, each on its own. softmax: its share among these labels.
    With --head, the probability of each class that was learned, and "unknown" for what is like none of them.
    """
    from siglip_hf import default_checkpoint
    from siglip_hf.apps.scorers import OPEN_CLIP, OpenClipScorer
    from siglip_hf.data.sources import find_pictures
    from siglip_hf.inference.classify import (
        accuracy,
        classify_files,
        classify_with_head,
        load_classifier,
        read_labels_file,
        read_truth_file,
    )
    from siglip_hf.inference.label_bank import parse_labels, parse_templates
    from siglip_hf.inference.learned import load_head

    if onnx is not None and (
        other := "--model" if model else "--device" if device else "--label-bank" if label_bank else None
    ):
        raise ValueError(f"{other} and --onnx are both given; pass one of them.")
    others = {
        "--model": model,
        "--onnx": onnx,
        "--labels": labels,
        "--labels-file": labels_file,
        "--label-bank": label_bank,
    }
    for name, value in others.items():
        if head is not None and value is not None:
            raise ValueError(f"{name} and --head are both given; a head has its own tower and its own classes.")
    open_clip = model is not None and model.startswith(OPEN_CLIP)
    if language is not None and not open_clip:
        raise ValueError(f"--language {language} is for a model of open_clip (--model open_clip:...); leave it out.")
    if open_clip and label_bank is not None:
        raise ValueError("--label-bank keeps labels of SigLIP models, and --model is one of open_clip; leave it out.")
    if head is not None and template:
        raise ValueError("--template and --head are both given; a head compares with pictures, not with texts.")
    right = read_truth_file(truth) if truth else None
    given = [value for value in (labels, read_labels_file(labels_file) if labels_file else None) if value is not None]
    if len(given) > 1:
        raise ValueError("--labels and --labels-file are both given; pass one of them.")
    if not given and right is None and head is None:
        raise ValueError('no labels: pass --labels "a cat, a dog" or --labels-file FILE.')
    candidates = parse_labels(given[0] if given else (right or {}).values()) if head is None else ()
    templates = parse_templates(template) if template else None
    sources = find_pictures(images)
    if sheet is not None:
        _check_sheet(sheet, sources)

    with largest_picture(max_pixels), no_library_progress(), progress_bar() as progress:
        task = progress.add_task("loading the model", total=None)
        common: dict[str, Any] = {
            "top_k": top,
            "truth": right,
            "batch_size": batch_size,
            "on_progress": lambda done: progress.advance(task, done),
        }
        if head is not None:
            learned = load_head(head, device=device, fast=fast)
            progress.update(task, description="classifying", total=len(sources))
            results = classify_with_head(learned, sources, **common)
        else:
            classifier: Any
            if onnx is not None:
                from siglip_hf.integrations.onnx import onnx_classifier

                classifier = onnx_classifier(onnx)
            elif open_clip:
                classifier = OpenClipScorer(str(model), device, language)
            else:
                classifier = load_classifier(model or default_checkpoint(), device, fast, label_bank)
                embedded_note(model)()
            progress.update(task, description="classifying", total=len(sources))
            results = classify_files(classifier, sources, candidates, templates=templates, **common)

    hits, judged = accuracy(results)
    summary = f"{hits} of {judged} best labels are right ({hits / judged:.1%})" if judged else ""
    if as_json:
        print_json([result.as_dict() for result in results])
    else:
        _print_tables(results)
        if summary:
            print(summary)
    missing: list[str] = []
    if sheet is not None and any(result.labels for result in results):
        missing = draw_sheet(results, sheet, summary)
        print(f"contact sheet: {sheet}", file=sys.stderr)
        print_some([f"not on the sheet: {line}" for line in missing])
    broken = [result for result in results if result.error]
    for result in broken:
        print(f"skipped {result.source}: {result.error}", file=sys.stderr)
    if broken:
        print(f"{len(broken)} of {counted(len(results), 'picture')} skipped", file=sys.stderr)
    return 1 if broken or missing else 0


def _print_tables(results: list[Classified]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    for result in results:
        if not result.labels:
            continue
        title = result.source if result.truth is None else f"{result.source} ({result.truth})"
        if result.unknown:
            title += ": unknown"
        table = Table(title=escape(title), title_justify="left", title_style="bold")
        table.add_column("label", min_width=20)
        for name in [name for name in _FORMATS if name in result.labels[0]]:
            table.add_column(name, justify="right", min_width=8)
        for row in result.labels:
            label = escape(row["label"])
            if row["label"] == result.truth:
                label = f"[green]{label}[/green]"
            table.add_row(label, *(f"{row[name]:{form}}" for name, form in _FORMATS.items() if name in row))
        out.print(table)


def _check_sheet(path: Path, sources: list[str]) -> None:
    from siglip_hf.inference.contact_sheet import MAX_PICTURES

    check_sheet(path, sources)
    if len(sources) > MAX_PICTURES:
        raise ValueError(f"--sheet shows at most {MAX_PICTURES} pictures, not {len(sources)}.")


def draw_sheet(results: list[Classified], path: Path, summary: str) -> list[str]:
    """Draws the pictures that could be read with their three best labels into a file; returns what is gone since."""
    from siglip_hf.inference.contact_sheet import Card, card_picture, save_contact_sheet
    from siglip_hf.preprocessing.image_intake import PictureError

    cards, missing = [], []
    for result in results:
        try:
            picture = card_picture(result.source) if result.labels else None
        except PictureError as error:
            missing.append(f"{result.source}: {error.reason}")
            continue
        if picture is not None:
            labels = [
                (row["label"], row["softmax"] if "softmax" in row else row["probability"]) for row in result.labels[:3]
            ]
            cards.append(Card(picture, result.truth or Path(result.source).name, labels, result.truth))
    if not cards:
        raise ValueError(f"no contact sheet: none of the pictures can be read any more; {missing[0]}")
    save_contact_sheet(cards, path, title=summary or counted(len(cards), "picture"))
    return missing
