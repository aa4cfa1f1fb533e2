"""Class embeddings for zero-shot classification, each label encoded once however many pictures it is held against.

Zero-shot weights from several templates: the mean of the normalized text embeddings, normalized again (Radford et al.
2021, arXiv:2103.00020, section 3.1.4). With SigLIP's text tower at base size, 1000 labels cost as much as 250 pictures.
"""

from __future__ import annotations

import re
import reprlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from siglip_hf.files import sha256
from siglip_hf.inference.label_store import LabelStore, text_side_digest
from siglip_hf.inference.optimize.packed import weights_state
from siglip_hf.preprocessing.text_cleaning import label_words

#: Bound on the memory of a bank's rows; at E = 768 it holds about 87,000 classes.
DEFAULT_MAX_BYTES = 256 * 2**20

#: Texts per forward of the text tower.
DEFAULT_CHUNK_SIZE = 64

# The templates and the tokenizer's arguments, in words.
_Context = tuple[tuple[str, ...], str]

_ONE_PLACE = re.compile(r"[^{}]*\{0?\}[^{}]*")


def parse_labels(candidate_labels: str | Iterable[str]) -> tuple[str, ...]:
    """Candidate labels as distinct strings, in the order given.

    Args:
        candidate_labels: a list (or any iterable) of labels, or one string that separates them by commas. Space around
            the commas is dropped, and so are empty parts. A label that itself holds a comma needs the list form.

    Raises:
        ValueError: if there is no label, or one that is blank or not a string.
    """
    if isinstance(candidate_labels, str):
        labels = [part.strip() for part in candidate_labels.split(",") if part.strip()]
    elif isinstance(candidate_labels, Iterable) and not isinstance(candidate_labels, bytes):
        labels = list(candidate_labels)
    else:
        raise ValueError(
            f"candidate_labels={candidate_labels!r} are no labels; pass a list of strings, or a string like 'cat, dog'."
        )
    if not labels:
        raise ValueError(f"candidate_labels={candidate_labels!r} hold no label; pass at least one.")
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise ValueError(
                f"{label!r} among the candidate_labels is not a label; each must be a string with words in it."
            )
        check_characters(label, "a label")
    return tuple(dict.fromkeys(map(str, labels)))  # plain strings, also where an array's own kind was given


def parse_templates(hypothesis_template: str | Iterable[str]) -> tuple[str, ...]:
    """One or several templates, each checked to have exactly one place for the label.

    The place is `{}` or `{0}`. Nothing else may stand in braces: a template is no format string with widths or
    attributes, which could cost memory without bound. A template that passes can be filled by `str.format`.

    Raises:
        ValueError: if there is no template, or one without a single place for the label.
    """
    is_one = isinstance(hypothesis_template, str) or not isinstance(hypothesis_template, Iterable)
    templates: list[Any] = [hypothesis_template] if is_one else list(hypothesis_template)
    if not templates:
        raise ValueError("there is no template; pass at least one template, such as 'This is a photo of {}.'")
    for template in templates:
        if not isinstance(template, str) or not _ONE_PLACE.fullmatch(template):
            raise ValueError(
                f"the template {reprlib.repr(template)} has no single '{{}}' where the label goes, or other "
                "braces; write for instance 'This is a photo of {}.', or '{}' if the labels are whole captions already."
            )
        check_characters(template, "a template")
    return tuple(dict.fromkeys(templates))


def check_characters(text: str, what: str) -> None:
    """Refuses a text with half a character in it, which no tokenizer takes: bytes that were no UTF-8.

    Args:
        text: What is checked.
        what: What it should serve as, for the error: "a label".

    Raises:
        ValueError: with the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{text!r} cannot be {what}: the character at place {error.start} is not valid Unicode."
        ) from error


class LabelBank:
    """Remembers the class embeddings of one model and tokenizer, least recently used out first.

    A row belongs to a label, the templates and the tokenizer's arguments. All rows are dropped when the text tower's
    weights change: another tensor, dtype or device, or an in-place update that autograd counts (an optimizer's step,
    `load_state_dict`). What autograd does not count (writing through `weight.data`, switching between adapters) needs
    `clear()`. Threads may share a bank: they take turns.

    Attributes:
        model: a model with `encode_text(input_ids) -> (B, E)`, normalized.
        tokenizer: its tokenizer.
        device: where token ids go; the model's device unless given (an offloaded model has none of its own).
        max_bytes: bound on the memory that the rows take; the last answer is kept beside them.
        chunk_size: texts per forward of the text tower.
        store: where rows are kept on disk besides.
        texts_encoded: how many texts went through the text tower so far.

    Examples:
        >>> from siglip_hf import SiglipModel, SiglipTokenizer, default_checkpoint
        >>> from siglip_hf.inference.label_bank import LabelBank
        >>> model = SiglipModel.from_pretrained(default_checkpoint())
        >>> bank = LabelBank(model, SiglipTokenizer.from_pretrained(default_checkpoint()))
        >>> bank.class_embeddings(["cat", "dog"], ["a drawing of a {}"]).shape
        torch.Size([2, 192])
        >>> bank.class_embeddings(["dog", "cat"], ["a drawing of a {}"]).shape
        torch.Size([2, 192])
        >>> bank.texts_encoded  # none of them twice
        2
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: torch.device | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        store: LabelStore | None = None,
    ):
        if max_bytes < 0 or chunk_size < 1:
            raise ValueError(f"max_bytes={max_bytes} must be 0 or more, and chunk_size={chunk_size} at least 1.")
        self.model, self.tokenizer = model, tokenizer
        self.device = model.device if device is None else device
        self.max_bytes, self.chunk_size = max_bytes, chunk_size
        self.store = store
        self.texts_encoded = 0
        self._rows: OrderedDict[tuple[str, tuple[str, ...], str], torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._weights: tuple[Any, ...] = ()
        self._digest: str | None = None  # of the weights, for the store; "" if it cannot be told
        # The last answer, whole: a stream of pictures asks the same question for each batch.
        self._last: tuple[tuple[Any, ...], torch.Tensor] | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def __len__(self) -> int:
        """Number of classes remembered."""
        return len(self._rows)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._rows.clear()
            self._bytes = 0
            self._last = None

    def repack(self, pack: Callable[[Any], Any]) -> None:
        """Calls `pack(model)`, which stores the same weights in another form: what is remembered stays."""
        with self._lock:
            is_current = self._weights == weights_state(self.model.text_model)
            pack(self.model)
            if is_current:
                self._weights = weights_state(self.model.text_model)

    @torch.no_grad()
    def class_embeddings(
        self,
        labels: Sequence[str],
        templates: Sequence[str],
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """One normalized embedding per label; only labels not met before go through the text tower.

        Args:
            labels: C distinct labels; `_` in one is read as a space.
            templates: texts with one `{}` each; the embeddings of a label under all of them are averaged.
            tokenizer_kwargs: arguments of the tokenizer's call. By default texts are padded and truncated to the
                length that the model was trained on.

        Returns:
            (C, E) float32, where the model puts it. Not to be written to.

        Raises:
            ValueError: for templates that `parse_templates` refuses.
        """
        context, options = self._context(parse_templates(templates), tokenizer_kwargs)
        question = (tuple(labels), *context)
        with self._lock:
            self._forget_other_weights()
            if self._last is None or self._last[0] != question:
                self._last = (question, self._answer(labels, context, options))
            return self._last[1]

    def missing(self, labels: Sequence[str], templates: Sequence[str]) -> dict[str, list[str]]:
        """The texts of each label that is not known, for a caller that encodes them itself; see `remember`.

        Args:
            labels: distinct labels.
            templates: as for `class_embeddings`.
        """
        context, _ = self._context(parse_templates(templates), None)
        with self._lock:
            self._forget_other_weights()
            known = self._known(labels, context)
        return {label: _texts(label, context[0]) for label in labels if label not in known}

    def remember(self, rows: Mapping[str, torch.Tensor], templates: Sequence[str]) -> None:
        """Takes rows that were encoded elsewhere with this bank's model.

        Args:
            rows: by label, embeddings (T, E) of its texts under the T templates.
            templates: the templates.
        """
        context, _ = self._context(parse_templates(templates), None)
        with self._lock:
            self._keep({label: _averaged(texts[None])[0] for label, texts in rows.items()}, context)

    def _context(
        self, templates: tuple[str, ...], tokenizer_kwargs: Mapping[str, Any] | None
    ) -> tuple[_Context, dict[str, Any]]:
        """What a row depends on beside its label, and the tokenizer's arguments."""
        options = {**self._trained_text_form(), **(tokenizer_kwargs or {})}
        return (templates, repr(sorted(options.items()))), options

    def _forget_other_weights(self) -> None:
        if (weights := weights_state(self.model.text_model)) != self._weights:
            self.clear()
            self._weights, self._digest = weights, None

    def _answer(self, labels: Sequence[str], context: _Context, options: Mapping[str, Any]) -> torch.Tensor:
        if options["padding"] == "max_length":
            return self._recall(labels, context, options)
        # The padding of a text, hence its embedding, depends on the other texts: only whole answers are kept.
        return self._encode(labels, context[0], options, chunk_size=len(labels) * len(context[0]))

    def _recall(self, labels: Sequence[str], context: _Context, options: Mapping[str, Any]) -> torch.Tensor:
        rows = self._known(labels, context)
        missing = [label for label in labels if label not in rows]
        templates = context[0]
        for group in _chunks(missing, max(1, self.chunk_size // len(templates))):
            encoded = self._encode(group, templates, options, self.chunk_size)
            rows.update(self._keep(dict(zip(group, encoded, strict=True)), context))
        return torch.stack([rows[label] for label in labels])  # (C, E)

    def _known(self, labels: Sequence[str], context: _Context) -> dict[str, torch.Tensor]:
        """Rows of the labels that are in memory or in the store."""
        rows = {}
        for label in labels:
            if (key := (label, *context)) in self._rows:
                self._rows.move_to_end(key)
                rows[label] = self._rows[key]
        if keys := self._store_keys([label for label in labels if label not in rows], context):
            assert self.store is not None
            stored = self.store.get(list(keys.values()))
            found = {label: torch.tensor(stored[key]) for label, key in keys.items() if key in stored}
            device = next(self.model.text_model.parameters()).device if self.device is None else self.device
            rows.update(self._keep({label: row.to(device) for label, row in found.items()}, context, store=False))
        return rows

    def _keep(self, rows: Mapping[str, torch.Tensor], context: _Context, store: bool = True) -> dict[str, torch.Tensor]:
        """Puts rows into memory and the store, and gives them back, each with memory of its own."""
        kept = {label: row.clone() for label, row in rows.items()}  # a view would keep its whole group alive
        for label, row in kept.items():
            key = (label, *context)
            self._bytes += row.nbytes - (self._rows[key].nbytes if key in self._rows else 0)
            self._rows[key] = row
        while self._bytes > self.max_bytes:
            self._bytes -= self._rows.popitem(last=False)[1].nbytes
        if store and (keys := self._store_keys(list(kept), context)):
            assert self.store is not None
            self.store.put({keys[label]: row.cpu().numpy() for label, row in kept.items()})
        return kept

    def _store_keys(self, labels: Sequence[str], context: _Context) -> dict[str, str]:
        """The key of each label in the store; none without a store, or for weights that cannot be told from others."""
        if self.store is None or not labels:
            return {}
        if self._digest is None:
            self._digest = text_side_digest(self.model, self.tokenizer) or ""
        depends_on = repr((self._digest, context))
        return {label: sha256([repr((depends_on, label)).encode()]) for label in labels if self._digest}

    def _encode(
        self, labels: Sequence[str], templates: Sequence[str], options: Mapping[str, Any], chunk_size: int
    ) -> torch.Tensor:
        texts = [text for label in labels for text in _texts(label, templates)]
        embeds = torch.cat([self._encode_chunk(chunk, options) for chunk in _chunks(texts, chunk_size)])
        return _averaged(embeds.unflatten(0, (len(labels), len(templates))))

    def _encode_chunk(self, texts: Sequence[str], options: Mapping[str, Any]) -> torch.Tensor:
        input_ids = self.tokenizer(list(texts), return_tensors="pt", **options)["input_ids"]  # (B, L)
        self.texts_encoded += len(texts)
        return self.model.encode_text(input_ids.to(self.device)).float()  # (B, E)

    def _trained_text_form(self) -> dict[str, Any]:
        length = self.model.config.text_config.max_position_embeddings
        return {"padding": "max_length", "truncation": True, "max_length": length}


def _texts(label: str, templates: Sequence[str]) -> list[str]:
    return [template.format(label_words(label)) for template in templates]


def _averaged(embeds: torch.Tensor) -> torch.Tensor:
    """(C, T, E) under T templates to (C, E), of length 1."""
    return embeds[:, 0] if embeds.shape[1] == 1 else nn.functional.normalize(embeds.mean(dim=1), dim=-1)


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))
