"""The picture set as tensors, and augmentation of a whole batch at once on transparent pictures.

Augmentation works before the picture gets a background: it warps, recolours and outlines premultiplied RGBA, so that
one drawing stands for other hands (outlined, flat, in other colours) on other grounds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

VALIDATION_FRACTION = 0.04
# Mirrored, a flag, a clock, an arrow or a pointing hand is another concept.
MIRRORED_GROUPS = ("animals-nature", "food-drink", "smileys-emotion", "objects", "activities", "icons")
PROBE_FRACTION = 1 / 12
RESTYLED_WEIGHT = 0.6


@dataclass
class PictureSet:
    """Pictures of some sources.

    Attributes:
        pixels: (N, 4, S, S) uint8, RGBA with premultiplied alpha; in memory, or mapped from files.
        concept: (N,) long, index into the list of concepts.
        mirrored: (N,) bool, whether the mirror image shows the same concept.
        weight: (N,) float32, how often a picture is drawn for training.
    """

    pixels: Tensor | MappedPixels
    concept: Tensor
    mirrored: Tensor
    weight: Tensor = field(default_factory=lambda: torch.ones(0))

    def __len__(self) -> int:
        return len(self.concept)

    def select(self, mask: Tensor) -> PictureSet:
        """The pictures where `mask` (N,) bool is true."""
        chosen = mask.nonzero()[:, 0]
        pixels = self.pixels.select(chosen) if isinstance(self.pixels, MappedPixels) else self.pixels[chosen]
        return PictureSet(pixels, self.concept[chosen], self.mirrored[chosen], self.weight[chosen])

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Numbers (count,) of pictures to train on, by their weights."""
        return torch.multinomial(self.weight, count, replacement=True, generator=generator)

    def to(self, device: torch.device) -> PictureSet:
        """The same on a device; on a CPU the pixels stay in their files."""
        pixels = self.pixels
        if device.type != "cpu":
            pixels = pixels[torch.arange(len(self), device="cpu")].to(device)
        return PictureSet(pixels, self.concept.to(device), self.mirrored.to(device), self.weight.to(device))


@dataclass
class Drawn:
    """Pictures of a training step.

    Attributes:
        inputs: Of the model's `encode_image`.
        first: (B,) concept of each picture.
        second: (B,) concept of the other drawing on it; equal to `first` where there is one.
    """

    inputs: dict[str, Tensor]
    first: Tensor
    second: Tensor


class MappedPixels:
    """Pictures that stay in their files, which the processes of a training then share in the system's cache.

    Args:
        files: Arrays (K, 4, S, S) uint8.
        places: (N, 2) long, file and row of each picture.
    """

    def __init__(self, files: list[np.ndarray], places: Tensor) -> None:
        self.files = files
        self.places = places

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.places), *self.files[0].shape[1:])

    def select(self, chosen: Tensor) -> MappedPixels:
        """Those of some numbers (M,)."""
        return MappedPixels(self.files, self.places[chosen])

    def __getitem__(self, chosen: Tensor | slice) -> Tensor:
        rows = [self.files[file][row] for file, row in self.places[chosen].tolist()]
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, *self.shape[1:], dtype=torch.uint8)


def read_concepts(folder: Path) -> list[dict[str, Any]]:
    """The emoji's concepts that scripts/checkpoints/build_pictures.py wrote.

    Raises:
        FileNotFoundError: The set has not been built.
    """
    path = folder / "concepts.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: run `python scripts/checkpoints/build_pictures.py --out {folder}` first"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def read_icon_concepts(folder: Path) -> list[dict[str, Any]]:
    """The concepts that only icons have drawn; a twelfth of them are the probe, of which no picture is trained on."""
    concepts = json.loads((folder / "icon_concepts.json").read_text(encoding="utf-8"))
    for concept in concepts:
        if _draw(concept["code"]) < PROBE_FRACTION:
            concept["split"] = "probe"
    return concepts


def read_styles(folder: Path, use: str) -> list[str]:
    """Names of the sources for "train" or for "evaluate"; a restyled one follows its own."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    names = []
    for style in manifest["styles"]:
        if style["use"] == use:
            names += [style["name"]] + [f"{style['name']}.restyled"] * bool(style.get("restyled"))
    return names


def _draw(name: str) -> float:
    """A number in 0..1 that depends on the name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def read_pictures(folder: Path, styles: list[str], concepts: list[dict[str, Any]]) -> tuple[PictureSet, Tensor]:
    """Read the pictures of some sources; those of concepts that are not among `concepts` are left out.

    Returns:
        The pictures, and a (N,) bool mask of those kept for validation, chosen by a hash of source and concept. What
        was restyled from a validation picture is left out.
    """
    index = {concept["code"]: i for i, concept in enumerate(concepts)}
    mirrored = [concept["group"] in MIRRORED_GROUPS for concept in concepts]
    files, places, numbers, validation, weights = [], [], [], [], []
    for style in styles:
        source, _, restyled = style.partition(".")
        codes = json.loads((folder / f"{style}.json").read_text(encoding="utf-8"))
        files.append(np.load(folder / f"{style}.npy", mmap_mode="r"))
        for row, code in enumerate(codes):
            kept = _draw(f"{source}/{code}") < VALIDATION_FRACTION
            if code in index and not (restyled and kept):
                places.append((len(files) - 1, row))
                numbers.append(index[code])
                validation.append(kept)
                weights.append(RESTYLED_WEIGHT if restyled else 1.0)
    concept = torch.tensor(numbers)
    # Between once per picture and once per concept.
    weight = torch.tensor(weights) * torch.bincount(concept)[concept] ** -0.5
    pixels = MappedPixels(files, torch.tensor(places))
    return PictureSet(pixels, concept, torch.tensor(mirrored)[concept], weight), torch.tensor(validation)


def on_background(pictures: Tensor, background: Tensor) -> Tensor:
    """Put premultiplied RGBA (B, 4, S, S) in 0..1 on colours (B, 3): RGB (B, 3, S, S) in 0..1."""
    return pictures[:, :3] + (1 - pictures[:, 3:]) * background[:, :, None, None]


def plain_pixels(pictures: Tensor, size: int) -> Tensor:
    """uint8 premultiplied RGBA (B, 4, S, S) on white, resized: (B, 3, size, size) in -1..1, as the processor gives."""
    pictures = pictures.float() / 255
    rgb = on_background(pictures, torch.ones(len(pictures), 3, device=pictures.device))
    if rgb.shape[-1] != size:
        rgb = F.interpolate(rgb, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return rgb * 2 - 1


def largest_around(values: Tensor) -> Tensor:
    """The largest of each pixel and its eight neighbours, (B, C, S, S): on a CPU in a tenth of max_pool2d's time."""
    padded = F.pad(values, (1, 1, 1, 1), mode="replicate")
    rows = torch.maximum(torch.maximum(padded[..., :-2, :], padded[..., 1:-1, :]), padded[..., 2:, :])
    return torch.maximum(torch.maximum(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])


class Augmenter:
    """Augments batches, with a strength that may grow during training.

    Args:
        size: Side of the pictures that come out.
        generator: Source of all randomness.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size = size
        self.generator = generator

    def _rand(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def _uniform(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return self._rand(shape) * (high - low) + low

    def _chance(self, count: int, probability: float) -> Tensor:
        return self._rand((count,)) < probability

    def __call__(self, pictures: PictureSet, chosen: Tensor, strength: float = 1.0) -> Tensor:
        """Make training pixels.

        Args:
            pictures: Where they are taken from.
            chosen: (B,) numbers of the pictures.
            strength: 0 changes almost nothing, 1 is full strength.

        Returns:
            (B, 3, size, size) in -1..1.
        """
        drawn = self._warp(pictures.pixels[chosen].float() / 255, pictures.mirrored[chosen], strength)
        drawn = self._recolour(self._ink(drawn, strength), strength)
        drawn = self._outline(drawn, strength)
        return on_background(drawn, self._backgrounds(len(drawn), strength)).clamp(0, 1) * 2 - 1

    def _ink(self, pictures: Tensor, strength: float) -> Tensor:
        """Draw some of the black icons, which have no colour to change, in an ink of any colour."""
        black = (pictures[:, :3].flatten(1).amax(1) < 0.2) & self._chance(len(pictures), 0.6 * strength)
        if not black.any():
            return pictures
        inks = self._uniform((len(pictures), 3, 1, 1), 0.0, 0.85) * pictures[:, 3:]
        colours = torch.where(black[:, None, None, None], inks, pictures[:, :3])
        return torch.cat([colours, pictures[:, 3:]], 1)

    def _warp(self, pictures: Tensor, mirrored: Tensor, strength: float) -> Tensor:
        """Rotate, scale, stretch, shear, shift and mirror."""
        count = len(pictures)
        angle = self._randn(count) * 0.2 * strength
        scale = torch.exp(self._uniform((count, 1), -0.14, 0.32) * strength)
        stretch = torch.exp(self._randn(count, 1) * 0.08 * strength)
        shear = self._randn(count) * 0.1 * strength
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
        identity = torch.eye(3, device=pictures.device).expand(count, 3, 3)
        grey = torch.full_like(identity[0], 1 / 3).expand(count, 3, 3)
        saturation = self._uniform((count, 1, 1), -0.6, 0.4) * strength + 1
        saturation[self._chance(count, 0.12 * strength)] = 0.0
        mixing = self._randn(count, 3, 3) * 0.08 * strength
        permuted = self._chance(count, 0.12 * strength)
        orders = torch.argsort(self._rand((count, 3)), 1)
        base = torch.where(permuted[:, None, None], identity[0][orders], identity)
        # Each row of the mixing sums to 1, so that white stays white.
        mixing = mixing - mixing.mean(2, keepdim=True)
        matrix = (saturation * identity + (1 - saturation) * grey) @ (base + mixing)
        contrast = torch.exp(self._randn(count, 1, 1) * 0.2 * strength)
        matrix = matrix * contrast
        offset = (1 - contrast) * 0.5 + self._randn(count, 1, 1) * 0.06 * strength
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
        line = largest_around(alpha) - alpha
        # Where neighbouring colours differ much, a pen would have drawn a line.
        contrast = (largest_around(drawn) + largest_around(-drawn)).amax(1)
        inked = self._chance(len(drawn), 0.5)[:, None, None] * ((contrast - 0.25) * 4).clamp(0, 1)  # (C, S, S)
        colours = drawn[:, :3] * (1 - inked[:, None])
        pictures = pictures.clone()
        # Black under the rim: premultiplied colours stay as they are.
        pictures[chosen] = torch.cat([colours, alpha + line], 1)
        return pictures

    def _backgrounds(self, count: int, strength: float) -> Tensor:
        """White for most, else a light or, more rarely, any colour."""
        colours = torch.ones(count, 3, device=self.generator.device)
        light, deep = self._chance(count, 0.35 * strength), self._chance(count, 0.12 * strength)
        colours[light] = self._uniform((count, 3), 0.75, 1.0)[light]
        colours[deep] = self._uniform((count, 3), 0.3, 1.0)[deep]
        return colours
