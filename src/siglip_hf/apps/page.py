"""What the pages share: serving, uploads, the pictures they start with, and the HTML that several of them show."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from siglip_hf.apps.gate import Gate
from siglip_hf.extras import missing
from siglip_hf.loading import default_checkpoint
from siglip_hf.parallel import PIXELS
from siglip_hf.preprocessing.image_intake import PictureError, load_picture

if TYPE_CHECKING:
    import gradio

MAX_UPLOAD = "20mb"
MAX_PIXELS = 50_000_000
#: Longest side, in pixels, of what is kept of a picture; models take far smaller ones.
MAX_SIDE = 2048
MAX_LABELS = 200
#: Characters in a field of labels, a template, a query, and a pattern of paths.
MAX_LABELS_TEXT, MAX_TEMPLATE, MAX_QUERY, MAX_PATTERN = 10_000, 500, 2000, 500
#: Threads that decode pictures, for all visitors. The C library keeps up to 64 MB for each thread that has done so, and
#: gradio answers in up to 40.
DECODERS = 2
_DECODERS = ThreadPoolExecutor(DECODERS, "siglip-decode")

CSS = """
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { flex: 1 1 20rem; max-width: 44rem; border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: .8rem 1rem; }
.card h3 { margin: 0 0 .2rem; overflow-wrap: anywhere; }
.card img { max-width: 100%; margin-top: .6rem; border-radius: 4px; }
.note { color: var(--body-text-color); opacity: .75; font-size: .9em; }
.problem { color: var(--error-text-color); background: var(--error-background-fill); border-radius: 6px;
  border: 1px solid var(--error-border-color); padding: .5rem .8rem; }
.bar { display: grid; grid-template-columns: 9rem 1fr 4.5rem; gap: .6rem; align-items: center; margin: .25rem 0; }
.bar span:first-child { overflow-wrap: anywhere; }
.bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.bar i { display: block; height: .9rem; border-radius: 3px; background: var(--primary-500); min-width: 1px; }
.bar i.pale { height: .35rem; margin-top: 2px; background: var(--neutral-400); }
.bar small { display: block; opacity: .75; }
.status { font-size: 1rem; margin: 0; }
#gallery .grid-wrap { max-height: none; overflow: visible; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); grid-auto-rows: auto;
  height: auto; }
#gallery .thumbnail-item { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; overflow: visible; }
#gallery .thumbnail-item img { width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; background: #fff; }
#gallery .caption-label { position: static; max-width: 100%; border: 0; border-radius: 0; background: none;
  white-space: normal; overflow: visible; overflow-wrap: anywhere; text-align: left; font-size: .85rem;
  padding: .3rem .4rem; }
.results { overflow-x: auto; }
.scores { border-collapse: collapse; width: 100%; }
.scores th, .scores td { padding: .3rem .5rem; text-align: left; border: 1px solid var(--border-color-primary); }
.scores small { display: block; font-variant-numeric: tabular-nums; opacity: .8; }
.scores td.best { font-weight: bold; outline: 2px solid var(--primary-600); outline-offset: -2px; }
"""


def import_gradio() -> Any:
    """gradio, told not to report its use to anyone.

    Raises:
        ImportError: if it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise missing("the pages need gradio", "apps") from error
    return gradio


def serve(
    blocks: gradio.Blocks, host: str = "127.0.0.1", port: int | None = None, share: bool = False, wait: bool = True
) -> str:
    """Serves a page until it is interrupted.

    Args:
        blocks: the page.
        host: address to listen on; the default is reached from this machine only.
        port: the first free one from 7860 on if None.
        share: whether to make a public address through gradio's servers.
        wait: if False, returns at once, and the page lives as long as the process or until `blocks.close()`.

    Returns:
        The local address.

    Raises:
        OSError: if the port is taken or the address is none of this machine's.
    """
    gr = import_gradio()
    from starlette.middleware import Middleware

    try:
        _, address, public = blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            max_file_size=MAX_UPLOAD,
            show_error=False,  # the words of an exception name files of this machine; ours are part of the page
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Gate)], "openapi_url": None},
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
        )
    except OSError as error:
        ports = f"port {port}" if port else "ports 7860 to 7959"
        raise OSError(f"cannot listen on {host}, {ports}: taken or not this machine's; see --host, --port.") from error
    print(address, flush=True)
    if public:
        print(public, flush=True)
    if wait:
        blocks.block_thread()
    return address


def upload_box(label: str, **options: Any) -> gradio.Image:
    """A field for a picture, by upload, drop or paste. It hands over the path of the file, unopened.

    gradio would open it before it calls us, and show the words of its exception where the file is broken.
    """
    box = import_gradio().Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], buttons=[], **options
    )
    box.preprocess = lambda payload: payload.path if payload else None
    return box


def limited(text: Any, what: str, most: int) -> str:
    """A text that a visitor sent; the browser's own limits are none for a program.

    Raises:
        ValueError: if it is no text, or has more than `most` characters.
    """
    if not isinstance(text or "", str):
        raise ValueError(f"{what} must be a text.")
    if len(text or "") > most:
        raise ValueError(f"{what}: {len(text):,} characters are too many; at most {most:,} are taken.")
    return text or ""


def model_line(names: Sequence[str]) -> str:
    """Which checkpoints a page runs, and what the embedded one is good for."""
    shown = ", ".join(
        name if name.startswith("open_clip:") else Path(name).name if Path(name).exists() else name for name in names
    )
    embedded = default_checkpoint() in map(str, names)
    good_for = "; this is the embedded checkpoint, which knows drawings, not photographs" if embedded else ""
    return note(f"{'Model' if len(names) == 1 else 'Models'}: {shown}{good_for}.")


def read_upload(file: str | bytes, most: int = MAX_PIXELS) -> Image.Image:
    """The picture of an uploaded file (its path or content), upright, as RGB, no larger than `MAX_SIDE`.

    Visitors share the budget of decoded pixels, so that many large uploads at once wait for each other.

    Raises:
        PictureError: if it cannot be read, or has more than `most` pixels; without the path on this machine.
    """
    name = "the drawing" if isinstance(file, bytes) else Path(file).name
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            width, height = image.size
        if width * height > most:
            raise ValueError(f"it has {width} x {height} pixels; at most {most / 1e6:.0f} million are taken")
        return small_picture(lambda: load_picture(file), MAX_SIDE)
    except UnidentifiedImageError as error:
        raise PictureError("it is no picture of a known format, such as PNG or JPEG", name) from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = error.reason if isinstance(error, PictureError) else str(error)
        raise PictureError(reason if isinstance(file, bytes) else reason.replace(file, "file"), name) from error


def small_picture(load: Callable[[], Image.Image], side: int) -> Image.Image:
    """What `load` gives, no larger than `side`; in one of the threads that decode, within the budget of pixels."""

    def decode() -> Image.Image:
        with PIXELS.bounded():
            picture = load()
            picture.thumbnail((side, side))
            return picture

    return _DECODERS.submit(decode).result()


def demo_folder() -> Path:
    """The folder of the pictures that come with the package."""
    return Path(__file__).parent / "pictures"


def demo_pictures() -> list[str]:
    """The files in it, the one that the pages start with first."""
    return sorted(map(str, demo_folder().glob("*.png")), key=lambda path: (Path(path).stem != "cat", path))


def cache_folder() -> Path:
    """Where a user's programs keep what can be rebuilt: `$XDG_CACHE_HOME` or `~/.cache`, and there `siglip_hf`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "siglip_hf"


def short_count(number: int) -> str:
    """A count of parameters in a few characters, such as "7.0 M"."""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def problem(error: Exception | str) -> str:
    """A message in place of results."""
    return f'<p class="problem" role="alert">{html.escape(str(error))}</p>'


def note(text: str) -> str:
    """A line of small print."""
    return f'<p class="note">{html.escape(text)}</p>'


def bar(label: str, value: float, pale: float | None = None) -> str:
    """A label with a bar of `value` in 0..1 and the number; `pale` is a second, thinner bar with its number."""
    second = f'<i class="pale" style="width: {pale:.2%}"></i>' if pale is not None else ""
    number = f"<small>{pale:.1%}</small>" if pale is not None else ""
    return (
        f'<div class="bar"><span>{html.escape(label)}</span>'
        f'<span><i style="width: {value:.2%}"></i>{second}</span><span>{value:.1%}{number}</span></div>'
    )


def score_table(corner: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, float, bool]]]]) -> str:
    """A table of texts with scores in 0..1, the darker the higher.

    Args:
        corner: what the first column holds.
        head: titles of the other columns.
        rows: title, and (text, score, whether it is the best) for each column.
    """
    lines = ["".join(f"<th>{html.escape(title)}</th>" for title in (corner, *head))]
    for title, cells in rows:
        line = f"<th>{html.escape(title)}</th>"
        for text, score, best in cells:
            shade = f"background: rgba(249, 115, 22, {0.05 + 0.6 * score:.2f})"
            line += (
                f'<td style="{shade}"{" class=best" if best else ""}>{html.escape(text)}<small>{score:.1%}</small></td>'
            )
        lines.append(line)
    return '<table class="scores">' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def inline_picture(picture: Image.Image, description: str) -> str:
    """An image element that holds the picture itself."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
