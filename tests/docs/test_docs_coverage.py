"""Every public name is documented: what it is for, its parameters, the errors it raises, its shapes, and its source.

Public are the names of `siglip_hf.__all__`, what the pages of the API reference name, and the methods of their classes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import siglip_hf

ROOT = Path(__file__).parents[2]
API = sorted((ROOT / "docs" / "api").glob("*.md"))
# Constants, which have no docstring of their own.
CONSTANTS = {"__version__", "PRESETS", "NAFLEX_PRESETS"}
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Examples):\s*$", re.MULTILINE)
SHAPE = re.compile(r"\(\w[\w ]*,[^()]*\)|\([A-Z]\)|scalar|any shape|same shape")
# Modules that follow a paper or the original code, and say so at their top.
WITH_SOURCE = [
    "models.configuration_siglip",
    "losses.sigmoid",
    "losses.ring",
    "models.modeling_siglip",
    "models.modeling_siglip2",
    "training.cached",
]


def of_the_package(thing: Any) -> bool:
    return getattr(thing, "__module__", "").split(".")[0] == "siglip_hf"


def named_in_reference() -> dict[str, list[str] | None]:
    """What the `:::` lines of the API reference name, with the members shown where they are listed."""
    named: dict[str, list[str] | None] = {}
    for page in API:
        for block in re.split(r"^::: ", page.read_text(), flags=re.MULTILINE)[1:]:
            listed = re.search(r"members: \[(.*?)\]", block, re.DOTALL)
            named[block.split()[0]] = re.split(r",\s*", listed[1].strip()) if listed else None
    return named


def resolve(path: str) -> Any:
    """The module, class or function of a dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(resolve(parent), name)


def public_names(module: ModuleType) -> list[str]:
    """The names that a module defines for others."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def public_things() -> dict[str, Any]:
    """Classes and functions, under a name to find them by."""
    paths = [f"siglip_hf.{name}" for name in siglip_hf.__all__]
    for path, members in named_in_reference().items():
        thing = resolve(path)
        paths += [f"{path}.{name}" for name in members or public_names(thing)] if inspect.ismodule(thing) else [path]
    things = {path: resolve(path) for path in paths if path.rpartition(".")[2] not in CONSTANTS}
    unique = {id(thing): (path, thing) for path, thing in things.items() if callable(thing)}
    return dict(sorted(unique.values()))


def functions() -> dict[str, Callable[..., Any]]:
    """Public functions, and the public methods that public classes define or change."""
    found: dict[str, Callable[..., Any]] = {}
    for path, thing in public_things().items():
        if inspect.isfunction(thing):
            found[path] = thing
        for base in filter(of_the_package, inspect.getmro(thing) if inspect.isclass(thing) else ()):
            for name, value in vars(base).items():
                function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
                public = not name.startswith("_") or name == "__call__"
                if public and inspect.isfunction(function) and of_the_package(function):
                    found[f"{base.__module__}.{function.__qualname__}"] = function
    return found


def inherited_names(thing: Any) -> set[str]:
    """Methods of a class that take the place of those of transformers or torch, which document their parameters."""
    outside = [base for base in inspect.getmro(thing) if not of_the_package(base)] if inspect.isclass(thing) else []
    return {name for base in outside for name in vars(base)} - {"__call__", "forward"}


def section(docstring: str, name: str) -> str:
    """The text under a heading such as `Args:`, without the headings that follow."""
    pieces = SECTION.split(inspect.cleandoc(docstring))
    return "".join(text for title, text in zip(pieces[1::2], pieces[2::2], strict=True) if title == name)


def entries(text: str) -> set[str]:
    """The names at the start of a section's entries; several may share one, as in `a, b:`."""
    heads = re.findall(r"^ {4}(\S[^:\n]*):", text, re.MULTILINE)
    return {
        re.sub(r" \(.*", "", part).strip("`* ") for head in heads for part in re.sub(r"\(.*?\)", "", head).split(",")
    }


def raised_in(function: Callable[..., Any]) -> set[str]:
    """Exceptions that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None)
    names = {call.func.id for call in raised if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
    return {"ImportError" if name == "missing" else name for name in names}  # extras.missing makes one


THINGS, FUNCTIONS = public_things(), functions()
INHERITED = {
    f"{base.__module__}.{base.__qualname__}.{name}"
    for thing in THINGS.values()
    for base in (inspect.getmro(thing) if inspect.isclass(thing) else ())
    for name in inherited_names(thing)
}


def test_the_reference_names_every_public_name():
    shown = named_in_reference()
    stub = ast.parse((Path(siglip_hf.__file__).parent / "__init__.pyi").read_text())
    modules = {alias.name: line.module for line in stub.body for alias in line.names}

    def is_shown(name: str) -> bool:
        members = shown.get(modules[name], [])
        return f"siglip_hf.{name}" in shown or members is None or name in members

    assert [name for name in siglip_hf.__all__ if name != "__version__" and not is_shown(name)] == []


@pytest.mark.parametrize("name", THINGS)
def test_has_a_docstring(name):
    docstring = THINGS[name].__dict__.get("__doc__") if inspect.isclass(THINGS[name]) else THINGS[name].__doc__
    assert docstring, f"{name} has no docstring"
    assert not re.search(r"^\s*Example:", docstring, re.MULTILINE), f'{name}: code belongs under "Examples:"'


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_errors_and_shapes_are_documented(name):
    function = FUNCTIONS[name]
    docstring = inspect.cleandoc(function.__doc__ or "")
    assert docstring, f"{name} has no docstring"
    parameters = [parameter for parameter in inspect.signature(function).parameters if parameter not in ("self", "cls")]
    documented = entries(section(docstring, "Args"))
    # A function of one parameter may say all in its first sentence.
    if documented or (len(parameters) > 1 and name not in INHERITED):
        missing = {parameter for parameter in parameters if parameter not in documented}
        if documented - set(parameters):
            missing -= {"kwargs", "options"}  # they are documented one by one
        assert not missing, f"{name}: Args lack {missing}"
    silent = raised_in(function) - entries(section(docstring, "Raises"))
    assert not silent, f"{name}: Raises lacks {sorted(silent)}"
    if any("Tensor" in str(annotation) for annotation in function.__annotations__.values()) and name not in INHERITED:
        assert SHAPE.search(docstring), f"{name} takes or gives tensors, and says no shape"


@pytest.mark.parametrize(
    "module", ["siglip_hf", *(m.name for m in pkgutil.walk_packages(siglip_hf.__path__, "siglip_hf."))]
)
def test_modules_say_what_they_are_for(module):
    source = importlib.util.find_spec(module).origin
    assert ast.get_docstring(ast.parse(Path(source).read_text())), f"{module} has no docstring"


@pytest.mark.parametrize("module", WITH_SOURCE)
def test_modules_cite_their_source(module):
    docstring = importlib.import_module(f"siglip_hf.{module}").__doc__
    assert re.search(r"https?://|Source:", docstring), f"{module} cites no source"
