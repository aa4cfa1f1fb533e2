"""Pictures to tensors, shared by the image processors: antialiased resizing and scaling.

On the CPU a batch is filled by NumPy, picture by picture in `threads`: its memory comes in huge pages where it is large
(fresh pages of 4 KB cost more than all the arithmetic), and it starts no threads of its own inside those.
To another device a batch goes in one copy, with 8-bit values as 8 bits, and is scaled there.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import PILImageResampling

from siglip_hf.parallel import copies_by_itself
from siglip_hf.preprocessing.image_intake import Picture
from siglip_hf.preprocessing.pillow_memory import shared_pixels

#: How many times as large as the result a picture must be, on both sides, for torch to resize it in both directions.
BOTH_FROM = 1.75

# Pillow 13 (python-pillow/Pillow#9549) filters the columns first if that saves much; before, the rows came first.
_PILLOW_PICKS_ORDER = int(PIL.__version__.partition(".")[0]) >= 13

# Before Pillow 13, pictures of more than this many times their width in height went through the columns first as well.
_VERY_HIGH = 100

# Pixels above which a copy of a picture costs more memory than torch saves time.
_LARGE = 50_000_000

# Bytes that the places of tensors in a block are multiples of.
_ALIGNMENT = 16

_TORCH_MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}


def to_tensor(picture: Picture) -> torch.Tensor:
    """(C, height, width) in channels-last memory, for which torch's 8-bit kernels are made."""
    return torch.from_numpy(picture.to_array()).permute(2, 0, 1)


def resize(picture: Picture, target: tuple[int, int], resample: PILImageResampling) -> torch.Tensor:
    """uint8 (C, *target), in one direction and then in the other, each rounded to 8 bits as Pillow does.

    Its memory is channels-last, and may have a fourth channel that is skipped.
    """
    height, width = picture.size
    # Pillow filters RGBA with premultiplied alpha, which torch cannot, and very high pictures in an order of their own.
    # For torch a large picture would be copied.
    if resample not in _TORCH_MODES or _has_alpha(picture) or height > _VERY_HIGH * width or height * width > _LARGE:
        return to_tensor(resize_with_pillow(picture, target, resample))
    columns_first = _PILLOW_PICKS_ORDER and height - target[0] > 2 * max(0, width - target[1])
    between = (target[0], width) if columns_first else (height, target[1])
    options: Any = {"mode": _TORCH_MODES[resample], "antialias": True}
    if min(height / target[0], width / target[1]) < BOTH_FROM:
        image, channels = _to_read(resize_with_pillow(picture, between, resample))  # (1, 4 or C, *between)
    else:
        image, channels = _to_read(picture)  # (1, 4 or C, height, width)
        if columns_first:  # otherwise torch goes through `between` by itself
            image = F.interpolate(image, between, **options)
    return F.interpolate(image, target, **options)[0, :channels]


def _to_read(picture: Picture) -> tuple[torch.Tensor, int]:
    """(1, C or more, height, width), which may be the picture's own memory, and how many channels mean something."""
    pixels = shared_pixels(picture.pixels) if isinstance(picture.pixels, Image.Image) else None
    channels = 3
    if pixels is None:
        pixels = picture.to_array()
        channels = pixels.shape[2]
    # In this order torch sees that the batch is channels-last, and leaves its result so.
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2), channels


def resize_with_pillow(picture: Picture, target: tuple[int, int], resample: PILImageResampling) -> Picture:
    """A picture of `target` (height, width) pixels."""
    height, width = target
    return Picture(picture.to_pil().resize((width, height), resample=resample), picture.unit_range)


def _has_alpha(picture: Picture) -> bool:
    if isinstance(picture.pixels, Image.Image):
        return picture.pixels.mode == "RGBA"
    return picture.pixels.shape[2] == 4


def division_and_shift(scale: float, mean: Any, std: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """(x * scale - mean) / std as one division and one addition: x / division + shift.

    Args:
        scale: Of all values.
        mean: One value, or one for each channel.
        std: One value, or one for each channel.
        channels: C.

    Returns:
        Division and shift, (C,) float32 each.

    Raises:
        ValueError: If there are not as many values as channels.
    """
    for name, value in (("image_mean", mean), ("image_std", std)):
        if not isinstance(value, float | int) and len(value) != channels:
            raise ValueError(f"{name}={tuple(value)} has {len(value)} values for pictures of {channels} channels")
    deviation = np.broadcast_to(np.asarray(std, np.float64), channels)
    shift = -np.broadcast_to(np.asarray(mean, np.float64), channels) / deviation
    # Division, because the usual 127.5 is exact in float32 and 1 / 127.5 is not: black and white are -1 and 1.
    return (deviation / scale).astype(np.float32), shift.astype(np.float32)


def divide_and_shift(pixels: torch.Tensor, division: np.ndarray, shift: np.ndarray) -> None:
    """pixels / division + shift in place, for float32 pixels on the CPU and arrays that broadcast to them."""
    array = pixels.numpy()
    np.divide(array, division, out=array)
    np.add(array, shift, out=array)


def common_dtype(pixels: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype that holds the values of all tensors."""
    return functools.reduce(torch.promote_types, (item.dtype for item in pixels))


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized tensor on the CPU, of NumPy's memory."""
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def put(item: torch.Tensor, into: torch.Tensor) -> None:
    """Copies pixels of the CPU to a place there; the dtypes may differ, and the shapes broadcast."""
    into.numpy()[:] = item.numpy()


class Parcel:
    """Tensors that go to a device together: one block of memory and one copy, which does not wait for the device.

    Attributes:
        parts: The tensors on the CPU, to be filled before `send`.
    """

    def __init__(self, parts: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        """Makes room.

        Args:
            parts: Shape and dtype of each tensor.
            device: Where they are to go.
        """
        self._layout = list(parts)
        self._device = device
        bytes_of = [-(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in parts]
        self._starts = [0, *itertools.accumulate(bytes_of)]
        self._pinned = copies_by_itself(device)
        self._block = torch.empty(self._starts[-1], dtype=torch.uint8, pin_memory=self._pinned)
        self.parts = self._views(self._block)

    def _views(self, block: torch.Tensor) -> list[torch.Tensor]:
        return [
            block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, (shape, dtype) in zip(self._starts, self._layout, strict=False)
        ]

    def send(self) -> list[torch.Tensor]:
        """The tensors on the device. PyTorch does not use pinned memory again before it has been copied."""
        return self._views(self._block.to(self._device, non_blocking=self._pinned))


def scaled_there(pixels: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """pixels / division + shift in one kernel, in float32 and in contiguous memory.

    Args:
        pixels: On any device, of any strides; 8-bit ones are converted in the kernel.
        factors: (2, ...), division and shift as `division_and_shift` has them; each broadcasts to `pixels`.
    """
    scaled = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    return torch.addcdiv(factors[1], pixels, factors[0], out=scaled)
