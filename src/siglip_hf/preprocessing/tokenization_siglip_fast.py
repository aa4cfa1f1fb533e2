"""SigLIP's tokenizer with the interface of transformers' fast ones: offsets, `char_to_token`, `tokenizer.json`.

Ids come from SentencePiece here too. The Rust library cannot give them exactly: it adds up scores in other precision,
which cuts runs such as "0000000" elsewhere, and normalizes by grapheme, which treats piled-up marks differently.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import TruncationStrategy

from siglip_hf.preprocessing.text_cleaning import canonicalize_with_offsets
from siglip_hf.preprocessing.tokenization_backend import Piece, StatelessTokenization, merged, to_encoding
from siglip_hf.preprocessing.tokenization_base import TEXT_LENGTH, special_token, text_length
from siglip_hf.preprocessing.tokenization_siglip import MARK, SiglipTokenizer


class SiglipTokenizerFast(StatelessTokenization):
    """Texts to `input_ids`, and to the places of the tokens in the text.

    Ids, defaults and arguments are those of `SiglipTokenizer`; see there. Offsets point into the text as given, before
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
        >>> from siglip_hf import SiglipTokenizerFast, default_checkpoint
        >>> tokenizer = SiglipTokenizerFast.from_pretrained(default_checkpoint())
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

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the text of `tokens`, special ones as they are."""
        if self.slow_tokenizer is None:
            return super().convert_tokens_to_string(tokens)
        return self.slow_tokenizer.convert_tokens_to_string(tokens)

    def _decode(self, token_ids: int | list[int], *args: Any, **kwargs: Any) -> str:
        if self.slow_tokenizer is None:
            return super()._decode(token_ids, *args, **kwargs)
        return self.slow_tokenizer._decode(token_ids, *args, **kwargs)

    def _lay_out_texts(self, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
        if self.slow_tokenizer is None:
            return super()._lay_out_texts(texts, options)
        split = options.get("split_special_tokens")
        ids = self.slow_tokenizer.encode_texts(
            texts, split_special_tokens=self.split_special_tokens if split is None else split
        )
        return self._lay_out(ids, **options)

    def _cut(self, sequences: list[Any], split_special_tokens: bool | None, in_pairs: bool) -> list[Encoding]:
        if self.slow_tokenizer is None:
            return super()._cut(sequences, split_special_tokens, in_pairs)
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        return [
            to_encoding(sequence, self._place_pieces(sequence, split))
            if isinstance(sequence, str)
            else merged([to_encoding(word, self._place_pieces(word, split), i) for i, word in enumerate(sequence)])
            for sequence in sequences
        ]

    def _number_added(self, parts: list[Encoding]) -> int:
        return super()._number_added(parts) if self.slow_tokenizer is None else len(parts)

    def _kept(self, lengths: list[int], excess: int, strategy: TruncationStrategy) -> list[int]:
        if self.slow_tokenizer is None:
            return super()._kept(lengths, excess, strategy)
        ids = [list(range(length)) for length in lengths]
        kept = self.slow_tokenizer.truncate_sequences(ids[0], ids[1] if ids[1:] else None, excess, strategy)
        return [len(part) for part in kept[: len(lengths)]]

    def _end(self, parts: list[Encoding], add_special_tokens: bool, split_special_tokens: bool | None) -> Encoding:
        if self.slow_tokenizer is None:
            return super()._end(parts, add_special_tokens, split_special_tokens)
        template: list[str] = []
        for name, part in zip("AB", parts, strict=False):
            template.append(f"${name}:0")
            if add_special_tokens and self._missing_eos(part.ids):
                template.append(f"{self.eos_token}:0")
        single, pair = (["$A:0"], template) if len(parts) == 2 else (template, None)
        ending = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(self.eos_token, self.eos_token_id)]
        )
        return ending.process(parts[0], parts[1] if pair else None)

    def _place_pieces(self, text: str, split_special_tokens: bool) -> list[Piece]:
        """Cuts `text` as `SiglipTokenizer.tokenize` does, and finds each piece in it."""
        slow = self.slow_tokenizer
        assert slow is not None
        model = slow.sp_model
        unk = str(slow.unk_token)
        placed: list[Piece] = []
        for part, start, is_token in slow.split_added_tokens(text, split_special_tokens=split_special_tokens):
            if is_token:
                index = slow._convert_token_to_id_with_added_voc(part)
                placed.append(Piece(part, index, start, start + len(part), True))
                continue
            canonical, origins = canonicalize_with_offsets(part, lowercase=slow.do_lower_case)
            origins.append((len(part), len(part)))
            pieces, ids = (model.encode(unk + canonical, out_type=kind) for kind in (str, int))
            # The pieces, end to end, are the normalized text, which knows the place of each of its characters.
            normalized, places = model.normalize(unk + canonical, with_offsets=True)
            skipped = slow.unk_token_length if len(pieces) >= slow.unk_token_length else 0
            position, bytes_left = 0, 0
            for i, (piece, piece_id) in enumerate(zip(pieces, ids, strict=True)):
                first = position
                if model.is_byte(piece_id):
                    # One piece for each byte of a character.
                    bytes_left = (bytes_left or len(normalized[position].encode())) - 1
                    position += bytes_left == 0
                    last = first + 1
                else:
                    position = last = position + len(piece)
                if i < skipped:
                    continue
                begin = max(places[first] - len(unk), 0)
                # Several characters may come from one; it ends where the next one begins.
                while last < len(normalized) and places[last] == places[last - 1]:
                    last += 1
                end = max(places[last] - len(unk), 0)
                while begin < end and canonical[begin] in (MARK, " "):
                    begin += 1
                first = max(start + origins[begin][0], 0)
                last = start + origins[end - 1][1] if end > begin else first
                index = slow._convert_token_to_id_with_added_voc(piece)
                placed.append(Piece(piece, index, first, last, piece.startswith(MARK) or i == skipped))
        return slow.drop_empty_start(placed)


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
