"""Build the picture-caption set of the embedded checkpoint: emoji art in a dozen hands, labels in ten languages.

Everything comes from npm packages fetched with the ordinary client, at pinned versions, and a package whose stated
licence is not the expected one stops the build. Pictures are rendered with resvg; captions come from emojibase-data.

Usage: python scripts/build_pictures.py [--out data/pictures]

Writes, under --out: `STYLE.npy` (N, 4, 72, 72) uint8, RGBA with premultiplied alpha; `STYLE.json`, the concept of each
picture; `concepts.json`, the captions and the split of each concept; `manifest.json`, versions, licences and counts.
Finished styles are kept, so that an interrupted build goes on where it stopped. The result is the same bytes on every
machine with the same resvg.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

PICTURE_SIZE = 72  # a little larger than the model's 64 px, so that augmentation has pixels to sample from
HELD_OUT_FRACTION = 0.10
HELD_OUT_SEED = "siglip-hf pictures 1"
LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ru", "ko", "ja", "zh")
CAPTIONS = ("emojibase-data", "17.0.0", "MIT")


@dataclass(frozen=True)
class Style:
    """One hand that drew the concepts, and the terms on which it did.

    `use` is "train" or "evaluate"; an evaluated style never reaches the training script.
    """

    name: str
    package: str
    version: str
    licence: str
    author: str
    use: str = "train"


STYLES = (
    Style("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc., Noto Emoji"),
    Style("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google Inc., Noto Emoji before 2018"),
    Style("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter, Inc. and other contributors, Twemoji"),
    Style("fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation, Fluent Emoji"),
    Style("fluent", "@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft Corporation, Fluent Emoji"),
    Style(
        "fluent-mono", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Microsoft Corporation, Fluent Emoji"
    ),
    Style(
        "fluent-3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "MIT",
        "Microsoft Corporation, Fluent Emoji; packed by LobeHub",
    ),
    Style("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "Emoji One; EmojiTwo"),
    Style("emojione-mono", "@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0", "Emoji One; EmojiTwo"),
    Style("streamline", "@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", "Streamline"),
    Style("fxemoji", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "Mozilla, FxEmojis", use="evaluate"),
    Style(
        "openmoji",
        "@iconify-json/openmoji",
        "1.2.29",
        "CC-BY-SA-4.0",
        "OpenMoji, HfG Schwaebisch Gmuend",
        use="evaluate",
    ),
)


def fetch(package: str, version: str, licence: str, cache: Path) -> Path:
    """Fetch and unpack one npm package, and check the licence it states.

    Args:
        package: Name on npm, with its scope.
        version: Exact version.
        licence: SPDX identifier that `package.json` (and `info.json`, where there is one) must state.
        cache: Folder of unpacked packages.

    Returns:
        The folder that holds the package's files.

    Raises:
        RuntimeError: npm is missing or fails, or the package states another licence.
    """
    folder = cache / f"{package.replace('/', '__')}@{version}"
    if not (folder / "package.json").exists():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("npm is not installed: install Node.js (Debian: apt-get install npm) and run this again")
        cache.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", f"{package}@{version}", "--json", "--pack-destination", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm could not fetch {package}@{version}:\n{done.stderr.strip()}")
        archive = max(cache.glob("*.tgz"), key=lambda path: path.stat().st_mtime)
        with tarfile.open(archive) as tar:
            tar.extractall(cache / "unpacking", filter="data")
        archive.unlink()
        next((cache / "unpacking").iterdir()).rename(folder)
        (cache / "unpacking").rmdir()
    stated = [read_json(folder / "package.json")["license"]]
    if (folder / "info.json").exists():
        stated.append(read_json(folder / "info.json")["license"]["spdx"])
    if set(stated) != {licence}:
        raise RuntimeError(
            f"{package}@{version} states the licence {stated}, expected {licence}: check it before using it"
        )
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- concepts


def bare_code(hexcode: str) -> str:
    """The code points without variation selectors, lower case: "2764-FE0F" -> "2764"."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def family_of(code: str) -> str:
    """A name shared by a concept and its gendered, directed variants.

    Man (1f468), woman (1f469) and person (1f9d1) become one, gender signs and the arrow of "facing right" disappear.
    """
    parts = [part for part in code.split("-") if part not in ("200d", "2640", "2642", "27a1")]
    return "-".join("1f9d1" if part in ("1f468", "1f469") else part for part in parts)


def is_gendered(code: str) -> bool:
    """True for a variant by gender or direction of a concept that also exists without one."""
    parts = code.split("-")
    return len(parts) > 1 and bool({"2640", "2642", "27a1", "1f468", "1f469", "1f466", "1f467"} & set(parts))


def hold_out(families: Iterable[str]) -> set[str]:
    """The families never trained on: those whose hash is smallest, so that adding a concept moves no other."""
    ordered = sorted(set(families), key=lambda name: hashlib.sha256(f"{HELD_OUT_SEED}/{name}".encode()).digest())
    return set(ordered[: round(HELD_OUT_FRACTION * len(ordered))])


def read_concepts(folder: Path) -> list[dict[str, Any]]:
    """Read the concepts and their captions from an unpacked emojibase-data.

    Returns:
        One dict per concept, in emoji order: `code`, `label`, `group`, `family`, `split` ("train" or "held_out"),
        `plain` (neither a flag nor a gendered variant), `aliases` (other English names) and `captions`: language ->
        {"label", "tags"}.
    """
    base = sorted(
        (e for e in read_json(folder / "en/data.json") if "group" in e and e["group"] != 2), key=lambda e: e["order"]
    )
    groups = read_json(folder / "meta/groups.json")["groups"]
    shortcodes = [
        read_json(folder / f"en/shortcodes/{name}.json") for name in ("cldr", "emojibase", "github", "iamcal")
    ]
    unicode_names = read_json(folder / "meta/unicode-names.json")
    captions: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for language in LANGUAGES:
        for entry in read_json(folder / language / "data.json"):
            captions[entry["hexcode"]][language] = {"label": entry["label"], "tags": entry.get("tags", [])}
    held_out = hold_out(family_of(bare_code(entry["hexcode"])) for entry in base)
    concepts = []
    for entry in base:
        code = bare_code(entry["hexcode"])
        aliases = [unicode_names[entry["hexcode"]].lower()]
        for source in shortcodes:
            names = source.get(entry["hexcode"], [])
            aliases += [re.sub(r"[_-]+", " ", name).strip() for name in ([names] if isinstance(names, str) else names)]
        seen = {entry["label"].lower()}
        concepts.append(
            {
                "code": code,
                "label": entry["label"],
                "group": groups[str(entry["group"])],
                "family": family_of(code),
                "split": "held_out" if family_of(code) in held_out else "train",
                "plain": groups[str(entry["group"])] != "flags" and not is_gendered(code),
                # Skip names with signs or digits in them ("+1", "8ball"): they teach the text tower nothing.
                "aliases": [a for a in aliases if re.fullmatch(r"[a-z ]{3,}", a) and not (a in seen or seen.add(a))],
                "captions": captions[entry["hexcode"]],
            }
        )
    return concepts


# ------------------------------------------------------------------------------------------------------------- pictures


def squash(name: str) -> str:
    """Letters and digits only: "Mrs. Claus", "mrs-claus" and "mrsclaus" are one name."""
    decomposed = unicodedata.normalize("NFKD", name.lower())
    return re.sub(r"[^a-z0-9]", "", decomposed)


class NameMatcher:
    """Finds the concept that a picture's name means; a name that could mean two concepts means none."""

    def __init__(self, concepts: list[dict[str, Any]]) -> None:
        self.codes = {concept["code"] for concept in concepts}
        self.tables: list[dict[str, str]] = []
        for names_of in (lambda c: [c["label"]], lambda c: c["aliases"]):
            owners: dict[str, set[str]] = defaultdict(set)
            for concept in concepts:
                for name in names_of(concept):
                    owners[squash(name)].add(concept["code"])
            self.tables.append({name: next(iter(codes)) for name, codes in owners.items() if len(codes) == 1})

    def find(self, name: str) -> str | None:
        # EmojiOne writes "flag-for-japan" for "flag: Japan"; Streamline numbers its variants: "clinking-glasses-2".
        name = re.sub("^flag-for-", "flag-", name)
        for candidate in (squash(name), squash(re.sub(r"-\d+$", "", name))):
            for table in self.tables:
                if candidate in table:
                    return table[candidate]
        return None


def iconify_svgs(folder: Path, matcher: NameMatcher) -> Iterator[tuple[str, str]]:
    """Yield (concept code, SVG text) of an iconify package, each picture once."""
    icons = read_json(folder / "icons.json")
    by_code = {name: bare_code(code) for code, name in read_json(folder / "chars.json").items()}
    aliases: dict[str, list[str]] = defaultdict(list)
    for name, alias in icons.get("aliases", {}).items():
        if set(alias) == {"parent"}:  # an alias that also rotates or flips is another picture
            aliases[alias["parent"]].append(name)
    for name, icon in icons["icons"].items():
        # A skin tone's name or code is in no table, so that toned variants drop out here.
        names = [name, *sorted(aliases[name])]
        codes = [by_code[n] for n in names if by_code.get(n) in matcher.codes] + [
            c for n in names if (c := matcher.find(n))
        ]
        if not codes:
            continue
        width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}"'
        yield codes[0], f'{opening} width="{width}" height="{height}" color="#202020">{icon["body"]}</svg>'


def render(svg: str, size: int) -> Image.Image:
    """Render SVG text to an RGBA picture `size` pixels wide.

    Raises:
        RuntimeError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise RuntimeError('resvg-py is not installed: pip install "siglip-hf[data]"') from error
    return Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True)))
    ).convert("RGBA")


def style_pictures(folder: Path, matcher: NameMatcher, size: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield (concept code, RGBA picture) of a style's package."""
    if (folder / "icons.json").exists():
        for code, svg in iconify_svgs(folder, matcher):
            yield code, render(svg, size)
        return
    for path in sorted((folder / "assets").glob("*.webp")):
        if bare_code(path.stem) in matcher.codes:
            with Image.open(path) as picture:
                yield bare_code(path.stem), picture.convert("RGBA")


def premultiplied(picture: Image.Image, size: int) -> np.ndarray:
    """Fit a picture in a transparent square: (4, size, size) uint8, colours multiplied by alpha ("RGBa").

    With premultiplied colours, resizing and warping need no care at transparent edges, and a background is one
    addition.
    """
    picture = picture.convert("RGBa")
    scale = size / max(picture.size)
    picture = picture.resize(
        [max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC, reducing_gap=3.0
    )
    square = np.zeros((size, size, 4), dtype=np.uint8)
    left, top = (size - picture.width) // 2, (size - picture.height) // 2
    square[top : top + picture.height, left : left + picture.width] = np.asarray(picture)
    return square.transpose(2, 0, 1)


def build_style(style: Style, matcher: NameMatcher, out: Path) -> int:
    """Render one style into `out` unless it is there already; returns the number of pictures."""
    array_path, codes_path = out / f"{style.name}.npy", out / f"{style.name}.json"
    if not codes_path.exists():
        folder = fetch(style.package, style.version, style.licence, out / "npm")
        codes, arrays = [], []
        for code, picture in track(style_pictures(folder, matcher, 2 * PICTURE_SIZE), description=f"{style.name:14}"):
            codes.append(code)
            arrays.append(premultiplied(picture, PICTURE_SIZE))
        np.save(array_path, np.stack(arrays))
        write_json(codes_path, codes)  # written last: its presence means that the style is whole
    return len(read_json(codes_path))


def build(out: Path) -> dict[str, Any]:
    """Build the whole set into `out` and return its manifest."""
    out.mkdir(parents=True, exist_ok=True)
    concepts = read_concepts(fetch(*CAPTIONS, out / "npm"))
    write_json(out / "concepts.json", concepts)
    matcher = NameMatcher(concepts)
    styles = []
    for style in STYLES:
        pictures = build_style(style, matcher, out)
        matched = len(set(read_json(out / f"{style.name}.json")))
        styles.append(asdict(style) | {"pictures": pictures, "concepts": matched})
    held_out = [concept for concept in concepts if concept["split"] == "held_out"]
    manifest = {
        "captions": dict(zip(("package", "version", "licence"), CAPTIONS, strict=True)) | {"languages": LANGUAGES},
        "concepts": len(concepts),
        "held_out_concepts": len(held_out),
        "plain_concepts": sum(concept["plain"] for concept in concepts),
        "picture_size": PICTURE_SIZE,
        "styles": styles,
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
        counts = f"{style['pictures']:5} pictures {style['concepts']:5} concepts"
        print(f"{style['name']:14} {counts}  {style['licence']:13} {style['use']}")
    print("{concepts} concepts, {held_out_concepts} held out, {plain_concepts} plain".format(**manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
