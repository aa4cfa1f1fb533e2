"""The documentation builds without a warning and has no broken internal link; README's links lead somewhere too."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import docs_site

ROOT = Path(__file__).parents[2]
# What people read on the repository's page, not on the site.
FRONT = [ROOT / "README.md", ROOT / "README.ko.md", ROOT / "CONTRIBUTING.md"]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check_links = load_script("check_links")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The output of a build, and its folder."""
    folder = tmp_path_factory.mktemp("site")
    return docs_site.build(folder), folder


def test_builds_without_a_warning(build):
    done, _ = build
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr + done.stdout


def test_no_link_is_broken_and_nothing_comes_from_elsewhere(build):
    assert check_links.problems(build[1]) == []


def test_both_languages_are_there(build):
    english, korean = ((build[1] / path).read_text() for path in ("index.html", "ko/index.html"))
    assert 'lang="en"' in english
    assert 'lang="ko"' in korean
    code = [re.findall(r"<code>(.*?)</code>", page, re.DOTALL) for page in (english, korean)]
    assert "import" in "".join(code[0])
    assert code[0][:1] == code[1][:1]


def test_the_reference_shows_docstrings(build):
    models = (build[1] / "api" / "models" / "index.html").read_text()
    assert "SiglipModel.encode_image" in models
    assert "L2" in (build[1] / "api" / "training" / "index.html").read_text()


def test_formulas_are_drawn_by_the_browser_alone(build):
    for page in ("how_it_works", "ko/how_it_works"):
        text = (build[1] / page / "index.html").read_text()
        written = (ROOT / "docs" / "how_it_works.md").read_text().count("```math")
        assert text.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == written > 0
        assert "arithmatex" not in text.partition("<article")[2].partition("</article")[0]


def test_notebooks_are_pages(build):
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        page = (build[1] / "notebooks" / path.stem / "index.html").read_text()
        assert f"{path.name}" in page
        assert "import siglip_hf" in re.sub("<[^>]+>", "", page)
    listed = (build[1] / "notebooks" / "index.html").read_text()
    assert 'href="zero_shot_labels/"' in listed


def test_broken_links_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="sub/">ok</a><a href="sub/#there">ok</a><a href="sub/#gone">x</a><a href="none/">x</a>'
        '<a href="https://example.org">ok</a><script src="https://example.org/x.js"></script><img src="p.png">'
    )
    (tmp_path / "sub" / "index.html").write_text('<p id="there"><a href="../index.html">ok</a><a href="#there">ok</a>')
    assert check_links.problems(tmp_path) == [
        "index.html: loads https://example.org/x.js from elsewhere",
        "index.html: sub/#gone names no place in that page",
        "index.html: none/ leads nowhere",
        "index.html: p.png leads nowhere",
    ]


@pytest.mark.parametrize("page", FRONT, ids=lambda page: page.name)
def test_links_of_the_front_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|href)=\"([^\"#]+)", page.read_text())
    local = [link for pair in links for link in pair if link and "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
