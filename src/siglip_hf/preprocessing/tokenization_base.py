"""What SigLIP's and SigLIP 2's tokenizers share: the defaults of a call, and how a batch is laid out.

Source: "Sigmoid Loss for Language Image Pre-Training", https://arxiv.org/abs/2303.15343: the texts of training are
padded to one length, without a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import AddedToken, BatchEncoding, TruncationStrategy
from transformers.utils import PaddingStrategy, TensorType, logging

from siglip_hf.preprocessing.identity import KnownAsStock
from siglip_hf.preprocessing.sequences import as_texts

logger = logging.get_logger(__name__)

#: Length of the texts of most published models. so400m-patch14-224 has 16, and its checkpoint says so.
TEXT_LENGTH = 64

# Above this a `model_max_length` means that none was set.
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


def trained_padding(padding: Any) -> Any:
    """Returns how a text is padded: `True`, which generic code sends, means the length of the model's training."""
    if padding is True:
        return "max_length"
    if padding == PaddingStrategy.LONGEST:
        logger.warning_once(
            "SigLIP was trained on texts padded to the model's length; texts padded to the longest of a batch get "
            'other, worse embeddings. Leave `padding` out, or pass padding="max_length".'
        )
    return padding


class SiglipTokenization(KnownAsStock):
    """What SigLIP's two tokenizers share: the defaults of a call, the special tokens, and how a batch is laid out."""

    model_input_names = ["input_ids"]  # noqa: RUF012
    padding_side = "right"

    # Of transformers' tokenizers.
    eos_token_id: int
    pad_token_id: int
    model_max_length: int
    truncation_side: str

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: Any = None,
        truncation: Any = None,
        max_length: int | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """Encodes one text or a batch, by default padded and truncated to the model's length L.

        The text towers were trained on texts of exactly that length, without an attention mask. So neither shorter
        texts nor a mask come out unless asked for.

        Args:
            text: A string, a sequence of B strings (a list, a column of datasets, a pandas Series, an array of
                strings), or with `is_split_into_words` a sequence of words or of B of these.
            text_pair: Second texts, as many.
            text_target: As of every tokenizer of transformers.
            text_pair_target: As of every tokenizer of transformers.
            add_special_tokens: End each text with the end-of-text token. Without it, tokens are only counted or
                compared, so nothing is padded or truncated by default.
            padding: `True` and "max_length", the default, pad to `max_length`; "longest" to the longest of the batch,
                with a warning; `False` not at all.
            truncation: Whether what is longer than `max_length` is cut; the end-of-text token is kept.
            max_length: `model_max_length` by default.
            **options: As of every tokenizer of transformers. `return_attention_mask=True` adds the mask,
                `split_special_tokens=True` reads special tokens within a text as plain text.

        Returns:
            `input_ids` of L ids, or (B, L) for a batch or with `return_tensors`; int64 in arrays and tensors.

        Raises:
            ValueError: Naming the place and the type of what is not a text.
        """
        words = bool(options.get("is_split_into_words"))
        given = {"text": text, "text_pair": text_pair, "text_target": text_target, "text_pair_target": text_pair_target}
        texts = {name: value if value is None else as_texts(value, name, words=words) for name, value in given.items()}
        padding, truncation = self._with_defaults(padding, truncation, add_special_tokens)
        return super().__call__(  # type: ignore[misc]
            **texts,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            **options,
        )

    def encode(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: Any = None,
        truncation: Any = None,
        max_length: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Returns the `input_ids` of a call; see `__call__` for the arguments and defaults."""
        words = bool(options.get("is_split_into_words"))
        text = as_texts(text, words=words)
        text_pair = None if text_pair is None else as_texts(text_pair, "text_pair", words=words)
        padding, truncation = self._with_defaults(padding, truncation, add_special_tokens)
        return super().encode(text, text_pair, add_special_tokens, padding, truncation, max_length, **options)  # type: ignore[misc]

    def pad(self, encoded_inputs: Any, padding: Any = True, *arguments: Any, **options: Any) -> BatchEncoding:
        """Pads encoded texts as a call does: by default, to the model's length."""
        return super().pad(encoded_inputs, trained_padding(padding), *arguments, **options)  # type: ignore[misc]

    def _with_defaults(self, padding: Any, truncation: Any, add_special_tokens: bool) -> tuple[Any, Any]:
        padding = add_special_tokens if padding is None else padding
        return trained_padding(padding), add_special_tokens if truncation is None else truncation

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
            and (isinstance(text, str) or all(isinstance(item, str) for item in text))
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
