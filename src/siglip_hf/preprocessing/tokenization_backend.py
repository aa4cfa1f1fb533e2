"""Calls of a Rust tokenizer that leave it as it is: safe in threads, and batches laid out at once.

transformers sets padding and truncation on the shared Rust object before each call, so that a thread can get the length
that another one asked for. Here the object never pads or truncates; both are done on what it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

from tokenizers import Encoding, PreTokenizedString, Token, Tokenizer
from transformers.tokenization_utils_base import AddedToken, BatchEncoding, TruncationStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import PaddingStrategy

from siglip_hf.preprocessing.tokenization_base import SiglipTokenization

# Held while a second Rust object is made, not while texts are encoded.
_MAKING = threading.Lock()
# What `TokenizersBackend` takes from the `truncation` and `padding` of a tokenizer.json into the arguments.
_FROM_FILE = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of")


class LazyBatchEncoding(BatchEncoding):
    """A BatchEncoding whose `Encoding`s are made when first asked for; most callers want the ids alone."""

    def __init__(self, data: dict[str, Any], tensor_type: Any, make: Callable[[], list[Encoding]]) -> None:
        self._make: Callable[[], list[Encoding]] | None = make
        self._made: list[Encoding] | None = None
        super().__init__(data, tensor_type=tensor_type, n_sequences=1)

    @property  # type: ignore[override]
    def _encodings(self) -> list[Encoding] | None:
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made

    @_encodings.setter
    def _encodings(self, encodings: list[Encoding] | None) -> None:
        if encodings is not None:
            self._made, self._make = encodings, None

    @property
    def is_fast(self) -> bool:
        return True


class Piece(NamedTuple):
    """A piece, its id, its place in the text, and whether a word begins with it."""

    text: str
    id: int
    begin: int
    end: int
    begins_word: bool


class StatelessTokenization(SiglipTokenization, TokenizersBackend):
    """A tokenizer of transformers whose calls do not change its Rust object."""

    # A second object that reads special tokens as text; the switch for it is state of the object as well.
    _splitting: Tokenizer | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name in _FROM_FILE:
            if name not in options:
                self.init_kwargs.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_splitting"}

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        self._splitting = None
        return super()._add_tokens(list(new_tokens), special_tokens)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Returns the pieces of `text`, and of `pair` after them; nothing is padded or truncated."""
        encoding = self._encodings([(text, pair)], add_special_tokens=add_special_tokens, **kwargs)[0]
        return encoding.tokens

    def _backend(self, split_special_tokens: bool | None) -> Tokenizer:
        """Returns the Rust object that does, or does not, read special tokens as text."""
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        backend: Any = self._tokenizer
        if backend.encode_special_tokens != split:
            with _MAKING:
                if self._splitting is None:
                    copied = Tokenizer.from_str(backend.to_str())
                    copied.encode_special_tokens = split
                    self._splitting = copied
                backend = self._splitting
        # Only where a file or other code has set them.
        if backend.padding is not None:
            backend.no_padding()
        if backend.truncation is not None:
            backend.no_truncation()
        return backend

    def _clean(self, text: str) -> str:
        """Returns what the Rust object is given for `text`."""
        return text

    def _origins(self, text: str) -> list[tuple[int, int]] | None:
        """Returns the place in `text` of each character of `_clean(text)`, or None if that is its own place."""
        return None

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, **options: Any
    ) -> BatchEncoding:
        if options.get("sanitize_control_tokens"):
            raise ValueError("sanitize_control_tokens is for chats; SigLIP's texts are no chats. Leave it out.")
        tensors = options.get("return_tensors")
        places = options.get("return_offsets_mapping") or options.get("return_special_tokens_mask")
        if self._is_plain(text, text_pair, options) and not places:
            texts = [text] if isinstance(text, str) else list(text)
            data = self._lay_out_texts(texts, options)
            if isinstance(text, str) and tensors is None:
                data = {name: rows[0] for name, rows in data.items()}
            return LazyBatchEncoding(data, tensors, lambda: self._encodings([(t, None) for t in texts], **options))

        batch, is_batched = self._sequences(text, text_pair, bool(options.get("is_split_into_words")))
        encodings = self._encodings(batch, **options)
        overflowing = bool(options.get("return_overflowing_tokens"))
        names = ("return_token_type_ids", "return_attention_mask", "return_special_tokens_mask")
        wanted: dict[str, Any] = {
            name: options.get(name) for name in (*names, "return_offsets_mapping", "return_length")
        }
        columns: dict[str, list[Any]] = {}
        flat: list[Encoding] = []
        for i, encoding in enumerate(encodings):
            rows, parts = self._convert_encoding(encoding, return_overflowing_tokens=overflowing, **wanted)
            if overflowing:
                rows["overflow_to_sample_mapping"] = [i] * len(parts)
            for name, values in rows.items():
                columns.setdefault(name, []).extend(values)
            flat.extend(parts)
        if not is_batched and tensors is None and not overflowing:
            columns = {name: values[0] for name, values in columns.items()}
        return BatchEncoding(columns, flat, tensor_type=tensors)

    def _lay_out_texts(self, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """Encodes B texts without anything that needs `Encoding`s; see `_lay_out`."""
        options = dict(options)
        backend = self._backend(options.get("split_special_tokens"))
        special = options.pop("add_special_tokens", True)
        encodings = backend.encode_batch_fast([self._clean(text) for text in texts], add_special_tokens=special)
        ids = [encoding.ids for encoding in encodings]
        limit = options.get("max_length")
        if options.get("truncation_strategy") != TruncationStrategy.DO_NOT_TRUNCATE and limit:
            for i, encoding in enumerate(encodings):
                if len(ids[i]) > limit:
                    if options.get("verbose", True):
                        self._warn_about_truncation()
                    ids[i] = self._truncated(ids[i], encoding.special_tokens_mask, limit)
        options.pop("truncation_strategy", None)
        return self._lay_out(ids, add_special_tokens=False, **options)

    def _truncated(self, ids: list[int], added: list[int], limit: int) -> list[int]:
        """Returns at most `limit` ids: the added special tokens at both ends, and of the text what fits."""
        first = added.index(0) if 0 in added else len(ids)
        end = len(ids) - added[::-1].index(0) if 0 in added else len(ids)
        room = max(limit - (len(ids) - (end - first)), 0)
        text = ids[first : first + room] if self.truncation_side == "right" else ids[end - room : end]
        return [*ids[:first], *text, *ids[end:]]

    def _sequences(self, text: Any, text_pair: Any, words: bool) -> tuple[list[tuple[Any, Any]], bool]:
        """Returns pairs of one or two sequences, each a string or with `words` a list of them, and whether a batch."""

        def is_sequence(value: Any) -> bool:
            if not words:
                return isinstance(value, str)
            return isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)

        batched = isinstance(text, (list, tuple)) and not (words and is_sequence(text) and text)
        firsts = list(text) if batched else [text]
        if text_pair is None:
            seconds: list[Any] = [None] * len(firsts)
        else:
            seconds = list(text_pair) if batched and isinstance(text_pair, (list, tuple)) else [text_pair]
        if len(firsts) != len(seconds):
            raise ValueError(f"There are {len(firsts)} texts but {len(seconds)} second texts; give as many of both.")
        pairs = []
        for first, second in zip(firsts, seconds, strict=True):
            if second is None and not is_sequence(first) and isinstance(first, (list, tuple)) and len(first) == 2:
                first, second = first
            for sequence in (first, second):
                if not is_sequence(sequence) and not (sequence is second and second is None):
                    what = "a list of strings" if words else "a string"
                    raise ValueError(f"A text must be {what}, not {sequence!r}.")
            pairs.append((first, second))
        return pairs, batched

    def _encodings(
        self,
        batch: Sequence[tuple[Any, Any]],
        *,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
        **_: Any,
    ) -> list[Encoding]:
        """Returns an `Encoding` per text or pair, truncated, ended and padded."""
        in_pairs = any(second is not None for _, second in batch)
        every = [sequence for sequences in batch for sequence in sequences if sequence is not None]
        cut = iter(self._cut(every, split_special_tokens, in_pairs))
        encodings = []
        for sequences in batch:
            parts = [next(cut) for sequence in sequences if sequence is not None]
            total = sum(map(len, parts)) + (self._number_added(parts) if add_special_tokens else 0)
            if truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE and max_length and total > max_length:
                if verbose:
                    self._warn_about_truncation()
                kept = self._kept([len(part) for part in parts], total - max_length, truncation_strategy)
                for part, length in zip(parts, kept, strict=True):
                    part.truncate(length, stride=stride, direction=self.truncation_side)
            encodings.append(self._end(parts, add_special_tokens, split_special_tokens))

        if padding_strategy != PaddingStrategy.DO_NOT_PAD:
            longest = max(map(len, encodings), default=0)
            target = longest if padding_strategy == PaddingStrategy.LONGEST else int(max_length or 0)
            if pad_to_multiple_of:
                target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
            for encoding in encodings:
                encoding.pad(
                    target,
                    direction=padding_side or self.padding_side,
                    pad_id=self.pad_token_id,
                    pad_type_id=self.pad_token_type_id,
                    pad_token=self.pad_token,
                )
        return encodings

    def _number_added(self, parts: list[Encoding]) -> int:
        """Returns how many special tokens `_end` adds."""
        backend: Any = self._tokenizer
        return backend.num_special_tokens_to_add(len(parts) == 2)

    def _kept(self, lengths: list[int], excess: int, strategy: TruncationStrategy) -> list[int]:
        """Returns the lengths of one or two sequences that together lose `excess` tokens, as the Rust library cuts."""
        if len(lengths) == 1 or strategy != TruncationStrategy.LONGEST_FIRST:
            cut = 1 if strategy == TruncationStrategy.ONLY_SECOND else 0
            return [max(length - excess, 0) if i == cut else length for i, length in enumerate(lengths)]
        room = max(sum(lengths) - excess, 0)
        shorter = min(*lengths, room // 2)
        longer = room - shorter
        return [longer, shorter] if lengths[0] > lengths[1] else [shorter, longer]

    def _cut(self, sequences: list[Any], split_special_tokens: bool | None, in_pairs: bool) -> list[Encoding]:
        """Returns each string, or list of words, in pieces, nothing added."""
        backend = self._backend(split_special_tokens)
        texts = list(chain.from_iterable([s] if isinstance(s, str) else s for s in sequences))
        encodings = backend.encode_batch([self._clean(text) for text in texts], add_special_tokens=False)
        cut = iter(zip(texts, encodings, strict=True))
        return [
            self._placed(*next(cut), in_pair=in_pairs)
            if isinstance(sequence, str)
            else merged([self._placed(*next(cut), word=i) for i in range(len(sequence))])
            for sequence in sequences
        ]

    def _placed(self, text: str, encoding: Encoding, word: int | None = None, in_pair: bool = False) -> Encoding:
        """Returns the pieces of `_clean(text)` with their places in `text`, all of the word numbered `word`.

        The library marks what it encodes as the first sequence; for `in_pair` the result is without that mark.
        """
        origins = self._origins(text)
        if origins is None and word is None and not in_pair:
            return encoding
        if origins is None:
            origins = [(i, i + 1) for i in range(len(text))]
        origins = [*origins, (len(text), len(text))]
        pieces = []
        before: int | None = -1
        for token, index, (begin, end), of in zip(
            encoding.tokens, encoding.ids, encoding.offsets, encoding.word_ids, strict=True
        ):
            first = origins[begin][0]
            last = origins[end - 1][1] if end > begin else first
            pieces.append(Piece(token, index, first, last, of != before))
            before = of
        return to_encoding(text, pieces, word)

    def _end(self, parts: list[Encoding], add_special_tokens: bool, split_special_tokens: bool | None) -> Encoding:
        """Returns one or two sequences as one, with the special tokens."""
        backend = self._backend(split_special_tokens)
        return backend.post_process(parts[0], parts[1] if len(parts) == 2 else None, add_special_tokens)


def merged(encodings: list[Encoding]) -> Encoding:
    """Returns the words of one sequence as one, each word's places counted from its own start."""
    return Encoding.merge(encodings, growing_offsets=False)


def to_encoding(text: str, pieces: list[Piece], word: int | None = None) -> Encoding:
    """Returns the `Encoding` of `text` cut into `pieces`, all of the word numbered `word` if that is given."""
    places: Sequence[int] = range(len(text) + 1)
    if not text.isascii():  # the library counts in bytes here
        places = [0, *accumulate(len(char.encode()) for char in text)]
    starts = [0]
    tokens: list[list[Token]] = [[]]
    covered = 0
    for piece in pieces:
        # A place that earlier pieces share, of a character that becomes many, is not cut apart.
        if piece.begins_word and piece.begin > starts[-1] and piece.begin >= covered:
            starts.append(piece.begin)
            tokens.append([])
        covered = max(covered, piece.end)
        offset = places[starts[-1]]
        tokens[-1].append(Token(piece.id, piece.text, (places[piece.begin] - offset, places[piece.end] - offset)))
    ends = [*starts[1:], len(text)]
    splits = PreTokenizedString(text if pieces else "")
    splits.split(lambda _, whole: [whole[begin:end] for begin, end in zip(starts, ends, strict=True)])
    groups = iter(tokens)
    splits.tokenize(lambda _: next(groups))
    return splits.to_encoding(word_idx=word)
