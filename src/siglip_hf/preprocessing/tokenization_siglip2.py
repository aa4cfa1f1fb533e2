"""SigLIP 2's tokenizer: Gemma's vocabulary on lowercased text, padded to the model's length.

Source: "SigLIP 2", https://arxiv.org/abs/2502.14786, section 2: the multilingual Gemma tokenizer, on lowercased text.
The published `tokenizer.json` files are Gemma's own and leave the case alone, and their `tokenizer_class` names Gemma.
"""

from __future__ import annotations

import json
from typing import Any

from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import cached_file

from siglip_hf.preprocessing.text_cleaning import remove_punctuation as without_punctuation

#: Length of the texts that every published SigLIP 2 model was trained on.
TEXT_LENGTH = 64

# Above this a `model_max_length` states that nobody has set one.
_NO_LENGTH = 10**6

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Classes that say nothing about the tokenizer but that it is a `tokenizer.json`.
_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizer")


class Siglip2Tokenizer(TokenizersBackend):
    """Texts to `input_ids` as SigLIP 2 was trained on: lowercased, padded and truncated to the model's length.

    Ids are those of the folder's `tokenizer.json` for `text.lower()`, whatever `tokenizer_config.json` says. Text is
    lowercased before special and added tokens are looked up in it, so that `"<TABLE>"` is Gemma's `"<table>"`.

    `from_pretrained` takes the length from the model's `config.json`, if one is beside the tokenizer, and else from
    `model_max_length`, which published files leave at an absurd value; 64 then. Calls pad and truncate to it by default
    (`padding="max_length", truncation=True`); `padding=False` is obeyed.

    Args:
        tokenizer_file: Path of a `tokenizer.json`.
        remove_punctuation: Remove ASCII punctuation. Off by default, as in training.
        model_max_length: Length L of the texts in tokens.
        **kwargs: As of every tokenizer of transformers, e.g. `tokenizer_object`, a `tokenizers.Tokenizer`.

    Examples:
        >>> tokenizer = AutoTokenizer.from_pretrained("google/siglip2-base-patch16-224")
        >>> tokenizer(["A Cat", "Ein Hund"], return_tensors="pt").input_ids.shape
        torch.Size([2, 64])
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    padding_side = "right"
    model_input_names = ["input_ids"]  # noqa: RUF012

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
        if model_max_length is None or model_max_length > _NO_LENGTH:
            model_max_length = TEXT_LENGTH
        # SigLIP 2 was trained without an attention mask, so it is not among the model's inputs.
        kwargs["model_input_names"] = list(type(self).model_input_names)
        super().__init__(
            tokenizer_file=tokenizer_file,
            remove_punctuation=remove_punctuation,
            model_max_length=model_max_length,
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
        if kwargs.get("model_max_length") is None:
            length = _text_length(pretrained_model_name_or_path, kwargs)
            if length is not None:
                kwargs["model_max_length"] = length
        return super().from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leaves the file to `__init__`: a backend rebuilt from its vocabulary would lose the file's own pipeline."""
        return kwargs

    def __call__(  # type: ignore[override]
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: Any = "max_length",
        truncation: Any = True,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Tokenizes a text or a list of texts.

        Args:
            text: A text, or a list of texts.
            text_pair: A second sequence, as of every tokenizer; SigLIP has no use for one.
            text_target: As of every tokenizer.
            text_pair_target: As of every tokenizer.
            add_special_tokens: Append `<eos>`.
            padding: "max_length" pads to `max_length`, as in training; True to the longest text; False not at all.
            truncation: Cut what is longer than `max_length`; `<eos>` is kept.
            max_length: `model_max_length` by default.
            **kwargs: Further arguments as of every tokenizer, e.g. `return_tensors="pt"`.

        Returns:
            A `BatchEncoding` with `input_ids` (B, L) only; `return_attention_mask=True` adds the mask.
        """
        return super().__call__(
            text,
            text_pair,
            text_target,
            text_pair_target,
            add_special_tokens,
            padding,
            truncation,
            max_length,
            **kwargs,
        )

    def encode(  # type: ignore[override]
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: Any = "max_length",
        truncation: Any = True,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the `input_ids` alone; arguments as of a call."""
        return super().encode(text, text_pair, add_special_tokens, padding, truncation, max_length, **kwargs)

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return super()._encode_plus(self._clean(text), self._clean(text_pair), **kwargs)

    def _clean(self, text: Any) -> Any:
        """A text, or texts in any nesting, as the vocabulary knows them."""
        if isinstance(text, str):
            text = text.lower()
            return without_punctuation(text) if self.remove_punctuation else text
        return [self._clean(item) for item in text] if isinstance(text, list | tuple) else text


class SiglipTokenizerOfFolder:
    """What `AutoTokenizer` asks for a folder of `model_type` "siglip": SigLIP's SentencePiece and SigLIP 2's Gemma
    vocabulary share that type, and only the folder's `tokenizer_config.json` tells them apart.
    """

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Loads the folder's tokenizer with the class that suits it."""
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        config = _read_json(pretrained_model_name_or_path, "tokenizer_config.json", kwargs)
        name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
        tokenizer_class: Any
        if name in ("GemmaTokenizer", "Siglip2Tokenizer") or (name in _GENERIC_CLASSES and _is_gemma(config)):
            tokenizer_class = Siglip2Tokenizer
        elif name in ("", "SiglipTokenizer"):
            from siglip_hf.preprocessing.tokenization_siglip_fast import SiglipTokenizerFast

            tokenizer_class = SiglipTokenizerFast
        else:
            tokenizer_class = tokenizer_class_from_name(name) or TokenizersBackend
        return tokenizer_class.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)


def _is_gemma(tokenizer_config: dict[str, Any]) -> bool:
    tokens = (tokenizer_config.get(f"{name}_token") for name in ("bos", "eos", "pad"))
    contents = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return contents == ["<bos>", "<eos>", "<pad>"]


def _text_length(pretrained_model_name_or_path: Any, kwargs: dict[str, Any]) -> int | None:
    """The length of a SigLIP model's texts by its configuration, or None if there is no such configuration."""
    config = _read_json(pretrained_model_name_or_path, "config.json", kwargs)
    if not str(config.get("model_type", "")).startswith("siglip"):
        return None
    return config.get("text_config", config).get("max_position_embeddings", TEXT_LENGTH)


def _read_json(pretrained_model_name_or_path: Any, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A file of a folder or repository; empty if it has none of that name."""
    hub = {argument: kwargs[argument] for argument in _HUB_ARGUMENTS if kwargs.get(argument) is not None}
    path = cached_file(
        pretrained_model_name_or_path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


__all__ = ["Siglip2Tokenizer"]
