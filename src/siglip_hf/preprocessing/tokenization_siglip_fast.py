"""SigLIP's tokenizer with the interface of transformers' fast ones: offsets, `char_to_token`, `tokenizer.json`.

Ids come from SentencePiece here too. The Rust library cannot give them exactly: it adds up scores in other precision,
which cuts runs such as "0000000" elsewhere, and normalizes by grapheme, which treats piled-up marks differently.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Encoding,
    PreTokenizedString,
    Regex,
    Token,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import BatchEncoding, TruncationStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import PaddingStrategy

from siglip_hf.preprocessing.text_cleaning import canonicalize_with_offsets
from siglip_hf.preprocessing.tokenization_siglip import (
    MARK,
    TEXT_LENGTH,
    SiglipTokenization,
    SiglipTokenizer,
    special_token,
    text_length,
)


class _LazyBatchEncoding(BatchEncoding):
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


class SiglipTokenizerFast(SiglipTokenization, TokenizersBackend):
    """Texts to `input_ids`, and to the places of the tokens in the text.

    Ids, defaults and arguments are those of `SiglipTokenizer`, which see. Offsets point into the text as given, before
    lowercasing and cleaning. `backend_tokenizer`, and the `tokenizer.json` that `save_pretrained` writes beside
    `spiece.model`, hold the whole pipeline for programs that read only that; see the module on where it may differ.
    A folder with a `tokenizer.json` but no `spiece.model` is tokenized by it.

    Args:
        vocab_file: Path of the SentencePiece model, `spiece.model`.
        tokenizer_file: Path of a `tokenizer.json`, used where there is no `vocab_file`.
        eos_token: Token that ends every text.
        unk_token: Token of unknown characters.
        pad_token: Token of padding; SigLIP pads with the end-of-text token.
        additional_special_tokens: More special tokens.
        sp_model_kwargs: Arguments of `sentencepiece.SentencePieceProcessor`.
        model_max_length: Length L of the texts in tokens. A checkpoint states it in `tokenizer_config.json`; 64 if not.
        do_lower_case: Lowercase the text, as in training.
        **kwargs: As of every fast tokenizer of transformers.

    Examples:
        >>> tokenizer = SiglipTokenizerFast.from_pretrained("google/siglip-base-patch16-224")
        >>> tokenizer("A cat", return_offsets_mapping=True, padding=False)["offset_mapping"]
        [(0, 1), (2, 5), (0, 0)]
    """

    vocab_files_names = {"vocab_file": "spiece.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    slow_tokenizer_class = SiglipTokenizer  # type: ignore[assignment]

    # Cuts and looks up the text; None without a SentencePiece model.
    slow_tokenizer: SiglipTokenizer | None

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        eos_token: str | AddedToken = "</s>",
        unk_token: str | AddedToken = "<unk>",
        pad_token: str | AddedToken = "</s>",
        additional_special_tokens: list[str | AddedToken] | None = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        model_max_length: int | None = TEXT_LENGTH,
        do_lower_case: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs.update(
            eos_token=special_token(eos_token),
            unk_token=special_token(unk_token),
            pad_token=special_token(pad_token),
            sp_model_kwargs=sp_model_kwargs or {},
            model_max_length=text_length(model_max_length),
        )
        if additional_special_tokens is not None:
            kwargs["additional_special_tokens"] = additional_special_tokens
        self.slow_tokenizer = None
        if kwargs.get("tokenizer_object") is None and vocab_file is not None and os.path.isfile(vocab_file):
            self.slow_tokenizer = SiglipTokenizer(vocab_file, do_lower_case=do_lower_case, **kwargs)
            self._tokenizer = backend_tokenizer(self.slow_tokenizer)
            tokenizer_file = None
        elif kwargs.get("tokenizer_object") is None and (tokenizer_file is None or not os.path.isfile(tokenizer_file)):
            raise ValueError(
                f"There is neither a SentencePiece model at {vocab_file} nor a tokenizer.json at {tokenizer_file}. "
                "A SigLIP tokenizer is made from spiece.model."
            )
        super().__init__(vocab_file=vocab_file, tokenizer_file=tokenizer_file, do_lower_case=do_lower_case, **kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        # One set of special tokens and one length for both, also when one is replaced later.
        mirrored = ("_special_tokens_map", "_extra_special_tokens", "model_max_length")
        if key in mirrored and self.__dict__.get("slow_tokenizer"):
            setattr(self.slow_tokenizer, key, value)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Returns the arguments of `__init__` as they are: it reads the files itself."""
        return kwargs

    @property
    def do_lower_case(self) -> bool:
        """Whether text is lowercased."""
        return self.init_kwargs["do_lower_case"] if self.slow_tokenizer is None else self.slow_tokenizer.do_lower_case

    @property
    def can_save_slow_tokenizer(self) -> bool:
        """Whether `save_pretrained` writes a `spiece.model`, which `SiglipTokenizer` can load."""
        return self.slow_tokenizer is not None

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:  # type: ignore[override]
        """Writes the SentencePiece model into `save_directory`, if there is one."""
        if self.slow_tokenizer is None:
            return ()
        return self.slow_tokenizer.save_vocabulary(save_directory, filename_prefix)

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return files + self.save_vocabulary(str(save_directory), filename_prefix)

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        if self.slow_tokenizer is None:
            return super()._add_tokens(list(new_tokens), special_tokens)
        added: list[Any] = [
            token
            if isinstance(token, AddedToken)
            else AddedToken(token, special=special_tokens, normalized=not special_tokens)
            for token in new_tokens
        ]
        # The slow one first: it lowercases tokens that are to be found in lowercased text.
        self.slow_tokenizer._add_tokens(added, special_tokens=special_tokens)
        return super()._add_tokens(added, special_tokens)

    def canonicalize_text(self, text: str, *, keep_punctuation_exact_string: str | None = None) -> str:
        """Cleans a text as the training data was cleaned; see `siglip_hf.canonicalize_text`.

        Args:
            text: any text.
            keep_punctuation_exact_string: this string stays as it is, such as the `{}` of a template.

        Returns:
            The text that pieces are cut from.
        """
        return SiglipTokenizer.canonicalize_text(
            self,  # type: ignore[arg-type]
            text,
            keep_punctuation_exact_string=keep_punctuation_exact_string,
        )

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Returns the pieces of `text`, and of `pair` after them."""
        options = {"padding_strategy": PaddingStrategy.DO_NOT_PAD, **kwargs}
        return self._encode_plus(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the text of `tokens`, special ones as they are."""
        if self.slow_tokenizer is None:
            return super().convert_tokens_to_string(tokens)
        return self.slow_tokenizer.convert_tokens_to_string(tokens)

    def _decode(self, token_ids: int | list[int], *args: Any, **kwargs: Any) -> str:
        if self.slow_tokenizer is None:
            return super()._decode(token_ids, *args, **kwargs)
        return self.slow_tokenizer._decode(token_ids, *args, **kwargs)

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, **options: Any
    ) -> BatchEncoding:
        if self.slow_tokenizer is None:
            return super()._encode_plus(text, text_pair, **options)
        split = options.get("split_special_tokens")
        options["split_special_tokens"] = self.split_special_tokens if split is None else split
        tensors = options.get("return_tensors")
        if self._is_plain(text, text_pair, options) and not options.get("return_offsets_mapping"):
            texts = [text] if isinstance(text, str) else list(text)
            ids = self.slow_tokenizer.encode_texts(texts, split_special_tokens=options["split_special_tokens"])
            data = self._lay_out(ids, **options)
            if isinstance(text, str) and tensors is None:
                data = {name: rows[0] for name, rows in data.items()}
            return _LazyBatchEncoding(data, tensors, lambda: self._encodings([(t, None) for t in texts], **options))

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
        batch: Iterable[tuple[Any, Any]],
        *,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        split_special_tokens: bool = False,
        **_: Any,
    ) -> list[Encoding]:
        """Returns an `Encoding` per text or pair, truncated, ended and padded as `SiglipTokenizer` does."""
        encodings = []
        for sequences in batch:
            parts = [self._encode_sequence(s, split_special_tokens) for s in sequences if s is not None]
            total = sum(map(len, parts)) + (len(parts) if add_special_tokens else 0)
            if truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE and max_length and total > max_length:
                lengths = [list(range(len(part))) for part in parts]
                kept = self.slow_tokenizer.truncate_sequences(  # type: ignore[union-attr]
                    lengths[0], lengths[1] if len(parts) == 2 else None, total - max_length, truncation_strategy
                )
                for part, ids in zip(parts, kept, strict=False):
                    part.truncate(len(ids), stride=stride, direction=self.truncation_side)
            template: list[str] = []
            for name, part in zip("AB", parts, strict=False):
                template.append(f"${name}:0")
                if add_special_tokens and self._missing_eos(part.ids):
                    template.append(f"{self.eos_token}:0")
            single, pair = (["$A:0"], template) if len(parts) == 2 else (template, None)
            ending = processors.TemplateProcessing(
                single=single, pair=pair, special_tokens=[(self.eos_token, self.eos_token_id)]
            )
            encodings.append(ending.process(parts[0], parts[1] if pair else None))

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

    def _encode_sequence(self, sequence: str | Sequence[str], split_special_tokens: bool) -> Encoding:
        if isinstance(sequence, str):
            return _to_encoding(sequence, self._place_pieces(sequence, split_special_tokens))
        words = [
            _to_encoding(word, self._place_pieces(word, split_special_tokens), i) for i, word in enumerate(sequence)
        ]
        return Encoding.merge(words, growing_offsets=False)

    def _place_pieces(self, text: str, split_special_tokens: bool) -> list[_Piece]:
        """Cuts `text` as `SiglipTokenizer.tokenize` does, and finds each piece in it."""
        slow = self.slow_tokenizer
        assert slow is not None
        unk = str(slow.unk_token)
        placed: list[_Piece] = []
        for part, start, is_token in slow.split_added_tokens(text, split_special_tokens=split_special_tokens):
            if is_token:
                index = slow._convert_token_to_id_with_added_voc(part)
                placed.append(_Piece(part, index, start, start + len(part), True))
                continue
            canonical, origins = canonicalize_with_offsets(part, lowercase=slow.do_lower_case)
            origins.append((len(part), len(part)))
            cut = slow.sp_model.encode(unk + canonical, return_type="offset_mapping")
            skipped = slow.unk_token_length if len(cut["pieces"]) >= slow.unk_token_length else 0
            found: list[_Piece] = []
            later = (len(canonical), len(canonical))
            # Of several pieces of one character only the last has its place, so they are gone through backwards.
            for i in reversed(range(skipped, len(cut["pieces"]))):
                piece = cut["pieces"][i]
                begin, end = (max(place - len(unk), 0) for place in cut["offsets"][i])
                while begin < end and canonical[begin] in (MARK, " "):
                    begin += 1
                if begin == end == later[0] and piece != MARK:
                    end = later[1]
                if begin < end:
                    later = (begin, end)
                first = max(start + origins[begin][0], 0)
                last = start + origins[end - 1][1] if end > begin else first
                index = slow._convert_token_to_id_with_added_voc(piece)
                found.append(_Piece(piece, index, first, last, piece.startswith(MARK) or i == skipped))
            placed += reversed(found)
        return slow.drop_empty_start(placed)


class _Piece(NamedTuple):
    """A piece, its id, its place in the text, and whether a word begins with it."""

    text: str
    id: int
    begin: int
    end: int
    begins_word: bool


def _to_encoding(text: str, pieces: list[_Piece], word: int | None = None) -> Encoding:
    """Returns the `Encoding` of `text` cut into `pieces`, all of the word numbered `word` if that is given."""
    places: Sequence[int] = range(len(text) + 1)
    if not text.isascii():  # the library counts in bytes here
        places = [0, *accumulate(len(char.encode()) for char in text)]
    starts = [0]
    tokens: list[list[Token]] = [[]]
    for piece in pieces:
        if piece.begins_word and piece.begin > starts[-1]:
            starts.append(piece.begin)
            tokens.append([])
        offset = places[starts[-1]]
        tokens[-1].append(Token(piece.id, piece.text, (places[piece.begin] - offset, places[piece.end] - offset)))
    ends = [*starts[1:], len(text)]
    splits = PreTokenizedString(text if pieces else "")
    splits.split(lambda _, whole: [whole[begin:end] for begin, end in zip(starts, ends, strict=True)])
    groups = iter(tokens)
    splits.tokenize(lambda _: next(groups))
    return splits.to_encoding(word_idx=word)


def backend_tokenizer(slow: SiglipTokenizer) -> Tokenizer:
    """Returns the whole pipeline of `slow` in the Rust library, with the same vocabulary."""
    proto = import_protobuf().ModelProto.FromString(slow.sp_model.serialized_model_proto())
    spec = proto.normalizer_spec
    tokenizer = Tokenizer(
        models.Unigram(
            [(piece.piece, piece.score) for piece in proto.pieces],
            unk_id=proto.trainer_spec.unk_id,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    steps: list[Any] = [normalizers.Replace(MARK, " ")]
    if slow.do_lower_case:
        # The library lowercases letter by letter, without the sigma that Greek words end in.
        steps += [normalizers.Replace(Regex(r"(?<=[\p{L}\p{M}])Σ(?!\p{L})"), "ς"), normalizers.Lowercase()]
    steps += [
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Replace(Regex(r"[\s\x1c-\x1f\x85]+"), " "),
        normalizers.Strip(),
    ]
    if spec.precompiled_charsmap:
        # Composed first, because the library looks up letters with separate marks in fewer cases.
        steps += [normalizers.NFC(), normalizers.Precompiled(spec.precompiled_charsmap)]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    metaspace = decoders.Metaspace(replacement=MARK, prepend_scheme="always")
    if proto.trainer_spec.byte_fallback:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    else:
        tokenizer.decoder = metaspace
    eos = str(slow.eos_token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A:0", f"{eos}:0"],
        pair=["$A:0", f"{eos}:0", "$B:0", f"{eos}:0"],
        special_tokens=[(eos, slow.eos_token_id)],
    )
    return tokenizer
