"""The Korean pages say what the English ones say: the same code, headings, tables, links, pictures and numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_docs_site import load_script

hooks = load_script("hooks")
DOCS = Path(__file__).parents[2] / "docs"
KOREAN = sorted([*DOCS.rglob("*.ko.md"), *DOCS.parent.glob("*.ko.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
IN_LETTERS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"}
IN_LETTERS |= {
    "quarter": "4",
    "nine": "9",
    "ten": "10",
    "eleven": "11",
    "twelve": "12",
    "half": "2",
    "third": "3",
    "twice": "2",
}

ENGLISH = """# Top

## Some `code` here

```python
# not a heading
```

| a | b |
|---|---|
| 1 | 2 |

## Same

- item

  ```bash
  ls
  ```

## Same
"""


def english_of(page: Path) -> str:
    return Path(str(page).removesuffix(".ko.md") + ".md").read_text()


def numbers(text: str) -> set[str]:
    """Numbers in the prose and tables of a page, those in letters too."""
    prose = re.sub(r"<!--.*?-->|\]\([^)]*\)|`[^`\n]*`", " ", hooks.without_code(text))
    words = {IN_LETTERS[word] for word in re.findall(r"[a-z]+", prose.lower()) if word in IN_LETTERS}
    return {number.rstrip(",") for number in NUMBER.findall(prose)} | words


def test_there_are_korean_pages():
    assert {"index", "quick_start", "siglip", "siglip2", "labels", "migrating"} <= {page.name[:-6] for page in KOREAN}


@pytest.mark.parametrize("page", KOREAN, ids=lambda page: page.name)
def test_has_each_block_once_in_order(page):
    text, shared = hooks.bare(page.read_text()), hooks.parts(english_of(page))
    assert "```" not in text, "code belongs to the English page; write <!-- code: N -->"
    placed = [(match["kind"], int(match["number"])) for match in hooks.PLACEHOLDER.finditer(text)]
    assert [number for kind, number in placed if kind == "code"] == list(range(1, len(shared.code) + 1))
    tables = len(hooks.TABLE.findall(text)) + sum(kind == "table" for kind, _ in placed)
    assert tables == len(shared.tables)
    hooks.translated(text, english_of(page))


@pytest.mark.parametrize("page", KOREAN, ids=lambda page: page.name)
def test_has_the_same_links_and_pictures(page):
    english = english_of(page)
    texts = [hooks.without_code(text) for text in (hooks.translated(page.read_text(), english), english)]
    # The front page of the repository links to its other language.
    found = [sorted(link for link in LINK.findall(text) if not link.startswith("README")) for text in texts]
    assert found[0] == found[1]


@pytest.mark.parametrize("page", KOREAN, ids=lambda page: page.name)
def test_has_no_number_of_its_own(page):
    assert numbers(hooks.bare(page.read_text())) - numbers(english_of(page)) == set()


@pytest.mark.parametrize("page", KOREAN, ids=lambda page: page.name)
def test_copies_are_those_of_the_english_page(page):
    text = page.read_text()
    assert hooks.with_copies(text, english_of(page), page.parent) == text, "run python scripts/docs/hooks.py"


def test_copies_are_found_and_written_anew():
    korean = "# 위\n## 코드\n<!-- code: 1 -->\n## 하나\n- 항목\n\n  <!-- code: 2 -->\n## 둘\n<!-- table: 1 -->\n"
    filled = hooks.with_copies(korean, ENGLISH, DOCS)
    assert "<!-- code: 1 -->\n```" in filled
    assert filled.count("<!-- /code -->") == 2
    assert "  ```bash\n  ls\n  ```\n  <!-- /code -->" in filled
    assert hooks.bare(filled) == korean
    assert hooks.with_copies(filled.replace("ls", "rm"), ENGLISH, DOCS) == filled
    assert hooks.translated(filled, ENGLISH) == hooks.translated(korean, ENGLISH)


def test_links_lead_to_korean_pages_in_the_repository_and_to_both_on_the_site():
    heads = "# a\n## b\n## c\n## d\n"
    links = "[a](labels.md#top) [b](api/models.md) [c](https://a.org/b.md) [English](README.md)"
    filled = hooks.with_copies(heads + links, ENGLISH, DOCS)
    assert filled == heads + links.replace("labels.md", "labels.ko.md")
    assert hooks.translated(filled, ENGLISH).endswith(links)
    assert hooks.with_copies(filled, ENGLISH, DOCS) == filled


def test_parts_come_from_the_english_page():
    korean = "# 위\n\n## 코드\n\n<!-- code: 1 -->\n\n<!-- table: 1 -->\n\n## 하나\n"
    korean += "\n- 항목\n\n  <!-- code: 2 -->\n\n## 둘\n"
    expected = ENGLISH.replace("# Top", "# 위 {#top}").replace("Some `code` here", "코드 {#some-code-here}")
    expected = expected.replace("## Same", "## 하나 {#same}", 1).replace("## Same", "## 둘 {#same_1}")
    assert hooks.translated(korean, ENGLISH) == expected.replace("item", "항목")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="code: 3"):
        hooks.translated("# a\n## b\n## c\n## d\n<!-- code: 3 -->\n", ENGLISH)
    with pytest.raises(ValueError, match="2 headings"):
        hooks.translated("# a\n## b\n", ENGLISH)


def test_links_of_an_included_file_are_those_of_the_page():
    card = "src/siglip_hf/checkpoints/siglip-hf-pictures-64/README.md"
    page = hooks.with_files(f"before\n<!-- include: {card} -->\n")
    assert page.startswith("before\n# siglip-hf-pictures-64")
    assert "](../" not in page
