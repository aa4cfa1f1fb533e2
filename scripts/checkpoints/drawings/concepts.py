"""The concepts of the emoji, their captions in ten languages, and which of them are held out."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .sources import read_json

HELD_OUT_FRACTION = 0.10
HELD_OUT_SEED = "siglip-hf pictures 1"
LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ru", "ko", "ja", "zh")


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
