"""The picture set as tensors, and augmentation of a whole batch at once on transparent pictures.

Augmentation works before the picture gets a background: it warps, recolours and outlines premultiplied RGBA, so that
one drawing stands for other hands (outlined, flat, in other colours) on other grounds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

VALIDATION_FRACTION = 0.04
# Mirrored, a flag, a clock, an arrow or a pointing hand is another concept.
MIRRORED_GROUPS = ("animals-nature", "food-drink", "smileys-emotion", "objects", "activities")


@dataclass
class PictureSet:
    """Pictures of some styles.

    Attributes:
        pixels: (N, 4, S, S) uint8, RGBA with premultiplied alpha.
        concept: (N,) long, index into the list of concepts.
        mirrored: (N,) bool, whether the mirror image shows the same concept.
    """

    pixels: Tensor
    concept: Tensor
    mirrored: Tensor

    def __len__(self) -> int:
        return len(self.concept)

    def select(self, mask: Tensor) -> PictureSet:
        """The pictures where `mask` (N,) bool is true."""
        return PictureSet(self.pixels[mask], self.concept[mask], self.mirrored[mask])


def read_concepts(folder: Path) -> list[dict[str, Any]]:
    """The concepts that scripts/build_pictures.py wrote.

    Raises:
        FileNotFoundError: The set has not been built.
    """
    path = folder / "concepts.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run `python scripts/build_pictures.py --out {folder}` first")
    return json.loads(path.read_text(encoding="utf-8"))


def read_styles(folder: Path, use: str) -> list[str]:
    """Names of the styles for "train" or for "evaluate"."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return [style["name"] for style in manifest["styles"] if style["use"] == use]


def read_pictures(folder: Path, styles: list[str], concepts: list[dict[str, Any]]) -> tuple[PictureSet, Tensor]:
    """Read the pictures of some styles.

    Returns:
        The pictures, and a (N,) bool mask of those kept for validation, chosen by a hash of style and concept.
    """
    index = {concept["code"]: i for i, concept in enumerate(concepts)}
    mirrored = [concept["group"] in MIRRORED_GROUPS for concept in concepts]
    pixels, numbers, validation = [], [], []
    for style in styles:
        codes = json.loads((folder / f"{style}.json").read_text(encoding="utf-8"))
        pixels.append(torch.from_numpy(np.load(folder / f"{style}.npy")))
        numbers += [index[code] for code in codes]
        for code in codes:
            draw = int.from_bytes(hashlib.sha256(f"{style}/{code}".encode()).digest()[:4], "big") / 2**32
            validation.append(draw < VALIDATION_FRACTION)
    concept = torch.tensor(numbers)
    return PictureSet(torch.cat(pixels), concept, torch.tensor(mirrored)[concept]), torch.tensor(validation)


def on_background(pictures: Tensor, background: Tensor) -> Tensor:
    """Put premultiplied RGBA (B, 4, S, S) in 0..1 on colours (B, 3): RGB (B, 3, S, S) in 0..1."""
    return pictures[:, :3] + (1 - pictures[:, 3:]) * background[:, :, None, None]


def plain_pixels(pictures: Tensor, size: int) -> Tensor:
    """uint8 premultiplied RGBA (B, 4, S, S) on white, resized: (B, 3, size, size) in -1..1, as the processor gives."""
    pictures = pictures.float() / 255
    rgb = on_background(pictures, torch.ones(len(pictures), 3))
    if rgb.shape[-1] != size:
        rgb = F.interpolate(rgb, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return rgb * 2 - 1


class Augmenter:
    """Augments batches, with a strength that may grow during training.

    Args:
        size: Side of the pictures that come out.
        generator: Source of all randomness.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size = size
        self.generator = generator

    def _uniform(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def _chance(self, count: int, probability: float) -> Tensor:
        return torch.rand(count, generator=self.generator) < probability

    def __call__(self, pictures: Tensor, mirrored: Tensor, strength: float = 1.0) -> Tensor:
        """Make training pixels.

        Args:
            pictures: (B, 4, S, S) uint8, premultiplied RGBA.
            mirrored: (B,) bool, which pictures may be mirrored.
            strength: 0 changes almost nothing, 1 is full strength.

        Returns:
            (B, 3, size, size) in -1..1.
        """
        pictures = self._warp(pictures.float() / 255, mirrored, strength)
        pictures = self._recolour(pictures, strength)
        pictures = self._outline(pictures, strength)
        return on_background(pictures, self._backgrounds(len(pictures), strength)).clamp(0, 1) * 2 - 1

    def _warp(self, pictures: Tensor, mirrored: Tensor, strength: float) -> Tensor:
        """Rotate, scale, stretch, shear, shift and mirror."""
        count = len(pictures)
        angle = torch.randn(count, generator=self.generator) * 0.2 * strength
        scale = torch.exp(self._uniform((count, 1), -0.14, 0.32) * strength)
        stretch = torch.exp(torch.randn(count, 1, generator=self.generator) * 0.08 * strength)
        shear = torch.randn(count, generator=self.generator) * 0.1 * strength
        flip = torch.where(mirrored & self._chance(count, 0.5), -1.0, 1.0)
        cos, sin = torch.cos(angle), torch.sin(angle)
        rotation = torch.stack([torch.stack([cos, -sin + shear], 1), torch.stack([sin, cos], 1)], 1)  # (B, 2, 2)
        matrix = rotation * torch.cat([scale * stretch, scale / stretch], 1)[:, None, :]
        matrix[:, :, 0] *= flip[:, None]
        shift = self._uniform((count, 2, 1), -0.18, 0.18) * strength
        shape = [count, 4, self.size, self.size]
        grid = F.affine_grid(torch.cat([matrix, shift], 2), shape, align_corners=False)
        return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _recolour(self, pictures: Tensor, strength: float) -> Tensor:
        """Mix channels, change saturation, brightness and contrast; alpha stays."""
        count = len(pictures)
        identity = torch.eye(3).expand(count, 3, 3)
        grey = torch.full((3, 3), 1 / 3).expand(count, 3, 3)
        saturation = self._uniform((count, 1, 1), -0.6, 0.4) * strength + 1
        saturation[self._chance(count, 0.12 * strength)] = 0.0
        mixing = torch.randn(count, 3, 3, generator=self.generator) * 0.08 * strength
        permuted = self._chance(count, 0.12 * strength)
        orders = torch.argsort(torch.rand(count, 3, generator=self.generator), 1)
        base = torch.where(permuted[:, None, None], torch.eye(3)[orders], identity)
        # Each row of the mixing sums to 1, so that white stays white.
        mixing = mixing - mixing.mean(2, keepdim=True)
        matrix = (saturation * identity + (1 - saturation) * grey) @ (base + mixing)
        contrast = torch.exp(torch.randn(count, 1, 1, generator=self.generator) * 0.2 * strength)
        matrix = matrix * contrast
        offset = (1 - contrast) * 0.5 + torch.randn(count, 1, 1, generator=self.generator) * 0.06 * strength
        alpha = pictures[:, 3:]
        colours = torch.bmm(matrix, pictures[:, :3].flatten(2)).view(count, 3, self.size, self.size)
        colours = (colours + offset[..., None] * alpha).clamp(min=0)
        return torch.cat([torch.minimum(colours, alpha), alpha], 1)

    def _outline(self, pictures: Tensor, strength: float) -> Tensor:
        """Draw dark lines around some pictures, and in half of these also along the edges inside."""
        chosen = self._chance(len(pictures), 0.4 * strength)
        if not chosen.any():
            return pictures
        drawn = pictures[chosen]
        alpha = drawn[:, 3:]
        line = F.max_pool2d(alpha, 3, stride=1, padding=1) - alpha
        # Where neighbouring colours differ much, a pen would have drawn a line.
        contrast = (F.max_pool2d(drawn, 3, stride=1, padding=1) + F.max_pool2d(-drawn, 3, stride=1, padding=1)).amax(1)
        inked = self._chance(len(drawn), 0.5)[:, None, None] * ((contrast - 0.25) * 4).clamp(0, 1)  # (C, S, S)
        colours = drawn[:, :3] * (1 - inked[:, None])
        pictures = pictures.clone()
        # Black under the rim: premultiplied colours stay as they are.
        pictures[chosen] = torch.cat([colours, alpha + line], 1)
        return pictures

    def _backgrounds(self, count: int, strength: float) -> Tensor:
        """White for most, else a light or, more rarely, any colour."""
        colours = torch.ones(count, 3)
        light, deep = self._chance(count, 0.35 * strength), self._chance(count, 0.12 * strength)
        colours[light] = self._uniform((count, 3), 0.75, 1.0)[light]
        colours[deep] = self._uniform((count, 3), 0.3, 1.0)[deep]
        return colours
