"""Counts how often a computation waits for its device: each time Python reads a tensor's values."""

import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

READS = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "nonzero", "allclose", "equal"}


class HostReads(TorchFunctionMode):
    """Takes CPU tensors for a device's, except those that a computation made on the host or has copied to it.

    Attributes:
        count: Reads of the device's tensors so far, copies to the host among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._on_host: dict[int, Any] = {}

    def host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor that counts as the host's."""
        tensor = tensor.clone()
        self._mark(tensor)
        return tensor

    def _mark(self, tensor: torch.Tensor) -> None:
        self._on_host[id(tensor)] = weakref.ref(tensor)

    def _is_host(self, tensor: torch.Tensor) -> bool:
        reference = self._on_host.get(id(tensor))
        return reference is not None and reference() is tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name, made_on_host = getattr(func, "__name__", ""), all(map(self._is_host, tensors))
        moves_to_device = name == "to" and any(
            isinstance(argument, torch.device) for argument in (*args, *kwargs.values())
        )
        result = func(*args, **kwargs)
        if name == "cpu":
            self.count += not made_on_host
            return self.host(result)
        if name in READS and tensors and not made_on_host:
            self.count += 1
        if made_on_host and not moves_to_device and kwargs.get("device") is None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._mark(leaf)
        elif moves_to_device and made_on_host:
            return result.clone()  # on the CPU `to` gives the same tensor, which would stay the host's
        return result
