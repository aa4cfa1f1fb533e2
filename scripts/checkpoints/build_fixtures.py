"""Render the demo's pictures: 24 well-known things in FxEmoji's hand, which the embedded checkpoint has never seen.

The things were chosen by name before any of them was scored. Usage: python scripts/checkpoints/build_fixtures.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from drawings.concepts import NameMatcher, read_concepts
from drawings.drawing import emoji_svgs, render
from drawings.sources import CAPTIONS, EMOJI, fetch, write_json

SIZE = 160
THINGS = (
    *("cat", "dog", "tiger", "penguin", "turtle", "frog", "octopus", "whale"),
    *("pizza", "hamburger", "banana", "strawberry", "watermelon", "doughnut"),
    *("rocket", "bicycle", "helicopter", "sailboat"),
    *("guitar", "umbrella", "key", "light bulb", "house", "cactus"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("src/siglip_hf/apps/pictures"))
    parser.add_argument("--cache", type=Path, default=Path("data/pictures/npm"), help="where packages are kept")
    arguments = parser.parse_args()
    style = next(style for style in EMOJI if style.name == "fxemoji")
    try:
        concepts = read_concepts(fetch(*CAPTIONS, arguments.cache))
        folder = fetch(style.package, style.version, style.licence, arguments.cache)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    code_of = {concept["label"]: concept["code"] for concept in concepts}
    svgs = dict(reversed(list(emoji_svgs(folder, NameMatcher(concepts)))))  # of several drawings, the first
    arguments.out.mkdir(parents=True, exist_ok=True)
    labels = {}
    for label in THINGS:
        name = f"{label.replace(' ', '_')}.png"
        picture = render(svgs[code_of[label]], SIZE)
        assert picture is not None, f"the drawing of {label} is empty"
        few_colours = picture.quantize(128, method=Image.Quantize.FASTOCTREE)  # keeps alpha
        few_colours.save(arguments.out / name, optimize=True)
        labels[name] = label
    write_json(arguments.out / "labels.json", labels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
