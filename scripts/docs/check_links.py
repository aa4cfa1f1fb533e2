"""Looks through the built documentation for what would fail on a page: broken internal links, and outside resources.

A link is broken if its file, or the anchor in it, is not there. Pages must work with no network, so their scripts,
styles and pictures are files of their own. Run: python scripts/docs/check_links.py site
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit


@dataclass
class Page(HTMLParser):
    """What a page of HTML links to, loads, and can be linked at.

    Attributes:
        links: addresses of links and resources.
        loaded: those of them that a browser fetches with the page.
        anchors: its ids.
    """

    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        address = given.get("href") or given.get("src") or given.get("data-src")
        if not address:
            return
        self.links.append(address)
        if tag != "a" and given.get("rel") not in ("canonical", "alternate", "next", "prev"):
            self.loaded.append(address)


def read(site: Path) -> dict[str, Page]:
    """All pages of a site by their path from its root."""
    pages = {}
    for file in sorted(site.rglob("*.html")):
        page = Page()
        page.feed(file.read_text(encoding="utf-8"))
        pages[file.relative_to(site).as_posix()] = page
    return pages


def problems(site: Path) -> list[str]:
    """A line for each broken internal link and each resource from elsewhere."""
    pages = read(site)
    if not pages:
        return [f"{site} holds no page; build it with `make docs`"]
    found = [
        f"{path}: loads {address} from elsewhere"
        for path, page in pages.items()
        for address in page.loaded
        if urlsplit(address).netloc
    ]
    for path, page in pages.items():
        if path == "404.html":  # its links start at the address where the site will lie
            continue
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = unquote(urljoin(f"/{path}", parts.path)).lstrip("/")
            if not target or target.endswith("/"):
                target += "index.html"
            if not (site / target).is_file():
                found.append(f"{path}: {address} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{path}: {address} names no place in that page")
    return found


def main() -> int:
    """Prints the problems of the site in the first argument; 1 if there are any."""
    found = problems(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
    print("\n".join(found) or "no broken internal link, nothing from elsewhere")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
