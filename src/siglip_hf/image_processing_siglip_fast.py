"""Pictures to `pixel_values` with torch alone: antialiased resizing of 8-bit channels-last memory.

Same defaults, arguments and intake as `SiglipImageProcessor`; torchvision is neither imported nor needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict

from .image_intake import Picture
from .image_processing_siglip import SiglipImageProcessorBase, pillow_filter, resized_size, value_scale

#: How many times as large as the result a picture must be, on both sides, for torch to resize it in both directions.
BOTH_FROM = 1.75

# Pillow 13 (python-pillow/Pillow#9549) filters the columns first if that saves much; before, the rows came first.
_PILLOW_PICKS_ORDER = int(PIL.__version__.partition(".")[0]) >= 13

_TORCH_MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}


class SiglipImageProcessorFast(SiglipImageProcessorBase):
    """Turns pictures into `pixel_values` with torch, several times faster than Pillow.

    It differs from `SiglipImageProcessor` in the resizing only, and by at most one level of 255 (1/255 before
    normalization, 2/255 after it with std 0.5). Both filter rows and columns in the same order and round to 8 bits
    after each, but torch's kernel has 16-bit weights where Pillow's have 22, so that a value close to a half may be
    rounded the other way. That hits up to 2 % of the values in noise of full contrast, where the largest errors are,
    fewer in photographs, and none in flat regions.

    Two such roundings in a row could add up to two levels where one weight takes nearly all: when a picture is enlarged
    or hardly reduced, to more than 1 / `BOTH_FROM` of a side. Then Pillow filters the first direction, which leaves one
    rounding. Pillow also serves the filters other than bilinear and bicubic, and an alpha channel that is kept
    (`do_convert_rgb=False`), without any difference.

    With `device`, the resized 8-bit values are sent there, a quarter of the bytes, and normalized there. Without it,
    the result lies where the first picture does, if that is a tensor. Without `return_tensors`, `pixel_values` is a
    list of tensors.

    Example:
        >>> processor = SiglipImageProcessorFast(size={"height": 384, "width": 384})
        >>> processor(["cat.jpg", "dog.png"], return_tensors="pt", device="cuda").pixel_values.shape
        torch.Size([2, 3, 384, 384])
    """

    @property
    def backend(self) -> str:
        """The name of what does the work: "torch"."""
        return "torch"

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, device: Any = None, **kwargs: Any) -> BatchFeature:
        if device is None:
            first = images
            while isinstance(first, list | tuple) and first and not isinstance(first, Picture):
                first = first[0]
            device = first.device if isinstance(first, torch.Tensor) else "cpu"
        return super()._preprocess_image_like_inputs(images, *args, device=torch.device(device), **kwargs)

    def _preprocess(  # type: ignore[override]
        self,
        images: Iterable[Picture],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        do_pad: bool,
        pad_size: SizeDict,
        return_tensors: str | None,
        device: torch.device,
        data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        pixels, scales = [], []
        for picture in images:
            if do_resize:
                pixels.append(_resize(picture, resized_size(size, *picture.size), pillow_filter(resample)))
            else:
                pixels.append(_to_tensor(picture))
            scales.append(value_scale(picture, do_rescale, rescale_factor))
        if do_center_crop:
            pixels = [_center_crop(item, crop_size) for item in pixels]

        mean, std = (image_mean, image_std) if do_normalize else (0.0, 1.0)
        as_they_are = not do_normalize and all(scale == 1 for scale in scales)
        results: Any
        if len({item.shape for item in pixels}) == 1:
            if as_they_are:
                results = torch.stack(pixels).to(device)
            else:
                results = torch.empty(len(pixels), *pixels[0].shape, device=device)  # (B, C, h, w)
                for item, result in zip(pixels, results, strict=True):
                    result.copy_(item)
                _scale_and_normalize(results, scales, mean, std)
        else:
            results = [item.to(device) if as_they_are else item.to(device, torch.float32) for item in pixels]
            for item, scale in zip(results, scales, strict=True):
                if not as_they_are:
                    _scale_and_normalize(item[None], [scale], mean, std)
        if do_pad:
            results = _pad(results, pad_size)
        if ChannelDimension(data_format or "channels_first") == ChannelDimension.LAST:
            results = [item.permute(1, 2, 0) for item in results]
        return _to_feature(results, return_tensors)


def _to_tensor(picture: Picture) -> torch.Tensor:
    """(C, height, width) in channels-last memory, for which torch's 8-bit kernels are made."""
    return torch.from_numpy(picture.to_array()).permute(2, 0, 1)


def _resize(picture: Picture, target: tuple[int, int], resample: PILImageResampling) -> torch.Tensor:
    """uint8 (C, *target), in one direction and then in the other, each rounded to 8 bits as Pillow does."""
    # Pillow filters RGBA with premultiplied alpha, which torch cannot.
    if resample not in _TORCH_MODES or _has_alpha(picture):
        return _to_tensor(_resize_with_pillow(picture, target, resample))
    height, width = picture.size
    columns_first = _PILLOW_PICKS_ORDER and height - target[0] > 2 * max(0, width - target[1])
    between = (target[0], width) if columns_first else (height, target[1])
    options: Any = {"mode": _TORCH_MODES[resample], "antialias": True}
    if min(height / target[0], width / target[1]) < BOTH_FROM:
        image = _to_tensor(_resize_with_pillow(picture, between, resample))[None]  # (1, C, *between)
    else:
        image = _to_tensor(picture)[None]  # (1, C, height, width)
        if columns_first:  # otherwise torch goes through `between` by itself
            image = F.interpolate(image, between, **options)
    return F.interpolate(image, target, **options)[0]


def _resize_with_pillow(picture: Picture, target: tuple[int, int], resample: PILImageResampling) -> Picture:
    height, width = target
    return Picture(picture.to_pil().resize((width, height), resample=resample))


def _has_alpha(picture: Picture) -> bool:
    if isinstance(picture.pixels, Image.Image):
        return picture.pixels.mode == "RGBA"
    return picture.pixels.shape[2] == 4


def _scale_and_normalize(batch: torch.Tensor, scales: list[float], mean: Any, std: Any) -> None:
    """(x * scale - mean) / std in place, as one division and one addition; batch is float32 (B, C, h, w)."""
    channels = batch.shape[1]
    for name, value in (("image_mean", mean), ("image_std", std)):
        if not isinstance(value, float | int) and len(value) != channels:
            raise ValueError(f"{name}={tuple(value)} has {len(value)} values for pictures of {channels} channels")
    scale = torch.tensor(scales if len(set(scales)) > 1 else scales[:1], dtype=torch.float64).view(-1, 1, 1, 1)
    deviation = torch.as_tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
    shift = -torch.as_tensor(mean, dtype=torch.float64).view(1, -1, 1, 1) / deviation
    # Division, because the usual 127.5 is exact in float32 and 1 / 127.5 is not: black and white are -1 and 1.
    torch.addcdiv(shift.to(batch), batch, (deviation / scale).to(batch), out=batch)


def _center_crop(image: torch.Tensor, size: SizeDict) -> torch.Tensor:
    """The middle of (C, height, width), with zeros where the picture does not reach."""
    if not (size.height and size.width):
        raise ValueError(f"crop_size={dict(size)} must have 'height' and 'width'")
    height, width = image.shape[1:]
    # Negative where the picture is cut. As in stock: an odd pixel is cut below and right, but added above and left.
    up, left = -(-(size.height - height) // 2), -(-(size.width - width) // 2)
    return F.pad(image, (left, size.width - width - left, up, size.height - height - up))


def _pad(images: Any, size: SizeDict) -> list[torch.Tensor]:
    """Zeros below and to the right of each (C, h, w)."""
    if not (size.height and size.width):
        raise ValueError(f"pad_size={dict(size)} must have 'height' and 'width'")
    padded = []
    for image in images:
        below, right = size.height - image.shape[1], size.width - image.shape[2]
        if below < 0 or right < 0:
            raise ValueError(f"pad_size={dict(size)} is smaller than a picture of {tuple(image.shape[1:])} pixels")
        padded.append(F.pad(image, (0, right, 0, below)))
    return padded


def _to_feature(results: Any, return_tensors: Any) -> BatchFeature:
    if return_tensors is None:
        return BatchFeature(data={"pixel_values": list(results)})
    if str(getattr(return_tensors, "value", return_tensors)) == "np":
        results = [item.cpu().numpy() for item in results]
    return BatchFeature(data={"pixel_values": results}, tensor_type=return_tensors)
