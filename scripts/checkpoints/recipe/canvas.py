"""Training pictures of any shape: a drawing somewhere on a wide or tall canvas, stretched, or two side by side.

All pictures of a step have one grid of patches, so that training needs neither padding nor a mask.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .pictures import Augmenter, Drawn, PictureSet, on_background

#: Budgets of patches that steps are drawn from: small ones often, since they cost little.
BUDGETS = (16, 16, 16, 25, 25, 36, 64)
WIDEST = 5.0  # ratio of the sides
SQUARE_SHARE = 0.35


def to_patches(pixels: Tensor, patch_size: int) -> dict[str, Tensor]:
    """(B, C, rows * p, columns * p) as inputs of a NaFlex model."""
    patches = pixels.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, rows, p, columns, p)
    rows, columns = patches.shape[2], patches.shape[4]
    values = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, p * p * C)
    return {"pixel_values": values, "spatial_shapes": torch.tensor([[rows, columns]]).expand(len(pixels), 2)}


def place(canvas: Tensor, drawings: Tensor, offsets: Tensor) -> None:
    """Put premultiplied RGBA (B, 4, h, w) on canvases (B, 3, H, W) in 0..1, at offsets (B, 2) in pixels."""
    height, width = drawings.shape[2:]
    for target, drawing, (top, left) in zip(canvas, drawings, offsets.tolist(), strict=True):
        area = target[:, top : top + height, left : left + width]
        area.mul_(1 - drawing[3:]).add_(drawing[:3])


class CanvasAugmenter(Augmenter):
    """Augments batches as for square pictures, then puts them on canvases of a random shape.

    Args:
        patch_size: Side of a patch in pixels.
        generator: Source of all randomness.
    """

    def __init__(self, patch_size: int, generator: torch.Generator) -> None:
        super().__init__(0, generator)  # the size is drawn for each batch
        self.patch_size = patch_size

    def draw_grid(self) -> tuple[int, int]:
        """Rows and columns of a batch, within a budget."""
        budget = BUDGETS[int(torch.randint(len(BUDGETS), (), generator=self.generator))]
        ratio = 1.0
        if self._uniform((), 0, 1) > SQUARE_SHARE:
            ratio = math.exp(float(self._uniform((), -math.log(WIDEST), math.log(WIDEST))))
        rows = max(1, min(budget, int(math.sqrt(budget / ratio) + 0.5)))
        return rows, max(1, budget // rows)

    def batch(self, pictures: PictureSet, chosen: Tensor, strength: float) -> Drawn:
        """Make training pictures of one grid from the drawings `chosen` (B,)."""
        rows, columns = self.draw_grid()
        height, width = rows * self.patch_size, columns * self.patch_size
        short, long = min(height, width), max(height, width)
        drawings = self._drawings(pictures, chosen, short, strength)
        first, second = pictures.concept[chosen], pictures.concept[chosen]
        count = len(chosen)
        canvas = self._backgrounds(count, strength)[:, :, None, None].repeat(1, 1, height, width)
        if long >= 2 * short and self._uniform((), 0, 1) < 0.5:  # two side by side, each in its half
            other = torch.randperm(count, generator=self.generator)
            second = first[other]
            half = (height // 2, width) if height > width else (height, width // 2)
            for part, start in ((drawings, (0, 0)), (drawings[other], (height - half[0], width - half[1]))):
                offsets = self._offsets(count, half[0] - short, half[1] - short)
                place(canvas, part, offsets + torch.tensor(start))
        else:
            if long < 2 * short and self._uniform((), 0, 1) < 0.3:  # drawn wide or tall
                drawings = F.interpolate(drawings, (height, width), mode="bilinear", antialias=True)
            place(canvas, drawings, self._offsets(count, height - drawings.shape[2], width - drawings.shape[3]))
        patches = to_patches(canvas.clamp(0, 1) * 2 - 1, self.patch_size)
        return Drawn(patches | {"packed": False}, first, second)

    def _drawings(self, pictures: PictureSet, chosen: Tensor, side: int, strength: float) -> Tensor:
        """Warped, recoloured and outlined RGBA (B, 4, side, side) in 0..1, premultiplied."""
        self.size = side
        drawings = pictures.pixels[chosen].float() / 255
        if drawings.shape[-1] > 1.3 * side:  # the warp samples points, which is no good for reducing
            drawings = F.interpolate(drawings, (side, side), mode="bilinear", antialias=True)
        drawings = self._warp(self._ink(drawings, strength), pictures.mirrored[chosen], strength)
        if drawings.shape[-1] > pictures.pixels.shape[-1]:
            # Real pictures are larger than these and not blurred by enlarging.
            amount = self._uniform((len(chosen), 1, 1, 1), 0.0, 1.5)
            drawings = drawings + amount * (drawings - F.avg_pool2d(drawings, 3, stride=1, padding=1))
            alpha = drawings[:, 3:].clamp(0, 1)
            drawings = torch.cat([torch.minimum(drawings[:, :3].clamp(min=0), alpha), alpha], 1)
        return self._outline(self._recolour(drawings, strength), strength)

    def _offsets(self, count: int, vertical: int, horizontal: int) -> Tensor:
        """Random places (B, 2) in 0..vertical and 0..horizontal."""
        return (self._rand((count, 2)) * torch.tensor([vertical + 1, horizontal + 1])).long()


def plain_canvases(pictures: Tensor, grid: tuple[int, int], patch_size: int) -> dict[str, Tensor]:
    """uint8 premultiplied RGBA (B, 4, S, S) in the middle of a white canvas of a grid, as inputs of a NaFlex model."""
    height, width = grid[0] * patch_size, grid[1] * patch_size
    side = min(height, width)
    rgb = on_background(pictures.float() / 255, torch.ones(len(pictures), 3))
    rgb = F.interpolate(rgb, (side, side), mode="bilinear", antialias=True).clamp(0, 1)
    canvas = torch.ones(len(rgb), 3, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    canvas[:, :, top : top + side, left : left + side] = rgb
    return to_patches(canvas * 2 - 1, patch_size)
