"""Pure functions of NaFlex: learned positions on any patch grid, and pictures of different sizes in shared rows.

Sources: "SigLIP 2", https://arxiv.org/abs/2502.14786, section 2.4.2 (positions resized with antialiased bilinear
interpolation); "Patch n' Pack", https://arxiv.org/abs/2307.06304 (several pictures in one sequence).

Shapes: B pictures, N patches, D width, T tokens of all pictures together.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
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
    return (weights @ table.float()).to(table.dtype)


class Packing(NamedTuple):
    """Where the T patches of B pictures stand in R rows of length N. All tensors list patches picture by picture.

    Attributes:
        rows: R.
        length: N.
        slots: (T,) place of each patch in the flattened rows.
        pictures: (T,) number of its picture.
        patches: (T,) its number in the picture.
    """

    rows: int
    length: int
    slots: torch.Tensor
    pictures: torch.Tensor
    patches: torch.Tensor

    def fill(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (R, N, D), with zeros where no patch stands."""
        rows = tokens.new_zeros(self.rows * self.length, tokens.shape[-1])
        return rows.index_copy(0, self.slots, tokens).unflatten(0, (self.rows, self.length))

    def picture_ids(self) -> torch.Tensor:
        """(R, N): the picture that each place belongs to, -1 where no patch stands."""
        ids = self.pictures.new_full((self.rows * self.length,), -1)
        return ids.index_copy(0, self.slots, self.pictures).unflatten(0, (self.rows, self.length))

    def by_picture(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """(R, N, D) -> (B, length, D), one row per picture, with zeros for padding."""
        tokens = rows.flatten(0, 1)[self.slots]  # (T, D)
        count = int(self.pictures[-1]) + 1
        padded = tokens.new_zeros(count * length, tokens.shape[-1])
        return padded.index_copy(0, self.pictures * length + self.patches, tokens).unflatten(0, (count, length))


def pack(lengths: Sequence[int], device: torch.device | str | None = None) -> Packing:
    """Distributes pictures over as few rows as best-fit decreasing finds; a row is as long as the longest picture.

    Longer rows would waste less space, but attention costs the square of a row's length where it is masked.

    Args:
        lengths: Number of patches of each picture, at least 1.
        device: Where the tensors of the result are made.
    """
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
    patches = torch.arange(len(pictures)) - (counts.cumsum(0) - counts)[pictures]
    slots = torch.tensor(starts)[pictures] + patches
    return Packing(rows, longest, slots.to(device), pictures.to(device), patches.to(device))
