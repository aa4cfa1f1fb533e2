"""Pictures to `pixel_values` with torch alone: antialiased resizing of 8-bit channels-last memory.

Same defaults, arguments and intake as `SiglipImageProcessor`; torchvision is neither imported nor needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, SizeDict

from siglip_hf.parallel import PIXELS, in_threads
from siglip_hf.preprocessing.image_intake import Picture
from siglip_hf.preprocessing.image_processing_siglip import (
    SiglipImageProcessorBase,
    pillow_filter,
    resized_size,
    value_scale,
)
from siglip_hf.preprocessing.image_tensors import (
    Parcel,
    common_dtype,
    divide_and_shift,
    division_and_shift,
    empty,
    put,
    resize,
    scaled_there,
    to_tensor,
)


class SiglipImageProcessorFast(SiglipImageProcessorBase):
    """Turns pictures into `pixel_values` with torch, several times faster than Pillow.

    It differs from `SiglipImageProcessor` in the resizing only, and by at most one level of 255 (1/255 before
    normalization, 2/255 after it with std 0.5). Both filter rows and columns in the same order and round to 8 bits
    after each, but torch's kernel has 16-bit weights where Pillow's have 22, so that a value close to a half may be
    rounded the other way. That hits up to 2 % of the values in noise of full contrast, where the largest errors are,
    fewer in photographs, and none in flat regions.

    Two such roundings in a row could add up to two levels where one weight takes nearly all: when a picture is enlarged
    or hardly reduced, to more than 1 / `BOTH_FROM` of a side. Then Pillow filters the first direction, which leaves one
    rounding. Pillow also serves the filters other than bilinear and bicubic, an alpha channel that is kept
    (`do_convert_rgb=False`), and pictures more than 100 times as high as wide, without any difference.

    With `device`, the resized 8-bit values of a batch are sent there in one copy, a quarter of the bytes, and
    normalized there. Without it, the result lies where the first picture does, if that is a tensor. Without
    `return_tensors`, `pixel_values` is a list of tensors.

    Examples:
        >>> from siglip_hf import SiglipImageProcessorFast
        >>> processor = SiglipImageProcessorFast(size={"height": 384, "width": 384})
        >>> processor(["drawings/cat.png", "drawings/key.png"], return_tensors="pt", device="cpu").pixel_values.shape
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
        images: Iterable[Callable[[], Picture]],
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
        @PIXELS.bounded()
        def resized(read: Callable[[], Picture]) -> tuple[torch.Tensor, float]:
            picture = read()
            scale = value_scale(picture, do_rescale, rescale_factor)
            if not do_resize:
                return to_tensor(picture), scale
            return resize(picture, resized_size(size, *picture.size), pillow_filter(resample)), scale

        pixels, scales = map(list, zip(*in_threads(resized, images), strict=True))
        if do_center_crop:
            pixels = [_center_crop(item, crop_size) for item in pixels]

        mean, std = (image_mean, image_std) if do_normalize else (0.0, 1.0)
        as_they_are = not do_normalize and all(scale == 1 for scale in scales)
        kept = common_dtype(pixels)
        factors = (
            None
            if as_they_are
            else [division_and_shift(scale, mean, std, len(item)) for scale, item in zip(scales, pixels, strict=True)]
        )
        if device.type != "cpu":
            results = _sent(pixels, kept if as_they_are or kept == torch.uint8 else torch.float32, factors, device)
        else:
            results = _filled(pixels, kept if as_they_are else torch.float32, factors)
        if do_pad:
            results = _pad(results, pad_size)
        if ChannelDimension(data_format or "channels_first") == ChannelDimension.LAST:
            results = [item.permute(1, 2, 0) for item in results]
        return _to_feature(results, return_tensors)


def _filled(pixels: list[torch.Tensor], dtype: torch.dtype, factors: list[Any] | None) -> Any:
    """(B, C, h, w) on the CPU, or a list of (C, h, w) if the sizes differ; scaled by `factors`, if there are any."""
    results: Any
    if len({item.shape for item in pixels}) == 1:
        results = empty((len(pixels), *pixels[0].shape), dtype)
    else:
        results = [empty(tuple(item.shape), dtype) for item in pixels]

    def fill(number: int) -> None:
        put(pixels[number], into=results[number])
        if factors is not None:
            divide_and_shift(results[number], *(values[:, None, None] for values in factors[number]))

    list(in_threads(fill, range(len(pixels))))
    return results


def _sent(pixels: list[torch.Tensor], dtype: torch.dtype, factors: list[Any] | None, device: torch.device) -> Any:
    """As `_filled`, on another device: all pictures go there in one copy, as `dtype`, and are scaled there."""
    alike = len({item.shape for item in pixels}) == 1
    groups = [pixels] if alike else [[item] for item in pixels]
    parts = [((len(group), *group[0].shape[1:], len(group[0])), dtype) for group in groups]  # (n, h, w, C)
    if factors is not None:
        parts += [((2, len(group), len(group[0])), torch.float32) for group in groups]  # (2, n, C)
    parcel = Parcel(parts, device)
    places = [place for part in parcel.parts[: len(groups)] for place in part]

    def fill(number: int) -> None:
        put(pixels[number].permute(1, 2, 0), into=places[number])

    list(in_threads(fill, range(len(pixels))))
    if factors is not None:
        of_pictures = [place for part in parcel.parts[len(groups) :] for place in part.unbind(1)]  # (2, C) each
        for place, values in zip(of_pictures, factors, strict=True):
            place.numpy()[:] = values
    sent = parcel.send()
    results = [part.permute(0, 3, 1, 2) for part in sent[: len(groups)]]  # (n, C, h, w)
    if factors is None:
        results = [part.contiguous() for part in results]
    else:
        scales = (part[..., None, None] for part in sent[len(groups) :])
        results = [scaled_there(part, scale) for part, scale in zip(results, scales, strict=True)]
    return results[0] if alike else [part[0] for part in results]


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
