"""Arguments that a processor does not know: a misspelled one is an error, others are ignored as stock ignores them."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from transformers.utils import logging

logger = logging.get_logger(__name__)

# How alike two names are of which one is a misspelling of the other.
_ALIKE = 0.75


def check_unknown(unknown: Collection[str], known: Collection[str], owner: str) -> None:
    """Warns about names that are ignored.

    Args:
        unknown: Names that were given.
        known: Names that could have been meant.
        owner: The class that was called, for the message.

    Raises:
        ValueError: If a name is nearly one that is known.
    """
    for name in sorted(unknown):
        if close := difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE):
            raise ValueError(f"{owner} does not know the argument {name}; did you mean {close[0]}?")
    if unknown:
        logger.warning_once(f"{owner} ignores the argument(s) {', '.join(sorted(unknown))}, which it does not know.")
