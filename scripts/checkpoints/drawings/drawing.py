"""SVG text of a package's drawings, rendered to premultiplied squares."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .concepts import NameMatcher, bare_code
from .sources import read_json

PICTURE_SIZE = 72  # a little larger than the model's 64 px, so that augmentation has pixels to sample from


def _svg(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    """An icon of an iconify package as a whole SVG."""
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}"'
    return f'{opening} width="{width}" height="{height}" color="#202020">{icon["body"]}</svg>'


def icon_svgs(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, SVG text) of each drawing of an iconify package that is not hidden."""
    icons = read_json(folder / "icons.json")
    for name, icon in icons["icons"].items():
        if not icon.get("hidden"):
            yield name, _svg(icons, icon)


def emoji_svgs(folder: Path, matcher: NameMatcher) -> Iterator[tuple[str, str]]:
    """Yield (concept code, SVG text) of an iconify package of emoji, each picture once."""
    icons = read_json(folder / "icons.json")
    by_code = {name: bare_code(code) for code, name in read_json(folder / "chars.json").items()}
    aliases: dict[str, list[str]] = defaultdict(list)
    for name, alias in icons.get("aliases", {}).items():
        if set(alias) == {"parent"}:  # an alias that also rotates or flips is another picture
            aliases[alias["parent"]].append(name)
    for name, icon in icons["icons"].items():
        # A skin tone's name or code is in no table, so that toned variants drop out here.
        names = [name, *sorted(aliases[name])]
        codes = [by_code[n] for n in names if by_code.get(n) in matcher.codes] + [
            c for n in names if (c := matcher.find(n))
        ]
        if codes:
            yield codes[0], _svg(icons, icon)


def render(svg: str, size: int) -> Image.Image | None:
    """Render SVG text to an RGBA picture `size` pixels wide; None where nothing of it can be seen.

    Raises:
        RuntimeError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise RuntimeError('resvg-py is not installed: pip install "siglip-hf[data]"') from error
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    return picture if picture.getchannel("A").getextrema()[1] > 0 else None


def packed_pictures(folder: Path, matcher: NameMatcher) -> Iterator[tuple[str, Image.Image]]:
    """Yield (concept code, RGBA picture) of a package that holds pictures named by code point."""
    for path in sorted((folder / "assets").glob("*.webp")):
        if bare_code(path.stem) in matcher.codes:
            with Image.open(path) as picture:
                yield bare_code(path.stem), picture.convert("RGBA")


def premultiplied(picture: Image.Image, size: int) -> np.ndarray:
    """Fit a picture in a transparent square: (4, size, size) uint8, colours multiplied by alpha ("RGBa").

    With premultiplied colours, resizing and warping need no care at transparent edges, and a background is one
    addition.
    """
    picture = picture.convert("RGBa")
    scale = size / max(picture.size)
    picture = picture.resize(
        [max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC, reducing_gap=3.0
    )
    square = np.zeros((size, size, 4), dtype=np.uint8)
    left, top = (size - picture.width) // 2, (size - picture.height) // 2
    square[top : top + picture.height, left : left + picture.width] = np.asarray(picture)
    return square.transpose(2, 0, 1)
