"""Tells arguments that are many things from those that are one: lists, columns of datasets, pandas, PyArrow, NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def as_list(value: Any) -> list[Any] | None:
    """Returns the items of a sequence, or None if `value` is one thing.

    A sequence is a list, a tuple, an iterator, a `Column` of datasets, a Series or Index of pandas, an array of
    PyArrow, or a NumPy array of strings or objects. A string, bytes, a dict, an open file, a named tuple and an array
    of numbers, which may be a picture, are one thing.
    """
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping) or hasattr(value, "read"):
        return None
    if isinstance(value, list | tuple):
        return None if hasattr(value, "_fields") else list(value)
    if hasattr(value, "to_pylist"):
        return value.to_pylist()
    if hasattr(value, "__array__"):
        kind = getattr(getattr(value, "dtype", None), "kind", "")
        is_pandas = hasattr(value, "tolist") and hasattr(value, "to_numpy")
        return list(value) if getattr(value, "ndim", 0) and (is_pandas or kind in ("U", "O", "T")) else None
    return list(value) if isinstance(value, Sequence | Iterator) else None


def as_texts(value: Any, name: str = "text", *, words: bool = False, nested: bool = True) -> Any:
    """Returns texts as a string or as lists of strings.

    Args:
        value: A string, or a sequence of strings; see `as_list`.
        name: The argument's name, for the error.
        words: Each text may be a sequence of words.
        nested: A text may be a pair of strings, or a sequence of token ids in place of a string.

    Raises:
        ValueError: Naming the place and the type of what is not a text.
    """
    if isinstance(value, str):
        return value
    texts = as_list(value)
    if texts is None:
        raise ValueError(f"{name} is {_what(value)}; pass a string or a sequence of strings.")
    if not nested and not words and any(not isinstance(text, str) for text in texts):
        index = next(i for i, text in enumerate(texts) if not isinstance(text, str))
        raise ValueError(f"{name}[{index}] is {_what(texts[index])}; pass a string or a sequence of strings.")
    if nested and texts and all(isinstance(text, int) for text in texts):
        return texts  # ids, as stock's tokenizers take them
    return [as_texts(text, f"{name}[{index}]", words=words) for index, text in enumerate(texts)]


def _what(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:40] + '...'} of type {type(value).__name__}"
