"""`siglip-hf duplicates`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from siglip_hf.cli.common import console, counted, print_json, progress_bar, short_names


def duplicates(
    index: Annotated[Path, typer.Argument(metavar="IDX", help="A folder made by `siglip-hf index`.")],
    threshold: Annotated[
        float, typer.Option(help="Least cosine to the first picture of a group; 1 for equal pictures only.")
    ] = 0.95,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON array, an array of members per group.")
    ] = False,
) -> int:
    """Find pictures that are nearly the same.

    The first of each group is its largest picture; the others are compared with it. Files of equal bytes are always
    found.
    """
    from dataclasses import asdict

    from rich.markup import escape
    from rich.table import Table

    from siglip_hf.search.duplicates import find_duplicates
    from siglip_hf.search.index import IndexFolder

    folder = IndexFolder(index)
    with progress_bar() as progress:
        task = progress.add_task("comparing", total=len(folder))
        groups = find_duplicates(folder, threshold, on_progress=lambda done: progress.advance(task, done))
    if as_json:
        print_json([[asdict(member) for member in group] for group in groups])
        return 0
    if groups:
        table = Table()
        table.add_column("group", justify="right")
        table.add_column("cosine", justify="right")
        table.add_column("size", justify="right")
        table.add_column("what", overflow="fold")
        names = iter(short_names([member for group in groups for member in group]))
        for number, group in enumerate(groups, 1):
            for place, member in enumerate(group):
                cosine = "the first" if place == 0 else "same file" if member.same_file else f"{member.cosine:.4f}"
                size = f"{member.width} x {member.height}" if member.width else ""
                what = escape(next(names))
                table.add_row(
                    str(number) if place == 0 else "", cosine, size, what, end_section=place == len(group) - 1
                )
        console().print(table)
    extra = sum(len(group) - 1 for group in groups)
    print(
        f"{counted(len(groups), 'group')}; {extra:,} of {counted(len(folder), 'row')} "
        f"{'repeats' if extra == 1 else 'repeat'} another (cosine of {threshold} or more)"
    )
    return 0
