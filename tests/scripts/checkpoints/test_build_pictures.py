"""The data of the checkpoints: families, the held-out split, names, licences, pictures as premultiplied squares."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from drawings import concepts, sources
from drawings.concepts import NameMatcher
from drawings.drawing import icon_svgs, premultiplied


def test_gendered_and_directed_variants_are_one_family():
    running = ["1f3c3", "1f3c3-200d-2640", "1f3c3-200d-2642", "1f3c3-200d-2640-200d-27a1"]
    assert {concepts.family_of(code) for code in running} == {"1f3c3"}
    assert [concepts.is_gendered(code) for code in running] == [False, True, True, True]
    coders = ["1f468-200d-1f4bb", "1f469-200d-1f4bb", "1f9d1-200d-1f4bb"]
    assert {concepts.family_of(code) for code in coders} == {"1f9d1-1f4bb"}
    assert [concepts.is_gendered(code) for code in coders] == [True, True, False]
    assert concepts.bare_code("2764-FE0F-200D-1F525") == "2764-200d-1f525"


def test_held_out_families_do_not_depend_on_order_and_hardly_on_additions():
    families = [f"{number:x}" for number in range(0x1F300, 0x1F300 + 500)]
    held_out = concepts.hold_out(families)
    assert len(held_out) == 50
    assert concepts.hold_out(reversed(families)) == held_out
    assert len(concepts.hold_out([*families, "one more"]) ^ held_out) <= 1


def test_names_are_matched_only_where_they_mean_one_concept():
    known = [
        {"code": "a", "label": "flag: Japan", "aliases": ["crossed"]},
        {"code": "b", "label": "clinking glasses", "aliases": ["crossed", "toast"]},
        {"code": "c", "label": "Mrs. Claus", "aliases": []},
    ]
    matcher = NameMatcher(known)
    names = ["flag-for-japan", "clinking-glasses-3", "toast", "mrsclaus", "crossed", "clinking-glasses-dark-skin-tone"]
    assert [matcher.find(name) for name in names] == ["a", "b", "b", "c", None, None]


def test_picture_becomes_a_premultiplied_square():
    picture = Image.new("RGBA", (40, 20), (200, 100, 0, 128))
    square = premultiplied(picture, 20)
    assert square.shape == (4, 20, 20)
    assert square.dtype == np.uint8
    np.testing.assert_array_equal(square[:, 10, 10], [100, 50, 0, 128])
    assert square[:, :5].max() == square[:, 15:].max() == 0


def test_package_with_another_licence_is_refused(tmp_path):
    folder = tmp_path / "@scope__art@1.0.0"
    folder.mkdir()
    sources.write_json(folder / "package.json", {"license": "CC-BY-NC-4.0"})
    with pytest.raises(RuntimeError, match=r"@scope/art@1\.0\.0 states the licence \['CC-BY-NC-4\.0'\], expected MIT"):
        sources.fetch("@scope/art", "1.0.0", "MIT", tmp_path)


def test_missing_npm_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="npm is not installed"):
        sources.fetch("anything", "1.0.0", "MIT", tmp_path)


def test_sources_for_evaluation_are_the_promised_ones():
    held_out = {source.name: source.licence for source in sources.SOURCES if source.use == "evaluate"}
    assert held_out == {"fxemoji": "Apache-2.0", "openmoji": "CC-BY-SA-4.0"}


def test_everything_trained_on_asks_for_attribution_at_most():
    trained = [source for source in sources.SOURCES if source.use == "train"]
    assert len(trained) > 25
    assert {source.licence for source in trained} <= set(sources.TRAINABLE)
    assert not [licence for licence in sources.TRAINABLE if "SA" in licence or "NC" in licence or "GPL" in licence]
    assert len({source.name for source in sources.SOURCES}) == len(sources.SOURCES)


def test_hidden_icons_are_left_out_and_the_box_is_the_icons_own(tmp_path):
    icons = {
        "width": 24,
        "height": 24,
        "icons": {"cat": {"body": "<g/>", "left": -2, "width": 30}, "old": {"body": "<g/>", "hidden": True}},
    }
    sources.write_json(tmp_path / "icons.json", icons)
    ((name, svg),) = icon_svgs(tmp_path)
    assert name == "cat"
    assert 'viewBox="-2 0 30 24"' in svg
    assert svg.endswith("<g/></svg>")
