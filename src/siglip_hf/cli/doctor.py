"""`siglip-hf doctor`."""

from __future__ import annotations

import sys
import textwrap
from typing import Annotated, Any

import typer

from siglip_hf.cli.common import print_json


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> int:
    """Show versions, devices, what is registered, optional parts, and try the attention implementations."""
    from rich.console import Console

    from siglip_hf.cli.examine import examine

    with Console(stderr=True).status("examining; flex attention may compile for a minute"):
        report = examine()
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    for problem in report["problems"]:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if report["problems"] else 0


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    problems = report["problems"]
    summary = f"to do: {'; '.join(problems)}" if problems else "all well"
    console.print(Text(_wrapped(summary, console.width), "bold red" if problems else "bold green"), soft_wrap=True)
    for title, rows in _sections(report).items():
        console.print(Text(f"\n{title}", "bold"))
        column = max(map(len, rows)) + 4
        for name, value in rows.items():
            # Our own line breaks, between words only: a path or a name that is cut in two is of no use.
            lines = [_wrapped(part, console.width, column) for part in value.splitlines() or [""]]
            line = Text("\n".join([lines[0].replace(" " * column, f"  {name}".ljust(column), 1), *lines[1:]]))
            line.stylize("cyan", 0, column)
            console.print(line, soft_wrap=True)


def _wrapped(text: str, width: int, indent: int = 0) -> str:
    space = " " * indent
    return textwrap.fill(
        text, width, initial_indent=space, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )


def _sections(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Titles, and what is told under each: names and values, which may have several lines."""

    def attention(entry: dict[str, Any]) -> str:
        where = f"on {entry['device']} in {entry['dtype']}"
        return f"works {where}" if entry["works"] else f"no, {where}: {entry['reason']}"

    def text(value: Any) -> str:
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        return "not installed" if value is None else str(value)

    def classes(paths: str) -> str:
        """The bare names of this package's classes; others with their modules."""
        return ", ".join(
            path.rpartition(".")[2] if path.startswith("siglip_hf.") else path for path in paths.split(", ")
        )

    speed = report["speed"]
    return {
        "versions": {name: text(version) for name, version in report["versions"].items()},
        "hardware": {name.replace("_", " "): text(value) for name, value in report["hardware"].items()},
        "registered": {
            auto_class: "\n".join(f"{kind}: {classes(paths)}" for kind, paths in rows.items())
            for auto_class, rows in report["registered"].items()
        },
        "optional parts": {
            f"siglip-hf[{extra}]": ", ".join(f"{name} {text(version)}" for name, version in packages.items())
            for extra, packages in report["extras"].items()
        },
        "attention": {name: attention(entry) for name, entry in report["attention"].items()},
        "what siglip_hf.optimize chooses on this CPU": (
            {"nothing": speed["reason"]}
            if "reason" in speed
            else {
                "computes in": text(speed["dtype"]),
                "packed blocks": text(speed["packed_blocks"]),
                "why": "\n".join(speed["notes"]),
            }
        ),
        "embedded checkpoints": {
            kind: f"{entry['path']}\n{entry['bytes'] / 1e6:.1f} MB" if entry["path"] else f"missing: {entry['reason']}"
            for kind, entry in report["checkpoints"].items()
        },
    }
