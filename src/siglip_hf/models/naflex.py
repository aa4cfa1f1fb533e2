"""Pure functions of NaFlex: learned positions on any patch grid, and pictures of different sizes in shared rows.

Sources: "SigLIP 2", https://arxiv.org/abs/2502.14786, section 2.4.2 (positions resized with antialiased bilinear
interpolation); "Patch n' Pack", https://arxiv.org/abs/2307.06304 (several pictures in one sequence).

Shapes: B pictures, N patches, D width, T tokens of all pictures together.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch


def resize_weights(index: torch.Tensor, size: torch.Tensor, source: int) -> torch.Tensor:
    """Weights of antialiased bilinear interpolation along one axis, as `torch.nn.functional.interpolate` has them.

    In closed form and without a branch on values, so that one compiled graph serves every size.

    Args:
        index: (...) place along the resized axis, in 0..size-1.
        size: (...) length of the resized axis.
        source: Length of the learned axis.

    Returns:
        (..., source) float32; the value at `index` is the weighted sum of the learned ones.
    """
    scale = source / size.float()
    centre = (index + 0.5) * scale
    places = torch.arange(source, device=index.device) + 0.5
    # A triangle as wide as a step of the resized axis, where that is longer than one of the learned axis.
    distance = (places - centre.unsqueeze(-1)).abs() / scale.clamp(min=1).unsqueeze(-1)
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


def resized_positions(
    table: torch.Tensor, grid: tuple[int, int], shapes: torch.Tensor, patch_ids: torch.Tensor
) -> torch.Tensor:
    """Learned positions for patches of pictures of any grids: one matrix product for all of them.

    Args:
        table: (rows * columns, D) learned positions of `grid`.
        grid: Rows and columns of the learned positions.
        shapes: (..., 2) rows and columns of the picture that a patch belongs to.
        patch_ids: (...) number of the patch in its picture, row by row.

    Returns:
        (..., D) in the dtype of `table`; computed in float32.
    """
    rows, columns = shapes.unbind(-1)
    by_row = resize_weights(patch_ids // columns, rows, grid[0])  # (..., rows)
    by_column = resize_weights(patch_ids % columns, columns, grid[1])  # (..., columns)
    weights = (by_row.unsqueeze(-1) * by_column.unsqueeze(-2)).flatten(-2)  # (..., rows * columns)
    kind = table.device.type
    # Autocast would round the weights of the sum, and positions with them, to half precision.
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        return (weights @ table.float()).to(table.dtype)


class Packing(NamedTuple):
    """Where the T patches of B pictures stand in R rows of length N. All tensors list patches picture by picture.

    The tensors lie on the CPU; each method takes them to the device of its argument.

    Attributes:
        rows: R.
        length: N.
        batch: B.
        slots: (T,) place of each patch in the flattened rows.
        pictures: (T,) number of its picture.
        patches: (T,) its number in the picture.
    """

    rows: int
    length: int
    batch: int
    slots: torch.Tensor
    pictures: torch.Tensor
    patches: torch.Tensor

    def take(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, length, ...) -> (T, ...), without the padding."""
        return padded[_to(self.pictures, padded), _to(self.patches, padded)]

    def fill(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (R, N, D), with zeros where no patch stands."""
        rows = tokens.new_zeros(self.rows * self.length, tokens.shape[-1])
        return rows.index_copy(0, _to(self.slots, tokens), tokens).unflatten(0, (self.rows, self.length))

    def picture_ids(self) -> torch.Tensor:
        """(R, N): the picture that each place belongs to, -1 where no patch stands."""
        ids = self.pictures.new_full((self.rows * self.length,), -1)
        return ids.index_copy(0, self.slots, self.pictures).unflatten(0, (self.rows, self.length))

    def by_picture(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """(R, N, D) -> (B, length, D), one row per picture, with zeros for padding."""
        tokens = rows.flatten(0, 1)[_to(self.slots, rows)]  # (T, D)
        padded = tokens.new_zeros(self.batch * length, tokens.shape[-1])
        places = _to(self.pictures * length + self.patches, rows)
        return padded.index_copy(0, places, tokens).unflatten(0, (self.batch, length))


def _to(places: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return places.to(tensor.device, non_blocking=True)


def pack(lengths: Sequence[int], patches: torch.Tensor | None = None) -> Packing:
    """Distributes pictures over as few rows as best-fit decreasing finds; a row is as long as the longest picture.

    Longer rows would waste less space, but attention costs the square of a row's length where it is masked.

    Args:
        lengths: Number of patches of each picture.
        patches: (T,) number of each patch in its picture, where some are left out; 0, 1, 2, ... by default.

    Raises:
        ValueError: If a picture has no patch; the message says which.
    """
    if min(lengths) < 1:
        raise ValueError(f"picture {lengths.index(0)} has no patch; each needs one at least")
    longest = max(lengths)
    starts = [0] * len(lengths)
    free: list[tuple[int, int]] = []  # (places left, row), ascending
    rows = 0
    for picture in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(free, (lengths[picture], 0))
        if place == len(free):
            left, row, rows = longest, rows, rows + 1
        else:
            left, row = free.pop(place)
        starts[picture] = row * longest + longest - left
        insort(free, (left - lengths[picture], row))
    counts = torch.tensor(lengths)
    pictures = torch.arange(len(lengths)).repeat_interleave(counts)  # (T,)
    in_picture = torch.arange(len(pictures)) - (counts.cumsum(0) - counts)[pictures]
    slots = torch.tensor(starts)[pictures] + in_picture
    return Packing(rows, longest, len(lengths), slots, pictures, in_picture if patches is None else patches)


def pack_masked(mask: torch.Tensor) -> Packing:
    """As `pack`, for the patches that a mask (B, N) leaves: nonzero for patches, 0 for padding."""
    kept = mask.cpu() != 0
    return pack(kept.sum(dim=1).tolist(), kept.nonzero()[:, 1])
