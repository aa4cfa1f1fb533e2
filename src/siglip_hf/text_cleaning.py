"""Text as SigLIP was trained on it: lowercased, without ASCII punctuation, single spaces.

Source: `_canonicalize_text` of big_vision (`evaluators/proj/image_text/prompt_engineering.py`), which both tokenizers
apply to every text.
"""

from __future__ import annotations

import string

_PUNCTUATION = frozenset(string.punctuation)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def remove_punctuation(text: str) -> str:
    """Returns `text` without the 32 characters of `string.punctuation`; punctuation of other scripts stays."""
    return text.translate(_WITHOUT_PUNCTUATION)


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

    Example:
        >>> canonicalize_text("A photo of  {}, isn't it?", keep_punctuation_exact_string="{}")
        'a photo of {} isnt it'
    """
    if lowercase:
        text = text.lower()
    if remove_punctuation:
        if keep_punctuation_exact_string:
            parts = text.split(keep_punctuation_exact_string)
            text = keep_punctuation_exact_string.join(part.translate(_WITHOUT_PUNCTUATION) for part in parts)
        else:
            text = text.translate(_WITHOUT_PUNCTUATION)
    # `str.split` and the `\s` of `re` take the same characters for white space, \x1c to \x1f among them.
    return " ".join(text.split())


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
