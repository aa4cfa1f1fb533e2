"""The data script: families, the held-out split, matching of names, and pictures as premultiplied squares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_pictures", SCRIPTS / "build_pictures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_gendered_and_directed_variants_are_one_family(build):
    running = ["1f3c3", "1f3c3-200d-2640", "1f3c3-200d-2642", "1f3c3-200d-2640-200d-27a1"]
    assert {build.family_of(code) for code in running} == {"1f3c3"}
    assert [build.is_gendered(code) for code in running] == [False, True, True, True]
    coders = ["1f468-200d-1f4bb", "1f469-200d-1f4bb", "1f9d1-200d-1f4bb"]
    assert {build.family_of(code) for code in coders} == {"1f9d1-1f4bb"}
    assert [build.is_gendered(code) for code in coders] == [True, True, False]
    assert build.bare_code("2764-FE0F-200D-1F525") == "2764-200d-1f525"


def test_held_out_families_do_not_depend_on_order_and_hardly_on_additions(build):
    families = [f"{number:x}" for number in range(0x1F300, 0x1F300 + 500)]
    held_out = build.hold_out(families)
    assert len(held_out) == 50
    assert build.hold_out(reversed(families)) == held_out
    assert len(build.hold_out([*families, "one more"]) ^ held_out) <= 1


def test_names_are_matched_only_where_they_mean_one_concept(build):
    concepts = [
        {"code": "a", "label": "flag: Japan", "aliases": ["crossed"]},
        {"code": "b", "label": "clinking glasses", "aliases": ["crossed", "toast"]},
        {"code": "c", "label": "Mrs. Claus", "aliases": []},
    ]
    matcher = build.NameMatcher(concepts)
    names = ["flag-for-japan", "clinking-glasses-3", "toast", "mrsclaus", "crossed", "clinking-glasses-dark-skin-tone"]
    assert [matcher.find(name) for name in names] == ["a", "b", "b", "c", None, None]


def test_picture_becomes_a_premultiplied_square(build):
    picture = Image.new("RGBA", (40, 20), (200, 100, 0, 128))
    square = build.premultiplied(picture, 20)
    assert square.shape == (4, 20, 20)
    assert square.dtype == np.uint8
    np.testing.assert_array_equal(square[:, 10, 10], [100, 50, 0, 128])
    assert square[:, :5].max() == square[:, 15:].max() == 0


def test_package_with_another_licence_is_refused(build, tmp_path):
    folder = tmp_path / "@scope__art@1.0.0"
    folder.mkdir()
    build.write_json(folder / "package.json", {"license": "CC-BY-NC-4.0"})
    with pytest.raises(RuntimeError, match=r"@scope/art@1\.0\.0 states the licence \['CC-BY-NC-4\.0'\], expected MIT"):
        build.fetch("@scope/art", "1.0.0", "MIT", tmp_path)


def test_missing_npm_is_one_clear_error(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="npm is not installed"):
        build.fetch("anything", "1.0.0", "MIT", tmp_path)


def test_styles_for_evaluation_are_the_promised_ones(build):
    held_out = {style.name: style.licence for style in build.STYLES if style.use == "evaluate"}
    assert held_out == {"fxemoji": "Apache-2.0", "openmoji": "CC-BY-SA-4.0"}
    assert all(style.licence in ("MIT", "Apache-2.0", "CC-BY-4.0") for style in build.STYLES if style.use == "train")
