"""`siglip-hf app`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from siglip_hf.cli.common import MaxPixels, embedded_note, largest_picture, no_library_progress, progress_bar

if TYPE_CHECKING:
    import gradio


class PageName(StrEnum):
    """The pages there are."""

    search = "search"
    compare = "compare"
    multilingual = "multilingual"


def app(
    page_name: Annotated[PageName, typer.Argument(metavar="search|compare|multilingual", help="The page.")],
    index: Annotated[
        str | None,
        typer.Option(help="search: a folder made by `siglip-hf index`; without it the pictures of the demo."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="compare, multilingual: a checkpoint, or open_clip:MODEL/WEIGHTS; may be given several times. "
            "Without it the embedded one, with no network."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets everyone on your network use the page.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 by default.")] = None,
    max_pixels: MaxPixels = None,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public address too, through the servers of Gradio.")
    ] = False,
) -> int:
    """Try SigLIP on a web page.

    search: find pictures by a drawing, a picture or words.
    compare: models side by side on one picture.
    multilingual: labels in many languages.
    """
    if index is not None and page_name is not PageName.search:
        raise ValueError(f"--index is for the page search, not {page_name.value}.")
    if model and page_name is PageName.search:
        raise ValueError("the page search uses the model that its index was made with; --model is for the others.")
    from siglip_hf.apps import page

    page.import_gradio()  # first, because a model takes its time to load
    signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory(prefix="siglip-hf-") as uploads, largest_picture(max_pixels):
        os.environ["GRADIO_TEMP_DIR"] = uploads  # what people upload goes when the page does
        page.serve(_build(page_name, index, model, device), host, port, share)
    return 0


def _end(number: int, frame: object) -> None:
    """Ends the page on SIGTERM as Ctrl+C does, so that what people uploaded goes with it."""
    sys.exit(128 + number)


def _build(page_name: PageName, index: str | None, model: list[str] | None, device: str | None) -> gradio.Blocks:
    from siglip_hf import default_checkpoint

    with no_library_progress(), progress_bar() as progress:
        if index is None and not model:
            embedded_note(None)()
        if page_name is PageName.search:
            from siglip_hf.apps import search

            task = progress.add_task("", total=None)
            opened = search.open_index(index, device, lambda stage: progress.update(task, description=stage))
            return search.build(opened)
        from siglip_hf.apps import compare, multilingual
        from siglip_hf.apps.scorers import load_scorer

        names = model or [default_checkpoint()]
        task = progress.add_task("loading", total=len(names))
        scorers = []
        for name in names:
            scorers.append(load_scorer(name, device))
            progress.advance(task)
    return compare.build(scorers) if page_name is PageName.compare else multilingual.build(scorers)
