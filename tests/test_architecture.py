"""The house keeps its shape: imports point downward, nothing imports in a circle, files stay small.

Every import counts, also those inside functions and those for type checkers: whoever reads a file follows them all.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import siglip_hf

PACKAGE = Path(siglip_hf.__file__).parent
ROOT = PACKAGE.parents[1]
# From the ground up. A room imports from its own floor's rooms never, from lower floors freely.
FLOORS = [
    {"_version", "_moved", "_lazy", "extras"},
    {"files", "parallel", "losses"},
    {"preprocessing"},
    {"models"},
    {"private_tables"},
    {"registration"},
    {"loading"},
    {"inference"},
    {"data", "integrations"},
    {"search", "evaluation"},
    {"training", "apps", "serving"},
    {"cli"},
]
# Data, not rooms.
FOLDERS_WITHOUT_CODE = {"checkpoints"}
LONGEST_FILE = 600
MOST_ROOMS = MOST_FILES = 12


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file. A room's `__init__` bears the room's name."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """The modules of this package that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; say the whole path."
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for path in paths:
            package, _, path = path.partition(".")
            if package == "siglip_hf":
                while path and path not in MODULES:
                    path = path.rpartition(".")[0]
                found.add(path)
    return found - {name}


def floor_of(name: str) -> int:
    room = name.partition(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def circle_from(start: str, graph: dict[str, set[str]]) -> list[str]:
    """A path of imports from a module back to itself, or nothing."""
    waiting, seen = [[start]], set()
    while waiting:
        path = waiting.pop()
        for other in sorted(graph[path[-1]]):
            if other == start:
                return [*path, start]
            if other not in seen:
                seen.add(other)
                waiting.append([*path, other])
    return []


# The root's `__init__` is the way in: it names everything, and rooms do not import through it.
GRAPH = {name: imports_of(name) for name in MODULES if name}


def test_every_room_has_a_floor():
    rooms = {name.partition(".")[0] for name in GRAPH}
    assert rooms <= set().union(*FLOORS)


@pytest.mark.parametrize("name", GRAPH)
def test_imports_point_downward(name):
    room, others = name.partition(".")[0], GRAPH[name] - {""}  # the way in has a test of its own
    wrong = [other for other in others if other.partition(".")[0] != room and floor_of(other) >= floor_of(name)]
    assert not wrong


@pytest.mark.parametrize("name", GRAPH)
def test_no_module_imports_itself_through_others(name):
    without_root = {module: {other for other in others if other} for module, others in GRAPH.items()}
    assert not circle_from(name, without_root)


@pytest.mark.parametrize("name", GRAPH)
def test_the_way_in_is_for_others(name):
    """Inside, a name is imported from where it is defined; else every room would hang on every other."""
    if name.partition(".")[0] != "cli":
        assert "" not in GRAPH[name]


def test_a_dozen_rooms():
    """A dozen of each: rooms, and files beside them."""
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    rooms = [path.name for path in entries if path.is_dir() and path.name not in FOLDERS_WITHOUT_CODE]
    files = [path.name for path in entries if path.is_file()]
    assert len(rooms) <= MOST_ROOMS, rooms
    assert len(files) <= MOST_FILES, sorted(files)


@pytest.mark.parametrize("folder", ["src", "tests", "scripts"])
def test_files_are_short(folder):
    long = {
        str(file.relative_to(ROOT)): lines
        for file in sorted((ROOT / folder).rglob("*.py"))
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert not long


def test_only_registration_touches_registries():
    """Its private part too is one module, `private_tables`."""
    words = ("AutoConfig.register", "AutoModel.register", "_MAPPING.register", "PIPELINE_REGISTRY", "sys.meta_path")
    for name, file in MODULES.items():
        if name not in ("registration", "private_tables"):
            assert not [word for word in words if word in file.read_text(encoding="utf-8")], name


def test_the_walk_sees_imports_and_circles():
    """The test itself is held against made-up graphs, so that it cannot pass by seeing nothing."""
    assert {"losses.sigmoid", "parallel"} <= set(GRAPH)
    assert "losses.tiles" in GRAPH["losses.ring"]
    assert circle_from("a", {"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle_from("a", {"a": {"b"}, "b": {"c"}, "c": set()}) == []
