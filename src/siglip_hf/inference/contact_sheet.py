"""A contact sheet: pictures in a grid, each above its best labels and a bar for the share of every one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from siglip_hf.files import new_file
from siglip_hf.parallel import PIXELS
from siglip_hf.preprocessing.image_intake import load_picture

#: More pictures than this make an image that few programs open.
MAX_PICTURES = 1000

_BACKGROUND, _CARD, _FRAME = "#eef0f3", "#ffffff", "#d5d9e0"
_TEXT, _FAINT_TEXT = "#1c2330", "#6b7485"
_BAR, _BAR_GROUND, _RIGHT, _WRONG = "#8fa8d8", "#e7eaf0", "#2e9e62", "#d0503f"

_MARGIN, _GAP, _PADDING = 24, 16, 14
_PICTURE = 200
_CARD_WIDTH = _PICTURE + 2 * _PADDING
_CAPTION_HEIGHT, _ROW_HEIGHT, _BAR_HEIGHT = 24, 34, 8
_TITLE_SIZE, _LABEL_SIZE, _CAPTION_SIZE = 22, 14, 12


@dataclass
class Card:
    """One picture of the sheet.

    Attributes:
        picture: any size, mode RGB.
        caption: a line under it, such as its name.
        labels: (label, share in 0..1), best first.
        truth: its right label if known; then the best label's bar is green or red.
    """

    picture: Image.Image
    caption: str
    labels: Sequence[tuple[str, float]]
    truth: str | None = None


def card_picture(source: Any) -> Image.Image:
    """The picture of a card, no larger than it is drawn.

    Raises:
        PictureError: if it cannot be read.
    """
    with PIXELS.bounded():
        return _fitted(load_picture(source, draft_to=2 * _PICTURE))


def save_contact_sheet(cards: Sequence[Card], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draws the sheet into a file, in the format of its ending; whole or not at all.

    Raises:
        ValueError: see `draw_contact_sheet`.
        OSError: if it cannot be written.
    """
    sheet = draw_contact_sheet(cards, title=title)
    with new_file(path) as partial:
        sheet.save(partial, format=Image.registered_extensions()[os.path.splitext(path)[1].lower()])


def draw_contact_sheet(cards: Sequence[Card], *, title: str = "", columns: int | None = None) -> Image.Image:
    """Draws the sheet.

    Args:
        cards: what it shows, row by row.
        title: a line at the top.
        columns: cards in a row; about 3 columns for 2 rows unless given.

    Returns:
        An RGB image, as large as it needs to be.

    Raises:
        ValueError: for no pictures, more than `MAX_PICTURES`, or no columns.
    """
    if not 0 < len(cards) <= MAX_PICTURES:
        raise ValueError(f"a contact sheet shows 1 to {MAX_PICTURES} pictures, not {len(cards)}.")
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns} must be at least 1.")
    columns = min(len(cards), columns or math.ceil(math.sqrt(1.5 * len(cards))))
    rows = math.ceil(len(cards) / columns)
    labels_each = max(len(card.labels) for card in cards)
    card_height = 2 * _PADDING + _PICTURE + _CAPTION_HEIGHT + _ROW_HEIGHT * labels_each
    top = _MARGIN + (_TITLE_SIZE + _GAP if title else 0)
    width = 2 * _MARGIN + columns * _CARD_WIDTH + (columns - 1) * _GAP
    height = top + rows * (card_height + _GAP) - _GAP + _MARGIN

    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        font = ImageFont.load_default(_TITLE_SIZE)
        title = _shortened(title, font, width - 2 * _MARGIN)
        draw.text((_MARGIN, _MARGIN), title, fill=_TEXT, font=font, anchor="lt")
    for i, card in enumerate(cards):
        x = _MARGIN + i % columns * (_CARD_WIDTH + _GAP)
        y = top + i // columns * (card_height + _GAP)
        draw.rounded_rectangle((x, y, x + _CARD_WIDTH, y + card_height), radius=8, fill=_CARD, outline=_FRAME)
        _draw_card(sheet, draw, card, x + _PADDING, y + _PADDING)
    return sheet


def _draw_card(sheet: Image.Image, draw: ImageDraw.ImageDraw, card: Card, x: int, y: int) -> None:
    small, normal = ImageFont.load_default(_CAPTION_SIZE), ImageFont.load_default(_LABEL_SIZE)
    picture = _fitted(card.picture)
    sheet.paste(picture, (x + (_PICTURE - picture.width) // 2, y + (_PICTURE - picture.height) // 2))
    y += _PICTURE + _CAPTION_HEIGHT // 2
    draw.text((x, y), _shortened(card.caption, small, _PICTURE), fill=_FAINT_TEXT, font=small, anchor="lm")
    y += _CAPTION_HEIGHT // 2
    for i, (label, share) in enumerate(card.labels):
        percent = f"{share:.0%}"
        room = _PICTURE - normal.getlength(percent) - _GAP
        middle = y + (_ROW_HEIGHT - _BAR_HEIGHT) // 2
        draw.text((x, middle), _shortened(label, normal, room), fill=_TEXT, font=normal, anchor="lm")
        draw.text((x + _PICTURE, middle), percent, fill=_FAINT_TEXT, font=normal, anchor="rm")
        bar = y + _ROW_HEIGHT - _BAR_HEIGHT
        color = _BAR
        if card.truth is not None and (i == 0 or label == card.truth):
            color = _RIGHT if label == card.truth else _WRONG
        draw.rectangle((x, bar, x + _PICTURE - 1, bar + _BAR_HEIGHT - 1), fill=_BAR_GROUND)
        filled = round(_PICTURE * min(max(share, 0.0), 1.0))
        if filled:
            draw.rectangle((x, bar, x + filled - 1, bar + _BAR_HEIGHT - 1), fill=color)
        y += _ROW_HEIGHT


def _fitted(picture: Image.Image) -> Image.Image:
    return ImageOps.contain(picture, (_PICTURE, _PICTURE), Image.Resampling.LANCZOS)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: float) -> str:
    """The text on one line, cut with an ellipsis where it is wider than the room."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…"
