"""`siglip-hf verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from siglip_hf.cli.common import MaxPixels, largest_picture, print_json

if TYPE_CHECKING:
    from siglip_hf.evaluation.verify import Verification


def verify(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PICTURE]...",
            help="A checkpoint (folder or name; the embedded one by default) and pictures (the package's by default).",
        ),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET", help="Random weights of a published model's shapes; all arguments are pictures."
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option(help='Labels, as "a cat, a dog".')] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another checkpoint for stock: a changed one's original.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    max_pixels: MaxPixels = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Run stock transformers and this package on one checkpoint and compare their numbers, time and memory.

    Exit code 1 if anything differs by more than the dtype's rounding.
    """
    from rich.console import Console

    from siglip_hf.data.sources import find_pictures
    from siglip_hf.evaluation.verify import verify as run

    given = list(arguments or ())
    model = given.pop(0) if given and random is None else None
    with largest_picture(max_pixels), Console(stderr=True).status("running both sides, each in a process of its own"):
        result = run(
            model,
            find_pictures(given) if given else None,
            labels=labels,
            random=random,
            reference=reference,
            dtype=dtype,
            device=device,
        )
    if as_json:
        print_json(result.as_dict())
    else:
        _print(result)
    return 0 if result.ok else 1


def _print(result: Verification) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=f"{escape(result.model)}, {result.dtype}", title_justify="left", title_style="bold")
    for column in ("compared", "shape", "largest difference", "allowed", ""):
        table.add_column(column)
    for row in result.comparisons:
        state = "[green]same[/green]" if row.ok else "[red]different[/red]"
        shape = " x ".join(map(str, row.shape))
        note = f" ({escape(row.note)})" if row.note else ""
        table.add_row(row.name, shape, f"{row.difference:.2g}", f"{row.allowed:.2g}", state + note)
    console.print(table)

    table = Table(title="time and memory", title_justify="left", title_style="bold")
    for column in ("", "stock", "siglip_hf"):
        table.add_column(column)
    sides = [result.sides["stock"], result.sides["siglip_hf"]]
    steps = {"load": "loading", "pictures": "pictures to pixels", "texts": "texts to ids", "forward": "forward"}
    for step, title in steps.items():
        if step in sides[0]["seconds"]:
            table.add_row(title, *(f"{side['seconds'][step]:.4f} s" for side in sides))
    if all(side["peak_memory"] for side in sides):
        table.add_row("most memory", *(f"{side['peak_memory'] / 1e6:.0f} MB" for side in sides))
    console.print(table)
    for note in result.notes:
        console.print(f"note: {escape(note)}")
    console.print(escape(result.verdict), style="green" if result.ok else "bold red", soft_wrap=True)
