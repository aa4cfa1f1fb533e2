"""What a request holds, as texts and pictures: strings, data URIs, content parts, uploads, in any mixture."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from siglip_hf.data.embedder import check_text
from siglip_hf.inference.label_bank import parse_labels, parse_templates
from siglip_hf.serving.problems import Problem, users_mistakes
from siglip_hf.serving.settings import Limits
from siglip_hf.serving.towers import Picture

Fetch = Callable[[str], Awaitable[bytes]]

# One shape of a part per way that programs write it, for the messages.
_PARTS = (
    'a string, a data URI, {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": "data:..."}}'
)


def many(value: Any) -> list[Any]:
    """A list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def parse_items(value: Any, limits: Limits, what: str = "input") -> list[str | Picture]:
    """Texts and pictures, in their order.

    Args:
        value: one or a list of: strings (a data URI is a picture), content parts, uploads.
        limits: how many, and how long.
        what: the field, for messages.

    Raises:
        Problem: for what is neither, with its place.
    """
    values = many(value)
    if not values:
        raise Problem(400, f"{what} is empty; give at least one text or picture.")
    if len(values) > limits.inputs:
        raise Problem(400, f"{what} has {len(values):,} entries; at most {limits.inputs:,} are taken in one request.")
    is_tokens = all(isinstance(entry, int) for entry in values) or all(
        isinstance(entry, list) and entry and all(isinstance(token, int) for token in entry) for entry in values
    )
    if is_tokens:
        raise Problem(
            400,
            f"{what} holds numbers of tokens, which belong to one tokenizer, and hardly this model's; send the texts. "
            "(With LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False.)",
        )
    return [_parse_item(entry, index, limits, what) for index, entry in enumerate(values)]


def parse_pictures(value: Any, limits: Limits, what: str = "images") -> list[Picture]:
    """As `parse_items`, where only pictures may be; strings are data URIs or the base64 of a file.

    Raises:
        Problem: for what is no picture, with its place.
    """
    values = [_as_uri(entry) if isinstance(entry, str) else entry for entry in many(value)]
    items = parse_items(values, limits, what)
    pictures = [item for item in items if isinstance(item, Picture)]
    if len(pictures) < len(items):
        raise Problem(400, f"{what} may hold pictures only; one of them is a text.")
    return pictures


async def fetched(items: Sequence[str | Picture], fetch: Fetch | None) -> list[str | Picture]:
    """The items with the content of addresses in place of these.

    Args:
        items: what `parse_items` gives.
        fetch: function of an address; None refuses all.

    Raises:
        Problem: for an address that cannot be, or is not, fetched.
    """
    result = list(items)
    for place, item in enumerate(items):
        if isinstance(item, Picture) and isinstance(item.content, str) and not item.content.startswith("data:"):
            if fetch is None:
                raise Problem(
                    400,
                    f"picture {item.index}: addresses are not fetched by this server (--allow-urls); send the picture "
                    "as a data URI.",
                )
            try:
                result[place] = Picture(await fetch(item.content), item.index)
            except (ValueError, OSError) as error:
                raise Problem(400, f"picture {item.index}: {error}") from error
    return result


def labels_of(labels: Any, templates: Any, limits: Limits) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels and templates of a request, checked as the pipeline checks them.

    Raises:
        Problem: with the sentence of the library, or the limit.
    """
    with users_mistakes():
        parsed = parse_labels(labels), parse_templates(templates)
    for values, most, what in zip(parsed, (limits.labels, limits.templates), ("labels", "templates"), strict=True):
        if len(values) > most:
            raise Problem(400, f"{len(values):,} {what} are too many; at most {most:,} are taken in one request.")
        for value in values:
            _check_length(value, what, limits)
    return parsed


def _parse_item(entry: Any, index: int, limits: Limits, what: str) -> str | Picture:
    if isinstance(entry, bytes):
        return Picture(entry, index)
    is_text = False
    if isinstance(entry, dict):
        entry, is_text = _content_of(entry, index, what)
        if not is_text:
            return Picture(_as_uri(entry), index)
    if not isinstance(entry, str):
        raise Problem(400, f"{what}[{index}] is a {type(entry).__name__}; it must be {_PARTS}.")
    if entry.startswith("data:") and not is_text:
        return Picture(entry, index)
    try:
        check_text(entry)
    except ValueError as error:
        raise Problem(400, f"{what}[{index}]: {error}") from error
    _check_length(entry, f"{what}[{index}]", limits)
    return entry


def _content_of(part: dict[str, Any], index: int, what: str) -> tuple[str, bool]:
    """The text of a content part, or the address of its picture, and whether it is a text."""
    kinds = [kind for kind in ("text", "image_url", "image") if kind in part]
    value = part[kinds[0]] if len(kinds) == 1 else None
    if isinstance(value, dict):
        value = value.get("url")
    if not isinstance(value, str):
        raise Problem(400, f"{what}[{index}] is a content part that says neither a text nor a picture; give {_PARTS}.")
    return value, kinds[0] == "text"


def _as_uri(text: str) -> str:
    """Where a picture is: an address or a data URI as they are, bare base64 as a data URI."""
    return text if text.startswith(("data:", "http://", "https://")) else f"data:;base64,{text}"


def _check_length(text: str, what: str, limits: Limits) -> None:
    if len(text) > limits.characters:
        raise Problem(400, f"{what}: {len(text):,} characters are too many; at most {limits.characters:,} are taken.")
