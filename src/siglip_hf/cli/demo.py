"""`siglip-hf demo`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from siglip_hf.cli.common import check_sheet, console, no_library_progress, progress_bar

if TYPE_CHECKING:
    from siglip_hf.inference.classify import Classified

QUERIES = ("an animal", "une fusée", "악기")  # the second and third: a rocket, a musical instrument
_TOP = 3

_NEXT = """
The embedded checkpoint knows drawings. Next:
  siglip-hf classify photos/ --labels "cat, dog" --model google/siglip2-base-patch16-224
  siglip-hf app compare
  siglip-hf index photos/ --out photos.idx --model google/siglip2-base-patch16-224"""


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The contact sheet, a picture file.")] = Path(
        "siglip-hf-demo.png"
    ),
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Copy the pictures into this new folder too, to try other commands on."),
    ] = None,
) -> int:
    """Label and search the pictures that come with the package, and draw them with their labels on a sheet.

    They are of a style that the embedded checkpoint has never seen. No network, no file but the sheet and the copies.
    """
    from siglip_hf import default_checkpoint
    from siglip_hf.apps.page import demo_folder, demo_pictures
    from siglip_hf.cli.classify import draw_sheet
    from siglip_hf.inference.classify import accuracy, classify_files, load_classifier, read_truth_file

    files = sorted(demo_pictures())
    check_sheet(out, files, "--out")
    if pictures is not None:
        if pictures.exists():
            raise ValueError(f"--pictures {pictures}: it is there already; name a new folder")
        shutil.copytree(demo_folder(), pictures)
    truth = read_truth_file(demo_folder() / "labels.json")
    with no_library_progress(), progress_bar() as progress:
        task = progress.add_task("loading the model", total=None)
        classifier = load_classifier(default_checkpoint(), fast=True)
        progress.update(task, description="classifying", total=len(files))
        results = classify_files(
            classifier,
            files,
            truth.values(),
            truth=truth,
            top_k=_TOP,
            on_progress=lambda done: progress.advance(task, done),
        )
        answers = _search(files)
    hits, judged = accuracy(results)
    verdict = f"{hits} of {judged} best labels are right ({hits / judged:.1%}), with the default template"
    _print_table(results)
    print(f"{verdict}; shares are softmax, in bfloat16 where the CPU has it")
    print("\nSearch by words:")
    for query, names in answers.items():
        print(f"  {query}: {', '.join(names)}")
    draw_sheet(results, out, verdict)
    print(f"\ncontact sheet: {out}")
    if pictures is not None:
        print(f"pictures: {pictures}")
    print(_NEXT)
    return 0


def _search(files: list[str]) -> dict[str, list[str]]:
    """The names of the pictures that fit each query best."""
    from siglip_hf.data.embedder import SiglipEmbedder

    embedder = SiglipEmbedder()
    cosines = embedder.embed_texts(QUERIES) @ embedder.embed_images(files).T  # (queries, pictures)
    return {
        query: [Path(files[i]).name for i in (-row).argsort()[:_TOP]]
        for query, row in zip(QUERIES, cosines, strict=True)
    }


def _print_table(results: list[Classified]) -> None:
    """A row for each picture: its right label, and the best ones with their shares."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("picture", "right label", "best", "second", "third"):
        table.add_column(name)
    for result in results:
        cells = []
        for row in result.labels:
            cell = f"{escape(row['label'])} {row['softmax']:.0%}"
            cells.append(f"[green]{cell}[/green]" if row["label"] == result.truth else cell)
        table.add_row(escape(Path(result.source).name), escape(result.truth or ""), *cells)
    console().print(table)
