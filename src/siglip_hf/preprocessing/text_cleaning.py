"""Text as the original zero-shot evaluation cleans it: lowercased, without ASCII punctuation, single spaces.

Source: `_canonicalize_text` of big_vision's zero-shot evaluation (`evaluators/proj/image_text/prompt_engineering.py`);
stock's `SiglipTokenizer` applies it to every text, without the step of `label_words`, which is for class names alone.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_PUNCTUATION = frozenset(string.punctuation)
# An expression of runs is several times faster than `str.translate`.
_PUNCTUATION_RUN = re.compile(f"[{re.escape(string.punctuation)}]+")
# Neither a letter, nor white space, nor punctuation, so that cleaning leaves it alone, and rare in texts.
_SEPARATOR = "\0"


def remove_punctuation(text: str) -> str:
    """Returns `text` without the 32 characters of `string.punctuation`; punctuation of other scripts stays."""
    return _PUNCTUATION_RUN.sub("", text)


def label_words(label: str) -> str:
    """Returns a class name as words: `_` is read as a space.

    The original evaluation does so before it cleans a text. The tokenizers, as in stock, delete `_` like all ASCII
    punctuation, so that "hot_air_balloon" would become one word.

    Examples:
        >>> from siglip_hf.preprocessing.text_cleaning import label_words
        >>> label_words("hot_air_balloon")
        'hot air balloon'
    """
    return label.replace("_", " ")


def canonicalize_text(
    text: str,
    *,
    lowercase: bool = True,
    remove_punctuation: bool = True,
    keep_punctuation_exact_string: str | None = None,
) -> str:
    """Returns `text` as the text tower expects it.

    Args:
        text: Any string.
        lowercase: Lowercase first.
        remove_punctuation: Delete ASCII punctuation; see the function of that name.
        keep_punctuation_exact_string: Occurrences of this string keep their punctuation, e.g. `"{}"` in a template.
            It is looked for after lowercasing.

    Returns:
        The canonical text: runs of white space, as of `str.isspace`, are one space, and there is none at the ends.

    Examples:
        >>> from siglip_hf import canonicalize_text
        >>> canonicalize_text("A photo of  {}, isn't it?", keep_punctuation_exact_string="{}")
        'a photo of {} isnt it'
    """
    if lowercase:
        text = text.lower()
    if remove_punctuation:
        if keep_punctuation_exact_string:
            parts = text.split(keep_punctuation_exact_string)
            text = keep_punctuation_exact_string.join(_PUNCTUATION_RUN.sub("", part) for part in parts)
        else:
            text = _PUNCTUATION_RUN.sub("", text)
    # `str.split` and the `\s` of `re` take the same characters for white space, \x1c to \x1f among them.
    return " ".join(text.split())


def canonicalize_texts(texts: Sequence[str], *, lowercase: bool = True, remove_punctuation: bool = True) -> list[str]:
    """Returns `canonicalize_text` of each text, several times faster: all are cleaned as one string."""
    if not texts or any(_SEPARATOR in text for text in texts):
        return [canonicalize_text(t, lowercase=lowercase, remove_punctuation=remove_punctuation) for t in texts]
    together = canonicalize_text(_SEPARATOR.join(texts), lowercase=lowercase, remove_punctuation=remove_punctuation)
    # What is left at the ends of each text is one space.
    together = together.replace(f" {_SEPARATOR}", _SEPARATOR).replace(f"{_SEPARATOR} ", _SEPARATOR)
    return together.split(_SEPARATOR)


def canonicalize_with_offsets(
    text: str, *, lowercase: bool = True, remove_punctuation: bool = True
) -> tuple[str, list[tuple[int, int]]]:
    """As `canonicalize_text`, with the place in `text` that each character of the result comes from.

    Returns:
        The canonical text, and for each of its characters the range `(start, end)` in `text`.
    """
    # Lowercasing never shrinks a text, and grows it in one character alone: "İ" becomes two.
    origins = [i for i, char in enumerate(text) for _ in char.lower()] if lowercase else list(range(len(text)))
    characters: list[str] = []
    offsets: list[tuple[int, int]] = []
    for char, origin in zip(text.lower() if lowercase else text, origins, strict=True):
        if remove_punctuation and char in _PUNCTUATION:
            continue
        if not char.isspace():
            characters.append(char)
            offsets.append((origin, origin + 1))
        elif characters and characters[-1] == " ":
            offsets[-1] = (offsets[-1][0], origin + 1)
        elif characters:
            characters.append(" ")
            offsets.append((origin, origin + 1))
    if characters and characters[-1] == " ":
        characters.pop()
        offsets.pop()
    return "".join(characters), offsets
