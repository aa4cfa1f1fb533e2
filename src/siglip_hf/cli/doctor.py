"""`siglip-hf doctor`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> int:
    """Show versions, devices, what is registered, optional parts, and try the attention implementations."""
    from rich.console import Console

    from siglip_hf.cli.examine import examine

    with Console(stderr=True).status("examining; flex attention may compile for a minute"):
        report = examine()
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print_report(report)
    for problem in report["problems"]:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if report["problems"] else 0


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def attention_state(entry: dict[str, Any]) -> str:
        where = f"on {entry['device']} in {entry['dtype']}"
        return (
            f"[green]works[/green] {where}" if entry["works"] else f"[red]no[/red] {where}: {escape(entry['reason'])}"
        )

    def package_state(packages: dict[str, str | None]) -> str:
        return ", ".join(f"{name} {version or '[dim]not installed[/dim]'}" for name, version in packages.items())

    def text(value: Any) -> str:
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        return "not installed" if value is None else escape(str(value))

    def speed_rows(speed: dict[str, Any]) -> dict[str, str]:
        if "reason" in speed:
            return {"optimize": f"[red]no[/red]: {escape(speed['reason'])}"}
        return {
            "computes in": text(speed["dtype"]),
            "packed blocks": text(speed["packed_blocks"]),
            "why": escape("\n".join(speed["notes"])),
        }

    checkpoint = report["checkpoint"]
    size = f", {checkpoint['bytes'] / 1e6:.1f} MB" if checkpoint["path"] else f": {checkpoint['reason']}"
    sections = {
        "versions": {name: text(version) for name, version in report["versions"].items()},
        "hardware": {name.replace("_", " "): text(value) for name, value in report["hardware"].items()},
        "registered": {
            f"{auto_class} {kind}": text(path.split(", "))
            for auto_class, rows in report["registered"].items()
            for kind, path in rows.items()
        },
        "optional parts": {
            escape(f"siglip-hf[{extra}]"): package_state(packages) for extra, packages in report["extras"].items()
        },
        "attention": {name: attention_state(entry) for name, entry in report["attention"].items()},
        "speed on the CPU (siglip_hf.optimize)": speed_rows(report["speed"]),
        "embedded checkpoint": {"folder": text(checkpoint["path"] or "missing") + text(size)},
    }
    console = Console()
    for title, rows in sections.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
