"""Twelve things as strokes of a pen, drawn again and again by an unsteady hand: no picture like them is trained on.

They stand for what people draw on the drawing page. Usage: python scripts/checkpoints/sketches.py [--out sketches.png]
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 256
EACH = 30
Stroke = list[tuple[float, float]]


def arc(x: float, y: float, width: float, height: float, start: float = 0.0, end: float = 360.0) -> Stroke:
    """A stroke along an ellipse around (x, y), from one angle to another in degrees, clockwise from the right."""
    angles = [math.radians(start + (end - start) * step / 24) for step in range(25)]
    return [(x + width / 2 * math.cos(angle), y + height / 2 * math.sin(angle)) for angle in angles]


#: English label of an emoji -> strokes in a unit square, y downward.
THINGS: dict[str, list[Stroke]] = {
    "house": [
        [(0.2, 0.5), (0.2, 0.9), (0.8, 0.9), (0.8, 0.5)],
        [(0.1, 0.52), (0.5, 0.12), (0.9, 0.52)],
        [(0.43, 0.9), (0.43, 0.65), (0.57, 0.65), (0.57, 0.9)],
    ],
    "fish": [
        arc(0.42, 0.5, 0.64, 0.4),
        [(0.7, 0.5), (0.92, 0.32), (0.92, 0.68), (0.7, 0.5)],
        arc(0.24, 0.45, 0.05, 0.05),
    ],
    "evergreen tree": [
        [(0.5, 0.06), (0.3, 0.35), (0.4, 0.35), (0.22, 0.6), (0.35, 0.6), (0.15, 0.82)],
        [(0.5, 0.06), (0.7, 0.35), (0.6, 0.35), (0.78, 0.6), (0.65, 0.6), (0.85, 0.82)],
        [(0.15, 0.82), (0.85, 0.82)],
        [(0.44, 0.82), (0.44, 0.95), (0.56, 0.95), (0.56, 0.82)],
    ],
    "umbrella": [
        arc(0.5, 0.5, 0.84, 0.76, 180, 360),
        [(0.08, 0.5), (0.22, 0.44), (0.36, 0.5), (0.5, 0.44), (0.64, 0.5), (0.78, 0.44), (0.92, 0.5)],
        [(0.5, 0.1), (0.5, 0.84)],
        arc(0.43, 0.84, 0.14, 0.18, 0, 180),
    ],
    "star": [
        [
            (0.5 + 0.44 * math.sin(4 * math.pi * point / 5), 0.52 - 0.44 * math.cos(4 * math.pi * point / 5))
            for point in range(6)
        ]
    ],
    "red heart": [
        [(0.5, 0.9), (0.16, 0.52), *arc(0.31, 0.36, 0.38, 0.36, 170, 350)],
        [(0.5, 0.9), (0.84, 0.52), *reversed(arc(0.69, 0.36, 0.38, 0.36, 190, 370))],
    ],
    "ladder": [
        [(0.34, 0.05), (0.3, 0.95)],
        [(0.66, 0.05), (0.7, 0.95)],
        *[[(0.33, y), (0.67, y)] for y in (0.18, 0.34, 0.5, 0.66, 0.82)],
    ],
    "key": [
        arc(0.27, 0.5, 0.34, 0.34),
        [(0.44, 0.5), (0.92, 0.5), (0.92, 0.64)],
        [(0.78, 0.5), (0.78, 0.62)],
    ],
    "sailboat": [
        [(0.12, 0.74), (0.24, 0.9), (0.76, 0.9), (0.88, 0.74), (0.12, 0.74)],
        [(0.5, 0.74), (0.5, 0.08)],
        [(0.5, 0.1), (0.84, 0.66), (0.5, 0.66)],
        [(0.5, 0.2), (0.2, 0.66), (0.5, 0.66)],
    ],
    "glasses": [
        arc(0.27, 0.52, 0.34, 0.32),
        arc(0.73, 0.52, 0.34, 0.32),
        arc(0.5, 0.5, 0.12, 0.1, 180, 360),
        [(0.1, 0.48), (0.02, 0.4)],
        [(0.9, 0.48), (0.98, 0.4)],
    ],
    "snowman": [
        arc(0.5, 0.68, 0.5, 0.48),
        arc(0.5, 0.3, 0.32, 0.3),
        arc(0.44, 0.27, 0.03, 0.03),
        arc(0.56, 0.27, 0.03, 0.03),
        arc(0.5, 0.32, 0.14, 0.1, 20, 160),
        [(0.27, 0.6), (0.08, 0.45)],
        [(0.73, 0.6), (0.92, 0.45)],
        [(0.34, 0.17), (0.66, 0.17)],
        [(0.4, 0.17), (0.4, 0.03), (0.6, 0.03), (0.6, 0.17)],
    ],
    "cactus": [
        [(0.42, 0.95), *arc(0.5, 0.16, 0.16, 0.18, 180, 360), (0.58, 0.95)],
        [(0.42, 0.62), (0.2, 0.62), *arc(0.2, 0.36, 0.12, 0.14, 180, 360), (0.26, 0.5), (0.42, 0.5)],
        [(0.58, 0.72), (0.82, 0.72), *reversed(arc(0.8, 0.42, 0.12, 0.14, 180, 360)), (0.74, 0.6), (0.58, 0.6)],
    ],
}


def sketch(thing: str, number: int) -> Image.Image:
    """One drawing (RGB, 256 x 256) of a thing: shifted, turned, stretched, with shaking lines, in black on white.

    Args:
        thing: A key of `THINGS`.
        number: The same number gives the same drawing.
    """
    source = random.Random(f"{thing}/{number}")
    turn, slant = source.gauss(0, 0.08), source.gauss(0, 0.06)
    wide, tall = source.uniform(0.65, 0.9), source.uniform(0.65, 0.9)
    right, down = source.uniform(-0.05, 0.05), source.uniform(-0.05, 0.05)
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(image)
    width = source.randint(4, 9)
    for stroke in THINGS[thing]:
        shaken = []
        for x, y in stroke:
            x, y = (x - 0.5) * wide + source.gauss(0, 0.007), (y - 0.5) * tall + source.gauss(0, 0.007)
            x, y = x * math.cos(turn) - y * math.sin(turn) + slant * y, x * math.sin(turn) + y * math.cos(turn)
            shaken.append(((x + 0.5 + right) * SIZE, (y + 0.5 + down) * SIZE))
        pen.line(shaken, fill="black", width=width, joint="curve")
    return image


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sketches.png"), help="sheet of four drawings of each thing")
    arguments = parser.parse_args()
    sheet = Image.new("RGB", (len(THINGS) * SIZE // 2, 4 * SIZE // 2))
    for column, thing in enumerate(THINGS):
        for row in range(4):
            small = sketch(thing, row).resize((SIZE // 2, SIZE // 2), Image.Resampling.LANCZOS)
            sheet.paste(small, (column * SIZE // 2, row * SIZE // 2))
    sheet.save(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
