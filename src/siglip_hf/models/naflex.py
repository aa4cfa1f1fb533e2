"""Pure functions of NaFlex: learned positions on any patch grid, and pictures of different sizes in shared rows.

Sources: "SigLIP 2", https://arxiv.org/abs/2502.14786, section 2.4.2 (positions resized with antialiased bilinear
interpolation); "Patch n' Pack", https://arxiv.org/abs/2307.06304 (several pictures in one sequence).

Shapes: B pictures, N patches, D width, T tokens of all pictures together.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from siglip_hf.parallel import send


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


class Seen(NamedTuple):
    """What the host knows of a batch.

    Attributes:
        shapes: (B, 2) rows and columns, on the CPU.
        mask: (B, N), nonzero for patches and 0 for padding, on the CPU; None where the shapes say it.
        counts: Patches of each picture by its shape.
    """

    shapes: torch.Tensor
    mask: torch.Tensor | None
    counts: list[int]

    @classmethod
    def of(cls, shapes: torch.Tensor, mask: torch.Tensor | None) -> Seen:
        """Reads shapes and mask; the host waits once for the device that they are on, or not at all for the CPU."""
        if mask is not None and mask.device == shapes.device != torch.device("cpu"):
            both = torch.cat([shapes.long().flatten(), (mask != 0).long().flatten()]).cpu()
            shapes, mask = both[: shapes.numel()].view(shapes.shape), both[shapes.numel() :].view(mask.shape)
        else:
            shapes, mask = shapes.cpu(), None if mask is None else mask.cpu()
        return cls(shapes, mask, shapes.prod(dim=-1).tolist())

    def masks_nothing(self, length: int) -> bool:
        """Whether each of B rows of this length is full, so that the faster kernels without a mask can run."""
        return min(self.counts, default=0) >= length if self.mask is None else bool(self.mask.all())


class Packing(NamedTuple):
    """Where the T patches of B pictures stand in R rows of length N. All tensors list patches picture by picture.

    Each method takes the tensors to the device of its argument: the blocks of a split tower lie on several.

    Attributes:
        rows: R.
        length: N.
        batch: B.
        longest: Patches of the largest picture.
        slots: (T,) place of each patch in the flattened rows.
        pictures: (T,) number of its picture.
        patches: (T,) its number in the picture.
        bounds: (B + 1,) number of patches before each picture, and T.
    """

    rows: int
    length: int
    batch: int
    longest: int
    slots: torch.Tensor
    pictures: torch.Tensor
    patches: torch.Tensor
    bounds: torch.Tensor

    def to(self, device: torch.device | str, **_: Any) -> Packing:
        """The same on a device, to which all places go in one copy. Accelerate's hooks call it as a tensor's `to`."""
        places = [self.slots, self.pictures, self.patches, self.bounds]
        moved = send(torch.cat(places), torch.device(device)).split([len(each) for each in places])
        return self._replace(slots=moved[0], pictures=moved[1], patches=moved[2], bounds=moved[3])

    def take(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, length, ...) -> (T, ...), without the padding."""
        return padded[send(self.pictures, padded.device), send(self.patches, padded.device)]

    def fill(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (R, N, D), with zeros where no patch stands."""
        rows = tokens.new_zeros(self.rows * self.length, tokens.shape[-1])
        return rows.index_copy(0, send(self.slots, tokens.device), tokens).unflatten(0, (self.rows, self.length))

    def picture_ids(self) -> torch.Tensor:
        """(R, N): the picture that each place belongs to, -1 where no patch stands."""
        ids = self.pictures.new_full((self.rows * self.length,), -1)
        return ids.index_copy(0, self.slots, self.pictures).unflatten(0, (self.rows, self.length))

    def flash_lengths(self, queries: int | None = None) -> dict[str, Any]:
        """How flash attention tells the pictures of one row apart, in the words of transformers' interface.

        Args:
            queries: Of each picture; as many as it has patches by default.
        """
        keys = self.bounds.int()
        if queries is None:
            asked, most = keys, self.longest
        else:
            asked = torch.arange(0, self.batch * queries + 1, queries, dtype=torch.int32, device=keys.device)
            most = queries
        return {"cu_seq_lens_q": asked, "cu_seq_lens_k": keys, "max_length_q": most, "max_length_k": self.longest}

    def by_picture(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """(R, N, D) -> (B, length, D), one row per picture, with zeros for padding."""
        tokens = rows.flatten(0, 1)[send(self.slots, rows.device)]  # (T, D)
        padded = tokens.new_zeros(self.batch * length, tokens.shape[-1])
        places = send(self.pictures * length + self.patches, rows.device)
        return padded.index_copy(0, places, tokens).unflatten(0, (self.batch, length))


def pack(lengths: Sequence[int], patches: torch.Tensor | None = None, *, one_row: bool = False) -> Packing:
    """Distributes pictures over as few rows as best-fit decreasing finds; a row is as long as the longest picture.

    Longer rows would waste less space, but attention costs the square of a row's length where it is masked.

    Args:
        lengths: Number of patches of each picture.
        patches: (T,) number of each patch in its picture, where some are left out; 0, 1, 2, ... by default.
        one_row: Put all pictures behind each other in one row instead, for attention that is told where each ends.

    Raises:
        ValueError: If a picture has no patch; the message says which.
    """
    if min(lengths) < 1:
        raise ValueError(f"picture {lengths.index(0)} has no patch; each needs one at least")
    longest = max(lengths)
    counts = torch.tensor(lengths)
    pictures = torch.arange(len(lengths)).repeat_interleave(counts)  # (T,)
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # (B + 1,)
    places = torch.arange(len(pictures))
    in_picture = places - bounds[pictures]
    rows, starts = (1, None) if one_row else _best_fit(lengths, longest)
    return Packing(
        rows,
        len(pictures) if starts is None else longest,
        len(lengths),
        longest,
        places if starts is None else torch.tensor(starts)[pictures] + in_picture,
        pictures,
        in_picture if patches is None else patches,
        bounds,
    )


def _best_fit(lengths: Sequence[int], longest: int) -> tuple[int, list[int]]:
    """The number of rows, and where in the flattened rows each picture begins."""
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
    return rows, starts


def pack_masked(mask: torch.Tensor, *, one_row: bool = False) -> Packing:
    """As `pack`, for the patches that a mask (B, N) on the CPU leaves: nonzero for patches, 0 for padding."""
    kept = mask != 0
    return pack(kept.sum(dim=1).tolist(), kept.nonzero()[:, 1], one_row=one_row)
