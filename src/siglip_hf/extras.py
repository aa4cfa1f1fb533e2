"""What to type when an optional dependency is missing: the packages by name, so that it works beside a wheel too."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def packages_of(extra: str) -> list[str]:
    """The requirements of one of this package's extras, those of the extras that it includes first.

    Raises:
        ValueError: if there is no such extra.
    """
    try:
        lines = requires("siglip-hf") or []
    except PackageNotFoundError:  # the sources without an installation
        return [f"siglip-hf[{extra}]"]
    found: list[str] = []
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if f'extra == "{extra}"' in marker.replace("'", '"'):
            included = re.fullmatch(r"siglip-hf\[([^\]]+)\]", requirement)
            names = included[1].split(",") if included else []
            new = [package for name in names for package in packages_of(name)] or [requirement]
            found += [package for package in new if package not in found]
    if not found:
        raise ValueError(f"there is no extra {extra!r}.")
    return found


def missing(what: str, *extras: str) -> ImportError:
    """An error to raise where an optional dependency could not be imported.

    Args:
        what: The start of the sentence, such as "the pages need gradio".
        extras: The extras that bring it.
    """
    packages = list(dict.fromkeys(package for extra in extras for package in packages_of(extra)))
    words = " ".join(f'"{package}"' if re.search(r"[<>\[ ]", package) else package for package in packages)
    return ImportError(f"{what}: pip install {words}")
