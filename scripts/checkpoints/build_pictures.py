"""Build the picture-caption set of the embedded checkpoints: emoji art in a dozen hands, icons in twenty more.

Everything comes from npm packages fetched with the ordinary client, at pinned versions, and a package whose stated
licence is not the expected one stops the build. Pictures are rendered with resvg; captions come from emojibase-data in
ten languages, and from the names of the icons.

Usage: python scripts/checkpoints/build_pictures.py [--out data/pictures]

Writes, under --out: `SOURCE.npy` (N, 4, 72, 72) uint8, RGBA with premultiplied alpha; `SOURCE.json`, the concept of
each picture; `SOURCE.restyled.npy` and `.json`, the same drawings in other colours, lines and fills; `concepts.json`,
the captions and the split of each emoji's concept; `icon_concepts.json`, the concepts that icons alone have drawn;
`manifest.json`, versions, licences and counts. Finished sources are kept, so that an interrupted build goes on where it
stopped. The result is the same bytes on every machine with the same resvg.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from drawings.concepts import LANGUAGES, NameMatcher, read_concepts
from drawings.drawing import PICTURE_SIZE, emoji_svgs, icon_svgs, packed_pictures, premultiplied, render
from drawings.names import IconNames, Nouns
from drawings.restyle import restyled
from drawings.sources import CAPTIONS, EMOJI, ICONS, WORDS, Source, fetch, read_json, write_json

#: Drawings of one concept in one icon set: the many weights of a letter-like icon teach little.
ICONS_EACH = 4
#: Other hands made of each emoji drawing.
RESTYLED_EACH = 2


def save(out: Path, name: str, drawings: Iterable[tuple[str, np.ndarray]]) -> int:
    """Write (concept code, picture) pairs under `name` unless they are there already; returns how many there are."""
    codes_path = out / f"{name}.json"
    if not codes_path.exists():
        codes, arrays = [], []
        for code, array in track(drawings, description=f"{name:28}"):
            codes.append(code)
            arrays.append(array)
        empty = np.zeros((0, 4, PICTURE_SIZE, PICTURE_SIZE), np.uint8)
        np.save(out / f"{name}.npy", np.stack(arrays) if arrays else empty)
        write_json(codes_path, codes)  # written last: its presence means that the source is whole
    return len(read_json(codes_path))


def rendered(svgs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, np.ndarray]]:
    """Each drawing as a premultiplied square; those that come out empty or cannot be drawn are left out."""
    for code, svg in svgs:
        picture = render(svg, 2 * PICTURE_SIZE)
        if picture is not None:
            yield code, premultiplied(picture, PICTURE_SIZE)


def other_hands(svgs: Iterable[tuple[str, str]], trained: set[str]) -> Iterator[tuple[str, str]]:
    """Each drawing of a trained concept several times, in other colours, lines and fills."""
    for number, (code, svg) in enumerate(svgs):
        if code in trained:
            for variant in range(RESTYLED_EACH):
                yield code, restyled(svg, seed=f"{code}/{number}/{variant}")


def build_emoji(source: Source, matcher: NameMatcher, trained: set[str], out: Path) -> dict[str, Any]:
    """Render one emoji source, and its restyled drawings if it is for training; returns its line of the manifest."""
    folder = fetch(source.package, source.version, source.licence, out / "npm")
    has_svgs = (folder / "icons.json").exists()
    if has_svgs:
        count = save(out, source.name, rendered(emoji_svgs(folder, matcher)))
    else:
        pictures = ((code, premultiplied(picture, PICTURE_SIZE)) for code, picture in packed_pictures(folder, matcher))
        count = save(out, source.name, pictures)
    line = asdict(source) | {"pictures": count, "concepts": len(set(read_json(out / f"{source.name}.json")))}
    if has_svgs and source.use == "train":
        hands = other_hands(emoji_svgs(folder, matcher), trained)
        line["restyled"] = save(out, f"{source.name}.restyled", rendered(hands))
    return line


def build_icons(concepts: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Render the icons that name a trained concept or a thing; returns their lines of the manifest.

    A new concept is kept where its name is a noun, or where two sets have drawn it: names of a single set are often
    nobody else's.
    """
    nouns = Nouns(fetch(*WORDS, out / "npm"))
    names = IconNames(concepts, nouns)
    found: dict[str, list[tuple[str, str, str]]] = {}  # source -> (code, label, SVG)
    drawn_by: dict[str, set[str]] = defaultdict(set)
    labels: dict[str, str] = {}
    for source in ICONS:
        folder = fetch(source.package, source.version, source.licence, out / "npm")
        each: Counter[str] = Counter()
        found[source.name] = []
        for name, svg in icon_svgs(folder):
            concept = names.find(name)
            if concept is not None and each[concept[0]] < ICONS_EACH:
                each[concept[0]] += 1
                drawn_by[concept[0]].add(source.name)
                labels.setdefault(*concept)
                found[source.name].append((*concept, svg))
    kept = {code for code, sets in drawn_by.items() if len(sets) > 1 or nouns.knows(labels[code].split())}
    new = sorted(kept - names.train)
    write_json(out / "icon_concepts.json", [icon_concept(code, labels[code]) for code in new])
    lines = []
    for source in ICONS:
        svgs = [(code, svg) for code, _, svg in found[source.name] if code in kept or code in names.train]
        count = save(out, source.name, rendered(svgs))
        matched = len(set(read_json(out / f"{source.name}.json")))
        lines.append(asdict(source) | {"pictures": count, "concepts": matched})
    return lines


def icon_concept(code: str, label: str) -> dict[str, Any]:
    """A concept that only icons have drawn, in the form of the emoji's: one English label, the last word as its tag."""
    tags = [label.split()[-1]] if " " in label else []
    return {
        "code": code,
        "label": label,
        "group": "icons",
        "family": code,
        "split": "train",
        "plain": False,
        "aliases": [],
        "captions": {"en": {"label": label, "tags": tags}},
    }


def build(out: Path) -> dict[str, Any]:
    """Build the whole set into `out` and return its manifest."""
    out.mkdir(parents=True, exist_ok=True)
    concepts = read_concepts(fetch(*CAPTIONS, out / "npm"))
    write_json(out / "concepts.json", concepts)
    matcher = NameMatcher(concepts)
    trained = {concept["code"] for concept in concepts if concept["split"] == "train"}
    icons = build_icons(concepts, out)
    sources = [build_emoji(source, matcher, trained, out) for source in EMOJI] + icons
    manifest = {
        "captions": dict(zip(("package", "version", "licence"), CAPTIONS, strict=True)) | {"languages": LANGUAGES},
        "concepts": len(concepts),
        "icon_concepts": len(read_json(out / "icon_concepts.json")),
        "held_out_concepts": len(concepts) - len(trained),
        "plain_concepts": sum(concept["plain"] for concept in concepts),
        "picture_size": PICTURE_SIZE,
        "styles": sources,
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("data/pictures"), help="folder to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        manifest = build(arguments.out)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for style in manifest["styles"]:
        counts = f"{style['pictures']:5} pictures {style['concepts']:5} concepts {style.get('restyled', 0):5} restyled"
        print(f"{style['name']:26} {counts}  {style['licence']:13} {style['use']}")
    totals = "{concepts} concepts, {held_out_concepts} held out, {plain_concepts} plain; {icon_concepts} by icons only"
    print(totals.format(**manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
