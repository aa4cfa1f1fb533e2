"""SigLIP's tokenizer on SentencePiece: cleaned text, one end-of-text token, padded to the model's length.

Source: "Sigmoid Loss for Language Image Pre-Training", https://arxiv.org/abs/2303.15343, and the `c4_en` and `mc4`
tokenizers of big_vision. Ids are those of transformers' own `SiglipTokenizer`, text by text; a batch is one call of
SentencePiece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from transformers.tokenization_utils_base import AddedToken, BatchEncoding, TruncationStrategy
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils import PaddingStrategy, TensorType, logging

from siglip_hf.preprocessing.text_cleaning import canonicalize_text, canonicalize_texts, remove_punctuation

logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "spiece.model"}
#: Length of the texts of most published models. so400m-patch14-224 has 16, and its checkpoint says so.
TEXT_LENGTH = 64
#: What a piece begins with that begins a word.
MARK = "▁"

# Above this a `model_max_length` states that nobody has set one.
_NO_LENGTH = 10**6

# What needs the sequences one by one; everything else is done on the whole batch at once.
_SINGLY = ("is_split_into_words", "return_overflowing_tokens", "return_length", "sanitize_control_tokens")


def special_token(token: str | AddedToken) -> AddedToken:
    """Returns `token` as one that takes the white space around it along, as in the published checkpoints."""
    if isinstance(token, AddedToken):
        return token
    return AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True)


def text_length(model_max_length: int | None) -> int:
    """Returns the length of a checkpoint's texts in tokens: what it says, or 64 where it does not say."""
    if model_max_length is None or model_max_length > _NO_LENGTH:
        return TEXT_LENGTH
    if model_max_length < 1:
        raise ValueError(f"model_max_length is {model_max_length}; a text has at least 1 token, the end of the text.")
    return model_max_length


class SiglipTokenization:
    """What SigLIP's two tokenizers share: the defaults of a call, the special tokens, and how a batch is laid out."""

    model_input_names = ["input_ids"]  # noqa: RUF012
    padding_side = "right"

    # Of transformers' tokenizers.
    eos_token_id: int
    pad_token_id: int
    model_max_length: int
    truncation_side: str

    def __call__(self, text: Any = None, text_pair: Any = None, *targets: Any, **options: Any) -> BatchEncoding:
        """Encodes one text or a batch, by default padded and truncated to the model's length L.

        The text towers were trained on texts of exactly that length, without an attention mask. So neither shorter
        texts nor a mask come out unless asked for.

        Args:
            text: A string, a list of B strings, or with `is_split_into_words` a list (of lists) of words.
            text_pair: Second texts, as many.
            *targets: `text_target` and `text_pair_target` of transformers.
            **options: As of every tokenizer of transformers. Defaults that differ: `padding="max_length"` and
                `truncation=True`; `False` turns either off. `return_attention_mask=True` adds the mask,
                `split_special_tokens=True` reads special tokens within a text as plain text.

        Returns:
            `input_ids` of L ids, or (B, L) for a batch or with `return_tensors`; int64 in arrays and tensors.
        """
        return super().__call__(text, text_pair, *targets, **self._with_defaults(options))  # type: ignore[misc]

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> list[int]:
        """Returns the `input_ids` of a call, which see for the defaults."""
        return super().encode(text, text_pair, **self._with_defaults(options))  # type: ignore[misc]

    def _with_defaults(self, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("padding") is None:
            options["padding"] = "max_length"
        elif options["padding"] in (True, PaddingStrategy.LONGEST) and options.get("verbose", True):
            logger.warning_once(
                "SigLIP was trained on texts padded to the model's length; texts padded to the longest of a batch get "
                'other, worse embeddings. Leave `padding` out, or pass padding="max_length".'
            )
        if options.get("truncation") is None:
            options["truncation"] = True
        return options

    def _warn_about_truncation(self) -> None:
        logger.warning_once(
            f"A text is longer than this model's {self.model_max_length} tokens, and its end is cut off. This is said "
            "once. `truncation=False` returns all tokens."
        )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Returns `A </s>` or `A </s> B </s>`. A text that ends in `</s>` already gets no second one."""
        sequences = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return list(chain.from_iterable([*ids, *self._missing_eos(ids)] for ids in sequences))

    def _missing_eos(self, ids: Sequence[int]) -> list[int]:
        return [] if len(ids) and ids[-1] == self.eos_token_id else [self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Returns 1 for each special token that `build_inputs_with_special_tokens` adds, 0 for the text's tokens.

        With `already_has_special_tokens`, `token_ids_0` is a finished input: 1 for each id of a special token in it.
        """
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)  # type: ignore[misc]
        sequences = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return list(chain.from_iterable([0] * len(ids) + [1] * len(self._missing_eos(ids)) for ids in sequences))

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Returns a zero for each token: SigLIP has no token types."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def _is_plain(self, text: Any, text_pair: Any, options: dict[str, Any]) -> bool:
        """Whether this is a text or a batch of texts, without anything that needs them one by one."""
        return (
            text_pair is None
            and (isinstance(text, str) or (isinstance(text, (list, tuple)) and all(isinstance(t, str) for t in text)))
            and options.get("truncation_strategy") != TruncationStrategy.ONLY_SECOND
            and not any(options.get(name) for name in _SINGLY)
        )

    def _lay_out(
        self,
        ids: Sequence[Sequence[int]],
        *,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | TensorType | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        verbose: bool = True,
        **_: Any,
    ) -> dict[str, Any]:
        """Truncates, ends and pads B texts at once; the options are those of transformers' `_encode_plus`.

        Returns:
            (B, L) int64 arrays or tensors by `return_tensors`, or lists of B lists where that is None or another
            framework, or where the texts keep different lengths.
        """
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))  # (B,)
        tokens = np.fromiter(chain.from_iterable(ids), np.int64, lengths.sum())  # all texts, end to end

        kept = lengths
        if truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE and max_length:
            kept = np.minimum(lengths, max(max_length - int(add_special_tokens), 0))
            if verbose and (kept < lengths).any():
                self._warn_about_truncation()
        # First token of each text that is kept, as an index into `tokens`.
        first = np.cumsum(lengths) - lengths + (lengths - kept if self.truncation_side == "left" else 0)
        ended = np.zeros(len(ids), np.int64)  # whether </s> is added, (B,)
        if add_special_tokens:
            ended[:] = 1
            some = kept > 0
            ended[some] = tokens[(first + kept - 1)[some]] != self.eos_token_id
        widths = kept + ended
        longest = int(widths.max(initial=0))
        self._eventual_warn_about_too_long_sequence(range(longest), max_length, verbose)  # type: ignore[attr-defined]

        if padding_strategy == PaddingStrategy.DO_NOT_PAD:
            padded = widths
        else:
            target = longest if padding_strategy == PaddingStrategy.LONGEST else int(max_length or 0)
            if pad_to_multiple_of:
                target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
            padded = np.maximum(widths, target)

        wanted = {
            "token_type_ids": return_token_type_ids,
            "attention_mask": return_attention_mask,
            "special_tokens_mask": return_special_tokens_mask,
        }
        names = [name for name, want in wanted.items() if (name in self.model_input_names if want is None else want)]
        left = (padding_side or self.padding_side) == "left"

        def grids(rows: np.ndarray, width: int) -> dict[str, np.ndarray]:
            """Lays out the texts `rows`, all of `width` tokens, as the rows of (len(rows), width) arrays."""
            start = (width - widths[rows] if left else np.zeros_like(rows))[:, None]
            column = np.arange(width) - start  # index into the row's text
            stop = kept[rows, None]
            is_text = (column >= 0) & (column < stop)
            input_ids = np.full((len(rows), width), self.pad_token_id, np.int64)
            input_ids[is_text] = tokens[(column + first[rows, None])[is_text]]
            input_ids[(column == stop) & (ended[rows, None] == 1)] = self.eos_token_id
            others = {
                "token_type_ids": lambda: np.zeros_like(input_ids),
                "attention_mask": lambda: ((column >= 0) & (column < widths[rows, None])).astype(np.int64),
                "special_tokens_mask": lambda: (~is_text).astype(np.int64),
            }
            return {"input_ids": input_ids, **{name: others[name]() for name in names}}

        # Texts of one width are laid out together: one long text among many must not widen the arrays of all.
        all_widths = np.unique(padded)
        if len(all_widths) <= 1 and return_tensors in ("pt", "np"):
            arrays = grids(np.arange(len(ids)), int(all_widths[0]) if len(ids) else int(max_length or 0))
            if return_tensors == "np":
                return dict(arrays)
            import torch

            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        lists: dict[str, list[list[int]]] = {name: [[]] * len(ids) for name in ("input_ids", *names)}
        for width in all_widths:
            rows = np.flatnonzero(padded == width)
            for name, array in grids(rows, int(width)).items():
                for row, values in zip(rows, array.tolist(), strict=True):
                    lists[name][row] = values
        return lists


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
        >>> tokenizer = SiglipTokenizer.from_pretrained("google/siglip-base-patch16-224")
        >>> tokenizer(["a cat", "two dogs"], return_tensors="pt").input_ids.shape
        torch.Size([2, 64])
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
