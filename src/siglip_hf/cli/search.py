"""`siglip-hf search`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from siglip_hf.cli.common import (
    Device,
    MaxPixels,
    check_sheet,
    console,
    largest_picture,
    no_library_progress,
    print_json,
    print_some,
    short_names,
)

if TYPE_CHECKING:
    from siglip_hf.search.query import Hit, Query


def search(
    index: Annotated[
        str,
        typer.Argument(metavar="IDX", help="A folder of `siglip-hf index`; lancedb:DB/TABLE; qdrant:DB/COLLECTION."),
    ],
    words: Annotated[str | None, typer.Argument(metavar="TEXT", help="What to look for, in words.")] = None,
    text: Annotated[str | None, typer.Option(help="The same, beside --image.")] = None,
    image: Annotated[str | None, typer.Option(help="A picture that the answers should be like; a file or URL.")] = None,
    not_text: Annotated[str | None, typer.Option("--not", help="What the answers should not show.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Answers to each query.")] = 10,
    path: Annotated[
        str | None, typer.Option(help='Only rows whose path or id matches a pattern, such as "*/2024/*.jpg".')
    ] = None,
    queries: Annotated[Path | None, typer.Option(help="A text file with a query on each line.")] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON array, an object per query: query, and hits (id, path, cosine, probability, text), "
            "best first.",
        ),
    ] = False,
    sheet: Annotated[Path | None, typer.Option(help="Draw the answers into this picture file.")] = None,
    max_pixels: MaxPixels = None,
    model: Annotated[
        str | None, typer.Option(help="The checkpoint that the index was made with, if it has moved.")
    ] = None,
    device: Device = None,
) -> int:
    """Find pictures by words, by a picture, or by both.

    cosine: similarity to the query. probability: the model's own, that the words fit the picture.
    It uses the checkpoint that the index was made with.
    """
    from dataclasses import asdict

    from siglip_hf.search.query import SearchIndex

    asked = _queries(words, text, image, not_text, queries)
    if sheet is not None:
        check_sheet(sheet, [query.image for query in asked if isinstance(query.image, str)])
    with largest_picture(max_pixels), no_library_progress():
        found = SearchIndex.open(index, model=model, device=device).search_many(asked, k=k, path_filter=path)
    if as_json:
        answers = [
            {"query": str(query), "hits": [asdict(hit) for hit in hits]}
            for query, hits in zip(asked, found, strict=True)
        ]
        print_json(answers)
    else:
        _print_tables(asked, found)
    if not any(found):
        print(f"nothing found{f' that matches {path!r}' if path else ''}", file=sys.stderr)
        return 0
    if sheet is not None:
        with largest_picture(max_pixels):
            missing = _draw_sheet(asked, found, sheet)
        print(f"contact sheet: {sheet}", file=sys.stderr)
        print_some([f"not on the sheet: {reason}" for reason in missing])
        return 1 if missing else 0
    return 0


def _queries(
    words: str | None, text: str | None, image: str | None, not_text: str | None, file: Path | None
) -> list[Query]:
    from siglip_hf.files import read_text, text_lines
    from siglip_hf.search.query import Query

    if words is not None and text is not None:
        raise ValueError(f"{words!r} and --text {text!r} are both given; pass one of them.")
    if file is None:
        if not (words or text or image):
            raise ValueError('nothing to look for: pass words ("a red car"), --image FILE or --queries FILE.')
        return [Query(words or text, image, not_text)]
    if words or text or image:
        raise ValueError("--queries is given beside another query; pass one of them.")
    try:
        lines = [line.strip() for line in text_lines(read_text(file))]
    except (OSError, ValueError) as error:
        raise ValueError(f"the file of queries {str(file)!r} cannot be read: {error}") from error
    if not any(lines):
        raise ValueError(f"the file of queries {str(file)!r} holds none; write one on each line.")
    return [Query(line, not_text=not_text) for line in lines if line]


def _print_tables(queries: Sequence[Query], found: Sequence[Sequence[Hit]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    for query, hits in zip(queries, found, strict=True):
        table = Table(title=escape(str(query)), title_justify="left", title_style="bold")
        table.add_column("", justify="right")
        table.add_column("cosine", justify="right", min_width=6)
        has_probability = any(hit.probability is not None for hit in hits)
        if has_probability:
            table.add_column("probability", justify="right")
        table.add_column("found", overflow="fold")
        for rank, (hit, name) in enumerate(zip(hits, short_names(hits), strict=True), 1):
            numbers = [f"{hit.cosine:.3f}", *([f"{hit.probability:.2%}"] if hit.probability is not None else [])]
            table.add_row(str(rank), *numbers, escape(name))
        out.print(table)
        if hits and (query.not_text or (query.text and query.image is not None)):
            alone = f"; the probability is that of {query.text!r} alone" if query.text and has_probability else ""
            print(f"ordered by the cosine to all of the query together{alone}")


def _draw_sheet(queries: Sequence[Query], found: Sequence[Sequence[Hit]], path: Path) -> list[str]:
    """Draws the answers of all queries; returns what could not be drawn."""
    from siglip_hf.data.store import picture_at
    from siglip_hf.inference.contact_sheet import Card, card_picture, save_contact_sheet

    cards, missing = [], []
    for query, hits in zip(queries, found, strict=True):
        for hit in hits:
            share = hit.cosine if hit.probability is None else hit.probability
            label = f"cosine {hit.cosine:.3f}" if len(queries) == 1 else str(query)
            try:
                if hit.path is None:
                    raise ValueError("it is no picture of its own")
                picture = card_picture(picture_at(hit.path))
            except (OSError, ValueError) as error:
                missing.append(f"{hit.id}: {getattr(error, 'reason', error)}")
                continue
            cards.append(Card(picture, Path(hit.path).name, [(label, share)]))
    if not cards:
        raise ValueError(f"--sheet {path}: none of the answers has a picture that can be read; {missing[0]}")
    title = str(queries[0]) if len(queries) == 1 else f"{len(queries)} queries"
    save_contact_sheet(cards, path, title=title)
    return missing
