"""Runs the tests on the versions that it finds, and says in a row which they were and what came out.

    python scripts/checks/versions.py [--record] [arguments of pytest]

With `--record` the row takes its place in the last table of docs/compatibility.md; then `python scripts/docs/hooks.py`
copies the table to the Korean page. The row comes from the run itself: no number in the table is typed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft")
FIGURES = ("tests run", "failed", "skipped", "minutes", "date")
HEADER = f"| Python | {' | '.join((*PACKAGES, *FIGURES))} |"


class Row:
    """A plugin of pytest that makes the row."""

    def __init__(self) -> None:
        self.text, self.started = "", time.perf_counter()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Counts what ran. An error while a test is made ready is a failure."""
        passed, failed, errors, skipped = (
            len(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "failed", "error", "skipped")
        )
        minutes = (time.perf_counter() - self.started) / 60
        versions = [platform.python_version(), *map(importlib.metadata.version, PACKAGES)]
        failed += errors
        figures = (passed + failed, failed, skipped, f"{minutes:.0f}", datetime.date.today().isoformat())
        self.text = f"| {' | '.join(map(str, (*versions, *figures)))} |"


def record(page: str, row: str) -> str:
    """The page with a row in the table of versions, in place of an older one of the same versions."""
    head, found, rest = page.partition(HEADER + "\n")
    if not found:
        raise ValueError(f"no table beginning with {HEADER!r}")
    lines = rest.splitlines(keepends=True)
    end = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))

    def versions(line: str) -> list[str]:
        return line.split("|")[1 : 2 + len(PACKAGES)]

    rows = [line for line in lines[1:end] if versions(line) != versions(row)] + [row + "\n"]
    return head + found + lines[0] + "".join(sorted(rows)) + "".join(lines[end:])


def main() -> int:
    arguments, row = sys.argv[1:], Row()
    if keep := "--record" in arguments:
        arguments.remove("--record")
    status = pytest.main(arguments, plugins=[row])
    print(f"{HEADER}\n{row.text}")
    if keep:
        PAGE.write_text(record(PAGE.read_text(), row.text))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
