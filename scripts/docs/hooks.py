"""What the documentation's two languages share, so that they cannot drift: a hook of mkdocs, and what its tests check.

A Korean page `name.ko.md` holds no code of its own. A line `<!-- code: 2 -->` in it stands for the second fenced block
of `name.md`, a line `<!-- table: 1 -->` for that page's first table (measurements, which are not translated). Behind
the line stands a copy of that part, up to a line `<!-- /code -->`, so that the page can be read in the repository too;
`python scripts/docs/hooks.py` rewrites all copies. Headings take the English ones' anchors, so that a link works in
both languages.

Formulas are LaTeX in the pages: `$x$` within a line, a fenced block of the language `math` on lines of their own. Both
become MathML here, which browsers draw without a script.

In the repository a Korean page links to Korean pages, `labels.ko.md`; the site finds them by the English names.
"""

from __future__ import annotations

import html
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import markdown
from latex2mathml.converter import convert

KOREAN = ".ko.md"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
FENCE = re.compile(r"^(?P<indent> *)```[^\n]*\n.*?^(?P=indent)```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"(?:^\|[^\n]*\n)+", re.MULTILINE)
HEADING = re.compile(r"^(#+) .*$", re.MULTILINE)
# A link to a page beside or below this one. The front page's link to its other language stays.
PAGE_LINK = re.compile(r"(?<=\]\()(?!README)(?P<page>[\w/]+?)(?:\.ko)?\.md(?=[#)])")
PLACEHOLDER = re.compile(
    r"^(?P<indent> *)<!-- (?P<kind>code|table): (?P<number>\d+) -->$"
    # The copy: nothing in it may look like the next placeholder.
    r"(?:\n(?:(?!^ *<!-- (?:code|table): ).)*?^(?P=indent)<!-- /(?P=kind) -->$)?",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Parts:
    """The parts of an English page that its translation shares.

    Attributes:
        code: fenced blocks, fences included, without their indentation.
        tables: tables, each ending with a newline.
        anchors: level and anchor of each heading, in order.
    """

    code: list[str]
    tables: list[str]
    anchors: list[tuple[int, str]]


def without_code(text: str) -> str:
    """A page with its fenced blocks left out."""
    return FENCE.sub("", text)


def parts(text: str) -> Parts:
    """Takes an English page apart."""
    prose = without_code(text) + "\n"
    converter = markdown.Markdown(extensions=["toc", "attr_list"])
    converter.convert(prose)
    return Parts(
        code=[textwrap.dedent(match[0]) for match in FENCE.finditer(text)],
        tables=TABLE.findall(prose),
        anchors=_flat(converter.toc_tokens),  # type: ignore[attr-defined]
    )


def _flat(tokens: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [entry for token in tokens for entry in [(token["level"], token["id"]), *_flat(token["children"])]]


def bare(korean: str) -> str:
    """A Korean page without the copies of the English page's parts."""
    return PLACEHOLDER.sub(lambda match: f"{match['indent']}<!-- {match['kind']}: {match['number']} -->", korean)


def with_copies(korean: str, english: str, folder: Path) -> str:
    """A Korean page as it stands in the repository: behind each placeholder a copy of its part, links to Korean pages.

    Args:
        korean: the page.
        english: the English page.
        folder: where the page lies; a page without a Korean twin there is linked to in English.

    Raises:
        ValueError: as `translated`.
    """

    def fill(match: re.Match[str]) -> str:
        indent, kind = match["indent"], match["kind"]
        copy = translated_part(match, parts(english))
        return f"{indent}<!-- {kind}: {match['number']} -->\n{copy}\n{indent}<!-- /{kind} -->"

    def link(match: re.Match[str]) -> str:
        twin = f"{match['page']}{KOREAN}"
        return twin if (folder / twin).exists() else f"{match['page']}.md"

    return PAGE_LINK.sub(link, PLACEHOLDER.sub(fill, bare(korean)))


def translated_part(match: re.Match[str], shared: Parts) -> str:
    """What a placeholder stands for, with its indentation.

    Raises:
        ValueError: if the English page does not have that part.
    """
    of_kind = shared.code if match["kind"] == "code" else shared.tables
    number = int(match["number"])
    if not 1 <= number <= len(of_kind):
        raise ValueError(f"{match[0].strip()}: the English page has {len(of_kind)} of them.")
    return textwrap.indent(of_kind[number - 1].rstrip("\n"), match["indent"])


def translated(korean: str, english: str) -> str:
    """A Korean page with the English page's code, tables and anchors in place.

    Raises:
        ValueError: if a placeholder names a part that the English page does not have, or the headings do not match.
    """
    shared, korean = parts(english), PAGE_LINK.sub(r"\g<page>.md", bare(korean))
    headings = HEADING.findall(without_code(korean))
    if [len(marks) for marks in headings] != [level for level, _ in shared.anchors]:
        raise ValueError(f"{len(headings)} headings do not follow the English page's {len(shared.anchors)}.")
    anchors = iter(shared.anchors)
    korean = HEADING.sub(lambda match: f"{match[0]} {{#{next(anchors)[1]}}}", korean)
    return PLACEHOLDER.sub(lambda match: translated_part(match, shared), korean)


def on_config(config: Any) -> Any:
    """Called by mkdocs first: the footer of each page says which version the pages are of."""
    text = (Path(__file__).parents[2] / "src" / "siglip_hf" / "_version.py").read_text(encoding="utf-8")
    version = text.split('"')[-2]
    config.copyright = f"siglip_hf {version}, Apache-2.0"
    return config


def with_files(text: str) -> str:
    """A page with the files that it includes in place of `<!-- include: PATH -->`, without their front matter.

    Their links to files of docs/ become the page's own.
    """
    root = Path(__file__).parents[2]

    def read(match: re.Match[str]) -> str:
        file = root / match[1]
        text = re.sub(r"\A---\n.*?\n---\n", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        return text.replace(f"]({os.path.relpath(root / 'docs', file.parent)}/", "](")

    return INCLUDE.sub(read, text)


def on_page_markdown(text: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page's source."""
    text = with_files(text)
    source = str(page.file.abs_src_path)
    if not source.endswith(KOREAN):
        return text
    english = Path(source.removesuffix(KOREAN) + ".md").read_text(encoding="utf-8")
    try:
        return translated(text, english)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def with_formulas(page: str) -> str:
    """A page in HTML with its LaTeX, as pymdownx.arithmatex marks it, turned into MathML."""

    def draw(match: re.Match[str]) -> str:
        block = match[1] == "div"
        formula = convert(html.unescape(match[2]).strip(), display="block" if block else "inline")
        return f'<div class="formula">{formula}</div>' if block else formula

    return FORMULA.sub(draw, page)


def on_page_content(text: str, **_: Any) -> str:
    """Called by mkdocs with each page's HTML."""
    return with_formulas(text)


def main() -> None:
    """Writes the copies in all Korean pages."""
    root = Path(__file__).parents[2]
    for page in sorted([*root.glob(f"*{KOREAN}"), *(root / "docs").glob(f"**/*{KOREAN}")]):
        english = Path(str(page).removesuffix(KOREAN) + ".md").read_text(encoding="utf-8")
        text = page.read_text(encoding="utf-8")
        if (new := with_copies(text, english, page.parent)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(root))


if __name__ == "__main__":
    main()
