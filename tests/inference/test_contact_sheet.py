"""The contact sheet: sizes, places and colors of what it draws."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from siglip_hf.inference import contact_sheet
from siglip_hf.inference.contact_sheet import Card, draw_contact_sheet


def card(labels=(("cat", 0.5),), size=(60, 60), color="#102030", **options):
    return Card(Image.new("RGB", size, color), "name.png", list(labels), **options)


def pixels(sheet, color):
    """Number of pixels of exactly this color."""
    return int((np.asarray(sheet) == ImageColor.getrgb(color)).all(axis=-1).sum())


def test_bars_are_as_long_as_their_shares():
    for share in (0.0, 0.25, 1.0):
        sheet = draw_contact_sheet([card([("cat", share)])])
        area = contact_sheet._PICTURE * contact_sheet._BAR_HEIGHT
        assert pixels(sheet, contact_sheet._BAR) == round(area * share)
        assert pixels(sheet, contact_sheet._BAR_GROUND) == round(area * (1 - share))


def test_a_known_truth_colors_the_best_label():
    labels = [("cat", 0.5), ("dog", 0.25)]
    area = contact_sheet._PICTURE * contact_sheet._BAR_HEIGHT
    right = draw_contact_sheet([card(labels, truth="cat")])
    assert pixels(right, contact_sheet._RIGHT) == area / 2
    assert pixels(right, contact_sheet._WRONG) == 0
    wrong = draw_contact_sheet([card(labels, truth="dog")])
    assert pixels(wrong, contact_sheet._WRONG) == area / 2
    assert pixels(wrong, contact_sheet._RIGHT) == area / 4


@pytest.mark.parametrize(("size", "drawn"), [((60, 60), 200 * 200), ((400, 100), 200 * 50), ((30, 60), 100 * 200)])
def test_pictures_fill_their_place_and_keep_their_shape(size, drawn):
    assert pixels(draw_contact_sheet([card(size=size)]), "#102030") == drawn


def test_grid():
    one = draw_contact_sheet([card()])
    assert draw_contact_sheet([card()] * 3, columns=3).height == one.height
    assert draw_contact_sheet([card()] * 3, columns=1).width == one.width
    sheet = draw_contact_sheet([card()] * 24)  # 6 columns, 4 rows
    step = contact_sheet._CARD_WIDTH + contact_sheet._GAP
    assert sheet.width == one.width + 5 * step
    assert pixels(sheet, "#102030") == 24 * 200 * 200
    assert draw_contact_sheet([card()], title="24 pictures").height > one.height


def test_long_and_strange_labels_fit():
    labels = [("an extremely long label " * 9, 1.0), ("two\nlines", 0.0), ("猫", 0.0)]
    sheet = draw_contact_sheet([card(labels)])
    assert sheet.width == draw_contact_sheet([card()]).width
    margin = np.asarray(sheet)[:, -contact_sheet._MARGIN + 2 :]
    assert (margin == ImageColor.getrgb(contact_sheet._BACKGROUND)).all()


def test_impossible_sheets_are_refused():
    with pytest.raises(ValueError, match="not 0"):
        draw_contact_sheet([])
    with pytest.raises(ValueError, match="not 1001"):
        draw_contact_sheet([card()] * 1001)
    with pytest.raises(ValueError, match="columns=0"):
        draw_contact_sheet([card()], columns=0)
