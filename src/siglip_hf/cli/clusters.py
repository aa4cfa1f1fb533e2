"""`siglip-hf clusters`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from siglip_hf.cli.common import (
    Device,
    console,
    no_library_progress,
    print_json,
)

_EXAMPLES = 3


def clusters(
    index: Annotated[Path, typer.Argument(metavar="IDX", help="A folder made by `siglip-hf index`.")],
    words: Annotated[
        Path | None, typer.Option(help="A text file with a word on each line, to name clusters; 400 nouns by default.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--clusters", "-n", min=1, help="How many; the root of half the rows by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, an object per cluster.")] = False,
    model: Annotated[
        str | None, typer.Option(help="The checkpoint that the index was made with, if it has moved.")
    ] = None,
    device: Device = None,
) -> int:
    """Group what looks alike, and name each group by the words that fit it best."""
    from dataclasses import asdict

    from rich.markup import escape
    from rich.table import Table

    from siglip_hf.inference.classify import read_labels_file
    from siglip_hf.inference.label_bank import parse_labels
    from siglip_hf.inference.pipeline import DEFAULT_TEMPLATE
    from siglip_hf.preprocessing.text_cleaning import label_words
    from siglip_hf.search.clusters import find_clusters
    from siglip_hf.search.index import IndexFolder
    from siglip_hf.search.query import load_embedder
    from siglip_hf.search.words import WORDS

    names = parse_labels(read_labels_file(words)) if words is not None else WORDS
    folder = IndexFolder(index)
    with no_library_progress():
        embedder = load_embedder(folder.origin, model, device)
        vectors = embedder.embed_texts([DEFAULT_TEMPLATE.format(label_words(name)) for name in names])
        found = find_clusters(folder, names, vectors, count)
    if as_json:
        print_json([asdict(cluster) for cluster in found])
        return 0
    table = Table()
    table.add_column("rows", justify="right")
    table.add_column("label")
    table.add_column("also")
    table.add_column("most typical", overflow="fold")
    for cluster in found:
        also = ", ".join(word for word, _ in cluster.words[1:])
        table.add_row(
            str(cluster.size), escape(cluster.label), escape(also), escape(", ".join(cluster.ids[:_EXAMPLES]))
        )
    console().print(table)
    return 0
