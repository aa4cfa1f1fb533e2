"""What the pages share: serving, uploads, the pictures they start with, and the HTML that several of them show."""

from __future__ import annotations

import base64
import errno
import html
import io
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from siglip_hf.extras import missing
from siglip_hf.preprocessing.image_intake import PictureError, load_picture

if TYPE_CHECKING:
    import gradio

MAX_UPLOAD = "20mb"
MAX_PIXELS = 50_000_000
MAX_LABELS = 200

CSS = """
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { flex: 1 1 20rem; max-width: 44rem; border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: .8rem 1rem; }
.card h3 { margin: 0 0 .2rem; overflow-wrap: anywhere; }
.card img { max-width: 100%; margin-top: .6rem; border-radius: 4px; }
.note { color: var(--body-text-color-subdued); font-size: .9em; }
.problem { color: var(--error-text-color); background: var(--error-background-fill); border-radius: 6px;
  border: 1px solid var(--error-border-color); padding: .5rem .8rem; }
.bar { display: grid; grid-template-columns: 9rem 1fr 4.5rem; gap: .6rem; align-items: center; margin: .25rem 0; }
.bar span:first-child { overflow-wrap: anywhere; }
.bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.bar i { display: block; height: .9rem; border-radius: 3px; background: var(--primary-500); min-width: 1px; }
.bar i.pale { height: .35rem; margin-top: 2px; background: var(--neutral-400); }
#gallery .grid-wrap { max-height: none; overflow: hidden; }
#gallery .caption-label { left: 0; right: 0; max-width: 100%; border-radius: 0; }
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
    _, address, public = blocks.launch(
        server_name=host,
        server_port=free_port(host, port),
        share=share,
        max_file_size=MAX_UPLOAD,
        show_error=True,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    print(address, flush=True)
    if public:
        print(public, flush=True)
    if wait:
        blocks.block_thread()
    return address


def free_port(host: str, port: int | None = None) -> int:
    """The port, or the first free one of 7860 to 7959.

    Raises:
        OSError: if it is taken, or the address is none of this machine's.
    """
    taken: OSError | None = None
    for candidate in [port] if port else range(7860, 7960):
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
            return candidate
        except OSError as error:
            taken = error
            if error.errno != errno.EADDRINUSE:
                break
    raise OSError(f"cannot listen on {host}, port {candidate}: {taken}; choose another (--host, --port).") from taken


def upload_box(label: str, **options: Any) -> gradio.Image:
    """A field for a picture, by upload, drop or paste. It hands over the path of the file, unopened.

    gradio would open it before it calls us, and show the words of its exception where the file is broken.
    """
    box = import_gradio().Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], buttons=[], **options
    )
    box.preprocess = lambda payload: payload.path if payload else None
    return box


def read_upload(path: str) -> Image.Image:
    """The picture of an uploaded file, upright, as RGB.

    Raises:
        PictureError: if it cannot be read, or has more than `MAX_PIXELS` pixels; without the path on this machine.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"it has {width} x {height} pixels; at most {MAX_PIXELS / 1e6:.0f} million are taken")
        return load_picture(path)
    except UnidentifiedImageError as error:
        raise PictureError("it is no picture of a known format, such as PNG or JPEG", Path(path).name) from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = error.reason if isinstance(error, PictureError) else str(error)
        raise PictureError(reason.replace(path, "file"), Path(path).name) from error


def demo_folder() -> Path:
    """The folder of the pictures that come with the package."""
    return Path(__file__).parent / "pictures"


def demo_pictures() -> list[str]:
    """The files in it, the one that the pages start with first."""
    return sorted(map(str, demo_folder().glob("*.png")), key=lambda path: (Path(path).stem != "cat", path))


def cache_folder() -> Path:
    """Where a user's programs keep what can be made anew: `$XDG_CACHE_HOME` or `~/.cache`, and there `siglip_hf`."""
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
    """A label with a bar of `value` in 0..1 and the number; `pale` is a second, thinner bar."""
    second = f'<i class="pale" style="width: {pale:.2%}"></i>' if pale is not None else ""
    return (
        f'<div class="bar"><span>{html.escape(label)}</span>'
        f'<span><i style="width: {value:.2%}"></i>{second}</span><span>{value:.1%}</span></div>'
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
