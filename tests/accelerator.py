"""An accelerator made of CPU memory: its tensors have values, and it tells what the host sends, fetches and waits for.

PyTorch sees tensors of another device, which mix with the CPU's as little as CUDA's do. What would block the host is
noted: copies that are not `non_blocking`, values that Python reads, shapes that depend on values, waiting for an event.
What is fetched without waiting arrives when the host waits for an event that was recorded after it, and not before.
To import this defines the name "gpu" for the rest of the process, and has to come before siglip_hf.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo  # it builds on `torch.Event`, before that is replaced
import torch.utils.backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
NAME = "gpu"

# What must know values to give a shape or a number.
_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
}


class Note(NamedTuple):
    """One thing that the host did.

    Attributes:
        kind: "launch" of a kernel, "send" to the device, "fetch" from it, copy "between" devices, "read" of a value,
            "wait" for an event.
        name: The operator; of waiting, the number of the event.
        bytes: That were copied.
        blocks: Whether the host waited for the device.
        pinned: Whether the memory on the host was pinned.
        stream: On which stream.
    """

    kind: str
    name: Any = ""
    bytes: int = 0
    blocks: bool = False
    pinned: bool = False
    stream: int = 0


class Stream:
    """Stands in for `torch.Stream`; number 0 is the device's own."""

    def __init__(self, device: Any = None, *, owner: Accelerator) -> None:
        self.owner, self.device = owner, device
        self.number = owner.streams
        self.waits_for: list[int] = []  # numbers of events
        self.holds: list[torch.Tensor] = []  # what must not be freed before it is through
        owner.streams += 1

    def __enter__(self) -> Stream:
        self.before, self.owner.stream = self.owner.stream, self
        return self

    def __exit__(self, *error: Any) -> None:
        self.owner.stream = self.before

    def record_event(self, event: Event | None = None) -> Event:
        event = Event(owner=self.owner) if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        assert event.after is not None, "a stream waits for an event that is not recorded"
        self.waits_for.append(event.number)


class Event:
    """Stands in for `torch.Event`."""

    def __init__(self, device: Any = None, *, owner: Accelerator) -> None:
        self.owner = owner
        self.number, owner.events = owner.events, owner.events + 1
        self.after: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.after = len(self.owner.due)

    def synchronize(self) -> None:
        assert self.after is not None, "the host waits for an event that is not recorded"
        self.owner.note("wait", self.number, blocks=True)
        self.owner.arrive(self.after)


class DeviceTensor(torch.Tensor):
    """A tensor of the accelerator, whose values are those of `inner` in CPU memory."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.inner}, device={self.device})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def record_stream(self, stream: Stream) -> None:
        """The memory is used on that stream too."""
        stream.holds.append(self)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the accelerator outside of `Accelerator`")


class Accelerator(TorchDispatchMode):
    """While it is entered, "gpu:0", "gpu:1", ... can be used.

    Attributes:
        notes: What has been done since it was entered, or since `notes` was cleared.
        due: What was fetched without waiting: where to, and the values, until they have arrived.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Note] = []
        self.due: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self.events = self.streams = 0
        self.stream = Stream(owner=self)
        self._pinned: set[int] = set()

    def __enter__(self) -> Accelerator:
        self._patches = [
            mock.patch.object(torch, "Stream", lambda device=None: Stream(device, owner=self)),
            mock.patch.object(torch, "Event", lambda device=None: Event(device, owner=self)),
            mock.patch.object(torch.accelerator, "current_stream", self.current_stream),
        ]
        for patch in self._patches:
            patch.start()
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` passes here
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        for patch in self._patches:
            patch.stop()

    def current_stream(self, device: Any = None) -> Stream:
        """The stream that work is put on now."""
        return self.stream

    def note(self, kind: str, name: Any = "", **facts: Any) -> None:
        """Adds a note."""
        self.notes.append(Note(kind, name, stream=self.stream.number, **facts))

    def arrive(self, count: int) -> None:
        """The first `count` things that were fetched without waiting are there now."""
        for place, entry in enumerate(self.due[:count]):
            if entry is not None:
                aten.copy_.default(*entry)
                self.due[place] = None

    def of(self, *kinds: str) -> list[Note]:
        """The notes of these kinds."""
        return [note for note in self.notes if note.kind in kinds]

    @property
    def blocking(self) -> list[Note]:
        """The notes of what blocked the host."""
        return [note for note in self.notes if note.blocks]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        own = {tensor.device for tensor in tensors if isinstance(tensor, DeviceTensor)}
        wanted = _indexed(torch.device(kwargs["device"])) if kwargs.get("device") is not None else None
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
            made = func(*args, **kwargs)
            self._pinned.add(made.untyped_storage().data_ptr())
            return made
        if not own and func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if not own and func is aten._pin_memory.default:
            made = args[0].clone()
            self._pinned.add(made.untyped_storage().data_ptr())
            return made
        if not own and (wanted is None or wanted.type != NAME):
            return func(*args, **kwargs)
        if func is aten.copy_.default:
            return self._copy(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._move(args[0], wanted or args[0].device, **{**kwargs, "device": None})
        device = wanted or next(iter(own))
        self._refuse_mixtures(func, args, tensors, own)
        self._note(func, args)
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        result = tree_map(lambda leaf: DeviceTensor(leaf, device) if isinstance(leaf, torch.Tensor) else leaf, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if own else result

    def _note(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__
        masked = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func in _READS or masked:
            self.note("read", name, blocks=True)
        elif func.is_view or name in ("detach", "alias", "lift_fresh", "empty", "empty_strided", "empty_like"):
            return
        else:
            self.note("launch", name)

    def _refuse_mixtures(self, func: Any, args: Any, tensors: list[torch.Tensor], own: set[torch.device]) -> None:
        of_host = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.ndim]
        if len(own) > 1 or (own and of_host):
            found = sorted({str(tensor.device) for tensor in tensors})
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found {', '.join(found)}")

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _transfer(self, source: torch.Tensor, target: Any, device: torch.device, non_blocking: bool) -> None:
        """Notes a copy of `source` to `device`; `target` is where it goes, if that was there before."""
        size, blocks = source.numel() * source.element_size(), not non_blocking
        if not isinstance(source, DeviceTensor):
            self.note("send", bytes=size, blocks=blocks, pinned=self._is_pinned(source))
        elif device.type == "cpu":
            pinned = target is not None and self._is_pinned(target)
            self.note("fetch", bytes=size, blocks=blocks, pinned=pinned)
        elif source.device != device:
            self.note("between", bytes=size)
        else:
            self.note("launch", "copy")

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if source.dtype != target.dtype and source.device != target.device and not isinstance(source, DeviceTensor):
            source = source.to(target.dtype)  # as CUDA does: on the CPU, before it is sent
        self._transfer(source, target, target.device, non_blocking)
        if non_blocking and isinstance(source, DeviceTensor) and target.device.type == "cpu":
            self.due.append((target, source.inner.clone()))
            target.fill_(float("nan") if target.is_floating_point() else -1)
        else:
            aten.copy_.default(_inner(target), _inner(source))
        return target

    def _move(
        self, source: torch.Tensor, target: torch.device, non_blocking: bool = False, **options: Any
    ) -> torch.Tensor:
        device = _indexed(target)
        changed = options.get("dtype") not in (None, source.dtype)
        if changed and source.device != device and not isinstance(source, DeviceTensor):
            source = source.to(options["dtype"])
        self._transfer(source, None, device, non_blocking)
        made = aten._to_copy.default(_inner(source), **options)
        return made if device.type == "cpu" else DeviceTensor(made, device)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value


def _indexed(device: torch.device) -> torch.device:
    return torch.device(NAME, 0) if device == torch.device(NAME) else device


class _Module(torch.utils.backend_registration._DummyBackendModule):
    """What `torch.cuda` is to CUDA."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
# Inference mode takes no views of subclasses.
torch.inference_mode = lambda mode=True: torch.set_grad_enabled(not mode)  # type: ignore[misc, assignment]
