"""The page "search": find pictures of an index by a drawing, a picture, words, or several of them at once."""

from __future__ import annotations

import functools
import html
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from siglip_hf._version import __version__
from siglip_hf.apps import page
from siglip_hf.files import sha256
from siglip_hf.preprocessing.image_intake import DRAFT_MARGIN, PictureError, load_picture

if TYPE_CHECKING:
    import gradio

    from siglip_hf.search.query import Hit, SearchIndex

THUMBNAIL = 224  # longest side in pixels
CANVAS = 400  # side of the drawing board in pixels
MOST_RESULTS = 60
MOST_DRAWN = 4_000_000  # pixels of a drawing: the board at 5 times its size on a screen of many pixels

# Gradio's board opens without a tool, so that the first stroke would draw nothing, and loses its tool when it is laid
# out again (a telephone's screen, a turned one). The brush is taken whenever no tool is in hand.
_TAKE_THE_BRUSH = """() => {
  setInterval(() => {
    const tool = (name) => document.querySelector(`#draw button[aria-label=${name}]`);
    const inHand = ["Pan", "Brush", "Erase"].some((name) => tool(name)?.style.color.includes("accent"));
    if (!inHand) tool("Brush")?.click();
  }, 300);
}"""
COLOURS = ["#222222", "#d92b2b", "#f28c28", "#f5c518", "#3a9d3a", "#2b6cd9", "#8b5a2b", "#f49ac1", "#9a9a9a"]
WORDS = ["animal", "fusée", "고양이", "Fahrrad", "flying"]

INTRODUCTION = """
# Search
Finds pictures by what they show. **Draw** on the board, **type** what you look for, or give a **picture**; words and a
picture together are looked for at once. A click on a result finds more like it. Under each result: the cosine to what
was asked (at most 1), and for words the probability that they fit.
"""


class Picture(NamedTuple):
    """A picture that is asked for, and what to call it."""

    image: Image.Image
    name: str


class Found(NamedTuple):
    """What a query gave: the hits, and what the page says about them, as HTML."""

    hits: list[Hit]
    status: str


def open_index(
    path: str | os.PathLike[str] | None = None,
    device: str | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> SearchIndex:
    """An index with its model loaded.

    Args:
        path: an index as `SearchIndex.open` takes it; if None, one of the demo's pictures, which is built in the user's
            cache folder the first time.
        device: where the model runs.
        on_progress: called with a word for each stage of the work.

    Raises:
        FileNotFoundError: if there is no such index.
        ValueError: if it is damaged, or its model cannot be loaded.
    """
    from siglip_hf.search.query import SearchIndex

    on_progress("opening the index")
    index = SearchIndex.open(demo_index(on_progress) if path is None else path, device=device)
    on_progress("loading the model")
    index.embedder  # noqa: B018 - a model that is missing should be known before the page is served
    return index


def demo_index(on_progress: Callable[[str], None] = lambda stage: None) -> str:
    """The folder of an index of the demo's pictures, built if it is not there."""
    from siglip_hf.loading import default_checkpoint
    from siglip_hf.search.index import IndexFolder
    from siglip_hf.search.sources_to_index import index_source

    # An index holds absolute paths and belongs to one model: another version or place of the package needs its own.
    key = sha256([f"{__version__} {page.demo_folder()} {default_checkpoint()}".encode()])[:12]
    out = page.cache_folder() / f"demo-{key}.idx"
    try:
        IndexFolder(out)
    except (OSError, ValueError):  # not there, or damaged
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            index_source(
                [str(page.demo_folder())],
                out,
                embeddings=os.path.join(folder, "embeddings"),
                overwrite=True,
                on_embedded=lambda done, total: on_progress(f"building the demo's index: {done} of {total} pictures"),
                on_stage=lambda stage: on_progress(f"building the demo's index: {stage}"),
            )
    return str(out)


def find(
    index: SearchIndex,
    picture: Picture | None = None,
    text: str | None = None,
    not_text: str | None = None,
    pattern: str | None = None,
    count: int = 12,
) -> Found:
    """Asks the index; mistakes and broken files become a message.

    Args:
        index: the index.
        picture: a picture that results should be like.
        text: what they should show.
        not_text: what they should not show.
        pattern: only rows whose path or id matches it, with `*` and `?`.
        count: how many results.
    """
    try:
        text, not_text = (page.limited(value, "the words", page.MAX_QUERY).strip() for value in (text, not_text))
        pattern = page.limited(pattern, "the pattern of paths", page.MAX_PATTERN).strip()
        count = min(max(int(count), 1), MOST_RESULTS)
    except (ValueError, TypeError) as error:
        return Found([], page.problem(error))
    if picture is None and not text:
        return Found([], _status(f"{len(index):,} entries. Draw, type, or give a picture to look for."))
    start = time.perf_counter()
    try:
        hits = index.search(
            text or None, picture and picture.image, not_text or None, k=count, path_filter=pattern or None
        )
    except (ValueError, OSError) as error:
        return Found([], page.problem(error))
    asked = " and ".join([*([repr(text)] if text else []), *([picture.name] if picture else [])])
    asked += f", not {not_text!r}" if not_text else ""
    asked += f", in {pattern}" if pattern else ""
    if not hits:
        return Found([], page.problem(f"Nothing found for {asked}."))
    seconds = time.perf_counter() - start
    status = _status(f"{len(hits)} of {len(index):,} for {asked}, in {seconds * 1000:.0f} ms, the best first")
    # An index of texts has no pictures to show.
    status += "".join(page.bar(hit.text or hit.id, _score(hit)) for hit in hits if hit.path is None)
    return Found(hits, status)


def _status(text: str) -> str:
    return f'<p class="status">{html.escape(text)}</p>'


def _score(hit: Hit) -> float:
    return max(0.0, hit.cosine) if hit.probability is None else hit.probability


def gallery_items(hits: Sequence[Hit]) -> list[tuple[Image.Image, str]]:
    """Small pictures with cosine, probability if there is one, and name, as gradio's gallery shows them."""
    items = []
    for hit in hits:
        if hit.path is not None:
            fits = "" if hit.probability is None else f" ({hit.probability:.1%})"
            items.append((_thumbnail(hit.path), f"{hit.cosine:.3f}{fits} {os.path.basename(hit.id)}"))
    return items


@functools.lru_cache(maxsize=1024)
def _thumbnail(path: str) -> Image.Image:
    """The picture of a row, small; a grey one where it cannot be read any more."""
    try:
        return read_hit(path, THUMBNAIL)
    except PictureError:
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#999999")


def read_hit(path: str, side: int = page.MAX_SIDE) -> Image.Image:
    """The picture of a row, no larger than `side`; visitors share the budget of decoded pixels, as in `read_upload`.

    Raises:
        PictureError: if it cannot be read any more.
    """
    from siglip_hf.data.store import picture_at

    try:
        # A very large one is reduced to little more than `side`, so that it never lies in memory twice.
        draft_to = -(-side // DRAFT_MARGIN)
        return page.small_picture(lambda: load_picture(picture_at(path), draft_to=draft_to), side)
    except OSError as error:
        raise PictureError(getattr(error, "reason", None) or str(error), os.path.basename(path)) from error


class _Boards(dict[str, Any]):
    """What browsers have sent of their boards and the page has not read yet, by gradio's ids: the last `MOST` of them.

    gradio would keep all forever, with every layer, and decode them, however many pixels they have.
    """

    MOST = 32

    def __setitem__(self, key: str, board: Any) -> None:
        board.background, board.layers = None, []
        super().__setitem__(key, board)
        for old in list(self)[: -self.MOST]:
            self.pop(old, None)

    def take(self, value: Any) -> bytes | str | None:
        """The file of a board, undecoded, given what an event says of it; it is kept no longer.

        The browser sends an id of what it put here, or, for an event that follows closely, the path of an upload.
        """
        if value is None:
            return None
        if value.id:
            board = self.pop(value.id, None)
            return board.composite if board else None
        return value.composite.path if value.composite else None


def read_drawing(file: bytes | str | None) -> Picture | None:
    """What was drawn, or None if the board is empty.

    Args:
        file: the picture of the board as the browser sends it, or the path of it.

    Raises:
        PictureError: if it is no picture, or larger than a board can be.
    """
    drawn = page.read_upload(file, MOST_DRAWN) if file else None
    extrema: Any = drawn.getextrema() if drawn else ()  # a pair for each channel
    if drawn is None or all(low == 255 for low, _ in extrema):
        return None
    return Picture(drawn, "your drawing")


def build(index: SearchIndex) -> gradio.Blocks:
    """The page.

    Args:
        index: what is searched.
    """
    gr = page.import_gradio()

    def show(picture: Picture | None, *options: Any) -> tuple[Any, ...]:
        found = find(index, picture, *options)
        return picture, found.hits, found.status, gallery_items(found.hits)

    def by_file(read: Callable[[], Picture | None], *options: Any) -> tuple[Any, ...]:
        try:
            picture = read()
        except PictureError as error:
            return None, [], page.problem(error), []
        return show(picture, *options)

    def by_drawing(file: bytes | str | None, *options: Any) -> tuple[Any, ...]:
        return by_file(lambda: read_drawing(file), *options)

    def by_upload(path: str | None, *options: Any) -> tuple[Any, ...]:
        return by_file(lambda: Picture(page.read_upload(path), os.path.basename(path)) if path else None, *options)

    def by_result(event: Any, hits: list[Any], *options: Any) -> tuple[Any, ...]:
        try:
            hit = [hit for hit in hits if hit.path is not None][event.index]
        except (IndexError, TypeError):
            return None, hits, page.problem("This result is gone; search again."), gallery_items(hits)
        try:
            picture = Picture(read_hit(hit.path), os.path.basename(hit.id))
        except PictureError as error:
            return None, hits, page.problem(error), gallery_items(hits)
        return show(picture, *options)

    # By this annotation gradio finds out that the event is wanted. It evaluates them all, so they must be real names.
    by_result.__annotations__["event"] = gr.SelectData

    with gr.Blocks(title="siglip-hf: search", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION)
        gr.HTML(page.model_line([index.origin.model]))
        asked, hits = gr.State(None), gr.State([])
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                text = gr.Textbox(label="Words", elem_id="words", placeholder="a red car", max_length=page.MAX_QUERY)
                gr.Examples([[words] for words in WORDS], [text])
                with gr.Tab("Draw"):
                    drawing = gr.Sketchpad(
                        label="Drawing",
                        type="pil",
                        image_mode="RGB",
                        canvas_size=(CANVAS, CANVAS),
                        fixed_canvas=True,
                        layers=False,
                        transforms=(),
                        buttons=[],
                        brush=gr.Brush(default_size=8, colors=COLOURS, color_mode="defaults"),
                        height=CANVAS + 80,
                        elem_id="draw",
                    )
                    drawing.blob_storage = _Boards()
                    drawing.preprocess = lambda board: drawing.blob_storage.take(board)
                with gr.Tab("Picture"):
                    upload = page.upload_box("Picture", elem_id="picture", height=CANVAS)
                    gr.Examples([[path] for path in page.demo_pictures()], [upload], examples_per_page=24)
                with gr.Accordion("Filters", open=False):
                    not_text = gr.Textbox(
                        label="Without", elem_id="without", placeholder="people", max_length=page.MAX_QUERY
                    )
                    pattern = gr.Textbox(
                        label="Only paths like",
                        elem_id="pattern",
                        placeholder="*/holidays/*.jpg",
                        max_length=page.MAX_PATTERN,
                    )
                    count = gr.Slider(1, MOST_RESULTS, value=12, step=1, label="Results", elem_id="count")
                clear = gr.Button("Start over", elem_id="clear")
            with gr.Column(scale=2, min_width=280):
                status = gr.HTML(elem_id="results")
                gallery = gr.Gallery(
                    show_label=False,
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="gallery",
                )
        options = [text, not_text, pattern, count]
        outputs = [asked, hits, status, gallery]
        live: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
        drawing.change(by_drawing, [drawing, *options], outputs, **live)
        upload.change(by_upload, [upload, *options], outputs, **live)
        gallery.select(by_result, [hits, *options], outputs, **live)
        changes = [text.change, not_text.change, pattern.submit, pattern.blur, count.release, blocks.load]
        gr.on(changes, show, [asked, *options], outputs, **live)
        blocks.load(None, js=_TAKE_THE_BRUSH)
        clear.click(
            lambda: (None, None, "", "", "", *show(None)),
            None,
            [drawing, upload, text, not_text, pattern, *outputs],
            show_progress="hidden",
        )
    return blocks
