"""Draws the floors of the package from its real imports: docs/img/layers.svg. Run: python scripts/docs/draw_layers.py

A room stands on the lowest floor that is above all rooms it imports from; a line leads to each room that it needs and
that none of its other needs stands on already. tests/docs/test_docs_layers.py compares the file with the code.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "siglip_hf"
LAYERS = ROOT / "docs" / "img" / "layers.svg"
# What a reader looks for in a room. Names that start with `_`, and `extras`, hold no floor up.
ROOMS = {
    "cli": "the commands",
    "apps": "web pages",
    "serving": "the server",
    "training": "Trainer, learn",
    "search": "index, query",
    "evaluation": "accuracy, verify",
    "data": "sources, store",
    "integrations": "PEFT, ONNX, weights",
    "inference": "pipeline, labels, optimize",
    "loading": "checkpoints",
    "registration": "Auto classes",
    "private_tables": "of transformers",
    "models": "towers, configurations",
    "preprocessing": "texts, pictures",
    "losses": "sigmoid loss",
    "parallel": "threads",
    "files": "locks, checksums",
}
WIDTH, HEIGHT, GAP, BOX = 900, 46, 32, 172


def room_of(path: str) -> str:
    return path.split(".")[1] if path.startswith("siglip_hf.") else ""


def needs() -> dict[str, set[str]]:
    """The rooms that each room imports from, anywhere in its code."""
    found: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in ROOMS:
            continue
        imported = found.setdefault(room, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                paths = [f"{node.module}.{alias.name}" for alias in node.names]
                imported |= {room_of(path) for path in paths} & ROOMS.keys() - {room}
            elif isinstance(node, ast.Import):
                imported |= {room_of(alias.name) for alias in node.names} & ROOMS.keys() - {room}
    return found


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by floor, the ground first.

    Raises:
        graphlib.CycleError: if rooms import each other.
    """
    level: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        level[room] = max((level[other] + 1 for other in graph[room]), default=0)
    return [[room for room in ROOMS if level.get(room) == floor] for floor in range(max(level.values()) + 1)]


def direct(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The needs that do not follow from others."""

    def below(room: str) -> set[str]:
        return graph[room] | {far for near in graph[room] for far in below(near)}

    return [
        (room, other)
        for room in graph
        for other in sorted(graph[room])
        if not any(other in below(near) for near in graph[room])
    ]


def draw() -> str:
    """The picture, as SVG."""
    graph = needs()
    stack = floors(graph)
    top = len(stack) - 1
    places = {
        room: (round(WIDTH * (number + 1) / (len(rooms) + 1)), (top - floor) * (HEIGHT + GAP) + 8)
        for floor, rooms in enumerate(stack)
        for number, room in enumerate(rooms)
    }
    lines = [
        f'<path d="M{places[a][0]} {places[a][1] + HEIGHT} C{places[a][0]} {places[a][1] + HEIGHT + 24} '
        f'{places[b][0]} {places[b][1] - 24} {places[b][0]} {places[b][1]}"/>'
        for a, b in direct(graph)
    ]
    boxes = [
        f'<g transform="translate({x - BOX // 2} {y})"><rect width="{BOX}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{BOX // 2}" y="19" class="name">{room}</text><text x="{BOX // 2}" y="36">{ROOMS[room]}</text></g>'
        for room, (x, y) in places.items()
    ]
    height = len(stack) * (HEIGHT + GAP) - GAP + 16
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>The rooms of the package by floor; each imports only from floors below it</title>",
            "<style>text{font:12px sans-serif;text-anchor:middle;fill:#475569}.name{font-weight:bold;font-size:14px;"
            "fill:#1e293b}rect{fill:#eef2ff;stroke:#6366f1}path{fill:none;stroke:#94a3b8}</style>",
            f'<rect width="{WIDTH}" height="{height}" style="fill:#fff;stroke:none"/>',
            *lines,
            *boxes,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    LAYERS.write_text(draw(), encoding="utf-8")
