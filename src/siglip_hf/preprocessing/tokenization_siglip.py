"""SigLIP's tokenizer on SentencePiece: cleaned text, one end-of-text token, padded to the model's length.

Source: "Sigmoid Loss for Language Image Pre-Training", https://arxiv.org/abs/2303.15343, and the `c4_en` and `mc4`
tokenizers of big_vision. Ids are those of transformers' own `SiglipTokenizer`, text by text; a batch is one call of
SentencePiece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from transformers.tokenization_utils_base import AddedToken, BatchEncoding, TruncationStrategy
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from siglip_hf.preprocessing.text_cleaning import canonicalize_text, canonicalize_texts, remove_punctuation
from siglip_hf.preprocessing.tokenization_base import TEXT_LENGTH, SiglipTokenization, special_token, text_length

VOCAB_FILES_NAMES = {"vocab_file": "spiece.model"}
#: What a piece begins with that begins a word.
MARK = "▁"


class SiglipTokenizer(SiglipTokenization, SentencePieceBackend):
    """Texts to `input_ids` by SentencePiece.

    Text is canonicalized (see `text_cleaning`), cut into pieces, ended with `</s>` and padded with `</s>` to the
    model's length. As in transformers, special tokens are looked up before cleaning: a literal `</s>` within a text
    becomes the end-of-text token, and text after it starts without a space mark. `split_special_tokens=True`, here or
    in a call, reads it as the letter s between punctuation instead; use it for text that others wrote.

    Args:
        vocab_file: Path of the SentencePiece model, `spiece.model`.
        eos_token: Token that ends every text.
        unk_token: Token of unknown characters.
        pad_token: Token of padding; SigLIP pads with the end-of-text token.
        additional_special_tokens: More special tokens.
        sp_model_kwargs: Arguments of `sentencepiece.SentencePieceProcessor`.
        model_max_length: Length L of the texts in tokens. A checkpoint states it in `tokenizer_config.json`; 64 if not.
        do_lower_case: Lowercase the text, as in training.
        **kwargs: As of every tokenizer of transformers.

    Examples:
        >>> from siglip_hf import SiglipTokenizer, default_checkpoint
        >>> tokenizer = SiglipTokenizer.from_pretrained(default_checkpoint())
        >>> tokenizer(["A cat.", "two dogs"], return_tensors="pt").input_ids.shape  # padded to the checkpoint's length
        torch.Size([2, 16])
        >>> tokenizer.decode(tokenizer("A cat.").input_ids, skip_special_tokens=True)
        'a cat'
    """

    vocab_files_names = VOCAB_FILES_NAMES

    def __init__(
        self,
        vocab_file: str,
        eos_token: str | AddedToken = "</s>",
        unk_token: str | AddedToken = "<unk>",
        pad_token: str | AddedToken = "</s>",
        additional_special_tokens: list[str | AddedToken] | None = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        model_max_length: int | None = TEXT_LENGTH,
        do_lower_case: bool = True,
        **kwargs: Any,
    ) -> None:
        self.do_lower_case = do_lower_case
        if additional_special_tokens is not None:
            kwargs["additional_special_tokens"] = additional_special_tokens
        super().__init__(
            vocab_file=vocab_file,
            eos_token=special_token(eos_token),
            unk_token=special_token(unk_token),
            pad_token=special_token(pad_token),
            sp_model_kwargs=sp_model_kwargs or {},
            model_max_length=text_length(model_max_length),
            do_lower_case=do_lower_case,
            **kwargs,
        )

    @property
    def unk_token_length(self) -> int:
        """Number of pieces that the unknown token is cut into when it stands in plain text."""
        return len(self.sp_model.encode(str(self.unk_token)))

    def remove_punctuation(self, text: str) -> str:
        """Returns `text` without ASCII punctuation, otherwise as it is."""
        return remove_punctuation(text)

    def canonicalize_text(self, text: str, *, keep_punctuation_exact_string: str | None = None) -> str:
        """Cleans a text as the training data was cleaned; see `siglip_hf.canonicalize_text`.

        Args:
            text: any text.
            keep_punctuation_exact_string: this string stays as it is, such as the `{}` of a template.

        Returns:
            The text that pieces are cut from.
        """
        return canonicalize_text(
            text, lowercase=self.do_lower_case, keep_punctuation_exact_string=keep_punctuation_exact_string
        )

    def split_added_tokens(self, text: str, *, split_special_tokens: bool = False) -> Iterator[tuple[str, int, bool]]:
        """Cuts `text` at the special and added tokens within it.

        Args:
            text: any text.
            split_special_tokens: leave the text whole, so that a token spelled out in it is text like any other.

        Yields:
            Each part, its start in `text`, and whether it is such a token.
        """
        # Only the first part gets the space mark that a word starts with; the mark itself counts as a space.
        marked = MARK + text.replace(MARK, " ")
        if split_special_tokens:
            yield marked, -1, False
            return
        tokens = {*self._added_tokens_encoder, *self.all_special_tokens}
        parts = self.tokens_trie.split(marked)
        starts = [0, *np.cumsum([len(part) for part in parts])]
        for i, part in enumerate(parts):
            added = self._added_tokens_decoder.get(self._added_tokens_encoder.get(part, -1))
            if added is None:
                continue
            before, after = parts[i - 1] if i else "", parts[i + 1] if i + 1 < len(parts) else ""
            if added.rstrip and after:
                parts[i + 1] = after.lstrip()
                starts[i + 1] += len(after) - len(parts[i + 1])
            if added.lstrip and before:
                parts[i - 1] = before.rstrip()
            # A token that is to stand alone, but does not, is text: that of its neighbour.
            if added.single_word and before and before[-1] != " ":
                parts[i - 1] += part
                parts[i] = ""
            elif added.single_word and after and after[0] != " ":
                parts[i + 1] = part + parts[i + 1]
                starts[i + 1] = starts[i]
                parts[i] = ""
        for part, start in zip(parts, starts, strict=False):
            if part:
                yield part, int(start) - 1, part in tokens

    def tokenize(  # type: ignore[override]
        self, text: str, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Returns the pieces of `text`, special and added tokens within it as they are."""
        split = kwargs.get("split_special_tokens")
        split = self.split_special_tokens if split is None else split
        pieces: list[str] = []
        for part, _, is_token in self.split_added_tokens(text, split_special_tokens=split):
            pieces.extend([part] if is_token else self._tokenize(part))
        return self.drop_empty_start(pieces)

    def drop_empty_start(self, pieces: list[Any]) -> list[Any]:
        """Removes the space mark of a text that begins with a special token; `pieces` are strings or begin with one."""
        texts = [piece if isinstance(piece, str) else piece[0] for piece in pieces[:2]]
        if len(texts) == 2 and texts[0] == MARK and texts[1] in self.all_special_tokens:
            return pieces[1:]
        return pieces

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        # As stock does: SentencePiece adds or drops a space at the start of its input. After the unknown token, which
        # is cut off again, the text has no start that could be touched.
        pieces = self.sp_model.encode(self.unk_token + self.canonicalize_text(text), out_type=str)
        length = self.unk_token_length
        return pieces[length:] if len(pieces) >= length else pieces

    def encode_texts(self, texts: Sequence[str], *, split_special_tokens: bool | None = None) -> list[list[int]]:
        """Returns the ids of each text, nothing added or cut: `convert_tokens_to_ids(tokenize(text))`, but faster.

        All texts without special or added tokens go through SentencePiece in one call.

        Args:
            texts: any texts.
            split_special_tokens: treat a special token that is spelled out in a text as text; the tokenizer's own
                setting if None.
        """
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        plain: Sequence[int] = range(len(texts))
        if self._has_unknown_tokens:
            plain = []
        elif not split:
            everything = "\n".join(texts)
            inside = [token for token in {*self._added_tokens_encoder, *self.all_special_tokens} if token in everything]
            if inside:
                plain = [i for i in plain if not any(token in texts[i] for token in inside)]

        unk, length = str(self.unk_token), self.unk_token_length
        marked = [MARK + texts[i].replace(MARK, " ") for i in plain]
        cleaned = [unk + text for text in canonicalize_texts(marked, lowercase=self.do_lower_case)]
        ids: list[list[int]] = [[]] * len(texts)
        for i, row in zip(plain, self.sp_model.encode(cleaned, out_type=int), strict=True):
            ids[i] = row[length:] if len(row) >= length else row
        for i in sorted(set(range(len(texts))).difference(plain)):
            pieces = self.tokenize(texts[i], split_special_tokens=split)
            ids[i] = [self._convert_token_to_id_with_added_voc(piece) for piece in pieces]
        return ids

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        super()._update_trie(unique_no_split_tokens)
        # An unknown piece is looked up by its text, and could be a token that the text did not contain before
        # cleaning. Without a token made of unknown characters alone that cannot be.
        model = self.sp_model
        tokens = [
            *self._added_tokens_encoder,
            *(model.id_to_piece(i) for i in (model.pad_id(), model.bos_id()) if i >= 0),
        ]
        start = model.piece_to_id(MARK)
        self._has_unknown_tokens = any(
            model.unk_id() in ids and {model.unk_id(), start}.issuperset(ids)
            for ids in map(model.encode_as_ids, tokens)
        )

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, **options: Any
    ) -> BatchEncoding:
        if not self._is_plain(text, text_pair, options):
            return super()._encode_plus(text, text_pair=text_pair, **options)
        texts = [text] if isinstance(text, str) else text
        ids = self.encode_texts(texts, split_special_tokens=options.get("split_special_tokens"))
        data = self._lay_out(ids, **options)
        tensors = options.get("return_tensors")
        if isinstance(text, str) and tensors is None:
            data = {name: rows[0] for name, rows in data.items()}
        return BatchEncoding(data, tensor_type=tensors)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str | TruncationStrategy = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int], list[int]]:
        """Returns the two sequences without their last (or by `truncation_side` first) tokens, and what was cut."""
        if num_tokens_to_remove > 0:
            self._warn_about_truncation()
        return super().truncate_sequences(ids, pair_ids, num_tokens_to_remove, truncation_strategy, stride)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the text of `tokens`, special ones as they are."""
        special = set(self.all_special_tokens)
        runs = [(is_special, list(run)) for is_special, run in groupby(tokens, key=special.__contains__)]
        text = ""
        for i, (is_special, run) in enumerate(runs):
            if is_special:
                text += "".join(run)
            else:
                text += (" " if i + 1 < len(runs) else "") + self.sp_model.decode(run)
        return text.strip()

    def get_vocab(self) -> dict[str, int]:
        """Returns each piece and added token with its id."""
        pieces = map(self.sp_model.id_to_piece, range(self.vocab_size))
        return {**{piece: i for i, piece in enumerate(pieces)}, **self.added_tokens_encoder}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Writes the SentencePiece model into `save_directory`, also if the file it was read from is gone.

        Raises:
            ValueError: if `save_directory` is not a folder.
        """
        folder = Path(save_directory)
        if not folder.is_dir():
            raise ValueError(f"{save_directory} is not a folder. Create it before saving a vocabulary.")
        path = folder / ((filename_prefix + "-" if filename_prefix else "") + VOCAB_FILES_NAMES["vocab_file"])
        source = Path(str(self.vocab_file))
        # The file rather than the model: with `legacy=False` transformers changes the model it read.
        path.write_bytes(source.read_bytes() if source.is_file() else self.sp_model.serialized_model_proto())
        return (str(path),)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sp_model": self.sp_model.serialized_model_proto()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = sentencepiece.SentencePieceProcessor(**state["sp_model_kwargs"])
        model.LoadFromSerializedProto(state["sp_model"])
        self.__dict__.update(state, sp_model=model)
