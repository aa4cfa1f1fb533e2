"""Pictures to tensors, shared by the image processors: antialiased resizing and scaling.

On the CPU a batch is filled by NumPy, picture by picture in `threads`: its memory comes in huge pages where it is large
(fresh pages of 4 KB cost more than all the arithmetic), and it starts no threads of its own inside those.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import PILImageResampling

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
    """pixels / division + shift in place, for float32 pixels and arrays that broadcast to them."""
    if pixels.device.type == "cpu":
        array = pixels.numpy()
        np.divide(array, division, out=array)
        np.add(array, shift, out=array)
    else:
        divisor, offset = (torch.from_numpy(values).to(pixels.device) for values in (division, shift))
        torch.addcdiv(offset, pixels, divisor, out=pixels)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialized tensor; on the CPU, of NumPy's memory."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def put(item: torch.Tensor, into: torch.Tensor) -> None:
    """Copies pixels into memory of `empty`; the dtypes may differ, and the shapes broadcast."""
    if into.device.type == "cpu":
        into.numpy()[:] = item.numpy()
    else:
        into.copy_(item)
