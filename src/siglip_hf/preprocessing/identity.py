"""Whose class is it? What diffusers writes about ours, and what becomes of a repository that brings code of its own.

transformers prefers a registered class to a repository's code, even with `trust_remote_code=True`, unless the class is
its own (`explicit_local_code` in `models/auto`). So our classes give way themselves where they are told of the trust.
"""

from __future__ import annotations

import json
import os
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

_PACKAGE = __name__.partition(".")[0]
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class KnownAsStock:
    """Instances of our own classes give "transformers" as their `__module__`; the classes keep their real one.

    diffusers writes the first word of that into `model_index.json` and loads the class of this name from there. Only
    so can the folder be loaded without this package, and with it in a process that has not imported it. A pipeline that
    is loaded has stock's classes, as a published one has. Nothing is pickled or imported by an instance's `__module__`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        if is_ours(cls):
            vars(self)["__module__"] = "transformers"
        return self


def is_ours(cls: type) -> bool:
    """Whether a class is this package's own, and not a subclass from elsewhere."""
    return cls.__module__.partition(".")[0] == _PACKAGE


def read_json(name: Any, file: str, options: dict[str, Any]) -> dict[str, Any]:
    """A file of a folder or repository; empty if it has none of that name.

    Args:
        name: Name or folder of the checkpoint.
        file: The file's name.
        options: Arguments of `from_pretrained`, of which those about the hub are used.
    """
    path = cached_file(
        name,
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **_hub_options(options),
    )
    if path is None:
        return {}
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)


def code_in_files(name: Any, kind: str, files: tuple[str, ...], options: dict[str, Any]) -> str | None:
    """The class that a repository brings for an Auto class, as "module.Class"; None if it brings none.

    Args:
        name: Name or folder of the checkpoint.
        kind: The Auto class, such as "AutoProcessor".
        files: Where its `auto_map` may be; the first that names the class counts.
        options: Arguments of `from_pretrained`.
    """
    for file in files:
        if reference := reference_in(read_json(name, file, options).get("auto_map"), kind):
            return reference
    return None


def reference_in(auto_map: Any, kind: str) -> str | None:
    """An Auto class's entry of an `auto_map`. Of several, by backend or slow and fast, the last one that is there."""
    entry = auto_map.get(kind) if isinstance(auto_map, dict) else None
    if isinstance(entry, dict):
        entry = list(entry.values())
    return next((part for part in reversed(entry) if part), None) if isinstance(entry, list | tuple) else entry


def repository_class(reference: str, name: Any, kind: str, options: dict[str, Any]) -> Any:
    """Imports a class that a repository brings; only if the user has said `trust_remote_code=True`."""
    code_revision = options.pop("code_revision", None)
    own: Any = get_class_from_dynamic_module(reference, name, code_revision=code_revision, **_hub_options(options))
    own.register_for_auto_class(kind)  # so that saving the object copies its code, as transformers does
    return own


def warn_of_own_code(reference: str, name: Any, kind: str, ours: type) -> None:
    """Says once that a repository's class is not used, and how to get it.

    For Auto classes that do not pass `trust_remote_code` on, so that our class cannot know whether it was said.
    """
    name = os.fspath(name)
    logger.warning_once(
        f"{name} brings code of its own for {kind}, {reference}; siglip_hf's {ours.__name__} is used in its place, "
        "also with trust_remote_code=True. To run the repository's code, if you trust it: from "
        "transformers.dynamic_module_utils import get_class_from_dynamic_module; "
        f"get_class_from_dynamic_module({reference!r}, {name!r}).from_pretrained({name!r})"
    )


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    return {argument: options[argument] for argument in _HUB_ARGUMENTS if options.get(argument) is not None}
