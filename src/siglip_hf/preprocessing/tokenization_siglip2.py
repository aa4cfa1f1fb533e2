"""SigLIP 2's tokenizer: Gemma's vocabulary on lowercased text, padded to the model's length.

Source: "SigLIP 2", https://arxiv.org/abs/2502.14786, section 2: the multilingual Gemma tokenizer, on lowercased text.
The published `tokenizer.json` files are Gemma's own and leave the case alone, and their `tokenizer_class` names Gemma.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any

from transformers.tokenization_utils_base import AddedToken
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from siglip_hf.preprocessing.identity import code_in_files, read_json, warn_of_own_code
from siglip_hf.preprocessing.text_cleaning import remove_punctuation as without_punctuation
from siglip_hf.preprocessing.tokenization_backend import StatelessTokenization
from siglip_hf.preprocessing.tokenization_base import TEXT_LENGTH, text_length

# Classes that say nothing about the tokenizer but that it is a `tokenizer.json`.
_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizer")


class Siglip2Tokenizer(StatelessTokenization):
    """Texts to `input_ids` as SigLIP 2 was trained on: lowercased, padded and truncated to the model's length.

    Ids are those of the folder's `tokenizer.json` for `text.lower()`, whatever `tokenizer_config.json` says. Text is
    lowercased before special and added tokens are looked up in it, so that `"<TABLE>"` is Gemma's `"<table>"`; an added
    token that has capitals itself is found as it is written.

    `from_pretrained` takes the length from the model's `config.json`, if one is beside the tokenizer, and else from
    `model_max_length`, which published files leave at an absurd value; 64 then. Calls pad and truncate to it by default
    (`padding="max_length", truncation=True`); `padding=False` is obeyed. `return_attention_mask=True` adds the mask.

    Args:
        tokenizer_file: Path of a `tokenizer.json`.
        remove_punctuation: Remove ASCII punctuation. Off by default, as in training.
        model_max_length: Length L of the texts in tokens.
        **kwargs: As of every tokenizer of transformers, e.g. `tokenizer_object`, a `tokenizers.Tokenizer`.

    Examples:
        >>> from siglip_hf import Siglip2Tokenizer, naflex_checkpoint
        >>> tokenizer = Siglip2Tokenizer.from_pretrained(naflex_checkpoint())
        >>> tokenizer(["A Cat", "Ein Hund"], return_tensors="pt").input_ids.shape
        torch.Size([2, 64])
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}  # noqa: RUF012

    def __init__(
        self,
        tokenizer_file: str | None = None,
        *,
        remove_punctuation: bool = False,
        model_max_length: int | None = None,
        unk_token: str = "<unk>",
        bos_token: str = "<bos>",
        eos_token: str = "<eos>",
        pad_token: str = "<pad>",
        mask_token: str = "<mask>",
        **kwargs: Any,
    ):
        # SigLIP 2 was trained without an attention mask, so it is not among the model's inputs.
        kwargs["model_input_names"] = list(type(self).model_input_names)
        super().__init__(
            tokenizer_file=tokenizer_file,
            remove_punctuation=remove_punctuation,
            model_max_length=text_length(model_max_length),
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            mask_token=mask_token,
            **kwargs,
        )
        self.remove_punctuation = remove_punctuation

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Siglip2Tokenizer:
        """Loads a folder or a repository; see the class for the length. Arguments as of every tokenizer.

        Raises:
            OSError: If there is no `tokenizer.json`.
        """
        _warn_of_own_tokenizer(pretrained_model_name_or_path, cls, kwargs)
        if kwargs.get("model_max_length") is None:
            length = _text_length(pretrained_model_name_or_path, kwargs)
            if length is not None:
                kwargs["model_max_length"] = length
        return super().from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leaves the file to `__init__`: a backend rebuilt from its vocabulary would lose the file's own pipeline."""
        return kwargs

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        self.__dict__.pop("_with_capitals", None)
        return super()._add_tokens(new_tokens, special_tokens)

    @functools.cached_property
    def _with_capitals(self) -> tuple[re.Pattern[str] | None, list[str]]:
        """Finds the added tokens that lowercasing would lose: a normalized one in any case, others as they are."""
        tokens = [token for token in self.added_tokens_decoder.values() if token.content != token.content.lower()]
        tokens.sort(key=lambda token: -len(token.content))
        kinds = [f"((?i:{re.escape(t.content)}))" if t.normalized else f"({re.escape(t.content)})" for t in tokens]
        return (re.compile("|".join(kinds)) if kinds else None), [token.content for token in tokens]

    def _parts(self, text: str) -> Iterator[tuple[int, str, str | None]]:
        """Yields the start of each part of `text`, the part, and the added token with capitals that it is."""
        pattern, contents = self._with_capitals
        end = 0
        for found in pattern.finditer(text) if pattern else ():
            yield end, text[end : found.start()], None
            yield found.start(), found.group(), contents[(found.lastindex or 1) - 1]
            end = found.end()
        yield end, text[end:], None

    def _clean(self, text: str) -> str:
        """Returns the text as the vocabulary knows it."""
        remove = without_punctuation if self.remove_punctuation else str
        return "".join(remove(part.lower()) if token is None else token for _, part, token in self._parts(text))

    def _origins(self, text: str) -> list[tuple[int, int]] | None:
        # One character alone grows when it is lowercased: "İ" becomes two.
        if "İ" not in text and not self.remove_punctuation:
            return None
        removed = string.punctuation if self.remove_punctuation else ""
        places = []
        for start, part, token in self._parts(text):
            if token is not None:
                places += [start + min(i, len(part) - 1) for i in range(len(token))]
            else:
                places += [start + i for i, char in enumerate(part) for low in char.lower() if low not in removed]
        return [(place, place + 1) for place in places]


class SiglipTokenizerOfFolder:
    """What `AutoTokenizer` asks for a folder of `model_type` "siglip": SigLIP's SentencePiece and SigLIP 2's Gemma
    vocabulary share that type, and only the folder's `tokenizer_config.json` tells them apart.
    """

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Loads the folder's tokenizer with the class that suits it."""
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        config = read_json(pretrained_model_name_or_path, "tokenizer_config.json", kwargs)
        name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
        tokenizer_class: Any
        if name in ("GemmaTokenizer", "Siglip2Tokenizer") or (name in _GENERIC_CLASSES and _is_gemma(config)):
            tokenizer_class = Siglip2Tokenizer
        elif name in ("", "SiglipTokenizer"):
            from siglip_hf.preprocessing.tokenization_siglip_fast import SiglipTokenizerFast

            tokenizer_class = SiglipTokenizerFast
        else:
            tokenizer_class = tokenizer_class_from_name(name) or TokenizersBackend
        _warn_of_own_tokenizer(pretrained_model_name_or_path, tokenizer_class, kwargs)
        return tokenizer_class.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)


def _warn_of_own_tokenizer(name: Any, tokenizer_class: type, kwargs: dict[str, Any]) -> None:
    # With a model's config.json beside it AutoTokenizer lets the repository's code win, if it is trusted.
    if not kwargs.get("_from_auto") or read_json(name, "config.json", kwargs):
        return
    if reference := code_in_files(name, "AutoTokenizer", ("tokenizer_config.json",), kwargs):
        warn_of_own_code(reference, name, "AutoTokenizer", tokenizer_class)


def _is_gemma(tokenizer_config: dict[str, Any]) -> bool:
    tokens = (tokenizer_config.get(f"{name}_token") for name in ("bos", "eos", "pad"))
    contents = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return contents == ["<bos>", "<eos>", "<pad>"]


def _text_length(pretrained_model_name_or_path: Any, kwargs: dict[str, Any]) -> int | None:
    """The length of a SigLIP model's texts by its configuration, or None if there is no such configuration."""
    config = read_json(pretrained_model_name_or_path, "config.json", kwargs)
    if not str(config.get("model_type", "")).startswith("siglip"):
        return None
    return config.get("text_config", config).get("max_position_embeddings", TEXT_LENGTH)


__all__ = ["Siglip2Tokenizer"]
