"""`siglip-hf duplicates`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from siglip_hf.cli.common import progress_bar


def duplicates(
    index: Annotated[Path, typer.Argument(metavar="IDX", help="A folder made by `siglip-hf index`.")],
    threshold: Annotated[
        float, typer.Option(help="Least cosine to the first picture of a group; 1 for equal pictures only.")
    ] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, an array per group.")] = False,
) -> int:
    """Find pictures that are nearly the same.

    The first of each group is its largest picture; the others are compared with it. Files of equal bytes are always
    found.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from siglip_hf.search.duplicates import find_duplicates
    from siglip_hf.search.index import IndexFolder

    folder = IndexFolder(index)
    with progress_bar() as progress:
        task = progress.add_task("comparing", total=len(folder))
        groups = find_duplicates(folder, threshold, on_progress=lambda done: progress.advance(task, done))
    if as_json:
        print(json.dumps([[asdict(member) for member in group] for group in groups], ensure_ascii=False, indent=2))
        return 0
    if groups:
        table = Table()
        table.add_column("group", justify="right")
        table.add_column("cosine", justify="right")
        table.add_column("size", justify="right")
        table.add_column("what", overflow="fold")
        for number, group in enumerate(groups, 1):
            for place, member in enumerate(group):
                cosine = "the first" if place == 0 else "same file" if member.same_file else f"{member.cosine:.4f}"
                size = f"{member.width} x {member.height}" if member.width else ""
                what = escape(member.text or member.path or member.id)
                table.add_row(
                    str(number) if place == 0 else "", cosine, size, what, end_section=place == len(group) - 1
                )
        Console().print(table)
    extra = sum(len(group) - 1 for group in groups)
    print(f"groups: {len(groups)}; {extra:,} of {len(folder):,} rows repeat another (cosine of {threshold} or more)")
    return 0
