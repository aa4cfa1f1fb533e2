"""The shape of JSON, and what docs/command_line.md shows of it: keys are compared, not values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "command_line.md"
SECTION = re.compile(r"^### (\w+)\n(.*?)(?=^### |\Z)", re.DOTALL | re.MULTILINE)


def keys(value: Any, path: str = "") -> set[str]:
    """The keys of a JSON value with where they stand, such as `[].labels[].cosine`."""
    if isinstance(value, dict):
        return {f"{path}.{key}" for key in value} | {k for key, v in value.items() for k in keys(v, f"{path}.{key}")}
    if isinstance(value, list):
        return {key for item in value for key in keys(item, f"{path}[]")}
    return set()


def section(command: str) -> str:
    """What the page says of a command."""
    (text,) = [text for name, text in SECTION.findall(PAGE.read_text(encoding="utf-8")) if name == command]
    return text


def shown(command: str) -> Any:
    """The JSON that the page shows for a command."""
    (code,) = re.findall(r"^```json\n(.*?)^```", section(command), re.DOTALL | re.MULTILINE)
    return json.loads(code)
