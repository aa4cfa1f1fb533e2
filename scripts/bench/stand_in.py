"""open_clip and timm where torchvision, which they import and do not need for a forward pass, is not installed."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


class _StandIn(type):
    """Names of torchvision that are imported and not used: classes whose attributes are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandInModule(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name, (), {})


class _TorchvisionStandIn:
    """Finds any module of torchvision, as an empty one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_peer(name: str) -> Any:
    """open_clip, timm or a module of another peer, with a stand-in for torchvision where that is not installed.

    Args:
        name: dotted name of the module.

    Returns:
        The module; None without the peer.
    """
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(name)
    finder = _TorchvisionStandIn()
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]


def import_torchvision() -> Any:
    """torchvision, of which only transforms are asked; None where it is not installed.

    A build for another torch (CUDA's beside the CPU's) has operators that do not load, and its import ends at one of
    them. Their names are declared then; its transforms are Python.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        import torch

        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("torchvision")
