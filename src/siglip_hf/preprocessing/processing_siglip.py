"""Pictures and texts to the inputs of a SigLIP model, in one call.

SigLIP's text tower was trained on texts padded to its full length, without a mask (big_vision, configs/proj/image_text;
huggingface/transformers#28569 shows what happens otherwise), so that is what comes out here unless asked otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import AudioKwargs, ProcessorMixin, TextKwargs, VideosKwargs

from siglip_hf.preprocessing.identity import (
    KnownAsStock,
    code_in_files,
    is_ours,
    repository_class,
    warn_of_own_code,
)
from siglip_hf.preprocessing.image_intake import Picture, looks_like_picture_source
from siglip_hf.preprocessing.options import check_unknown
from siglip_hf.preprocessing.sentence_transformers_files import write_sentence_transformers_files
from siglip_hf.preprocessing.sequences import as_list, as_texts
from siglip_hf.preprocessing.tokenization_base import trained_padding

# In TextKwargs, for models whose texts contain placeholders for pictures.
_NO_TEXT_OPTIONS = {"return_mm_token_type_ids", "return_text_replacement_offsets"}
# "split_special_tokens" is missing from TextKwargs.
_TEXT_OPTIONS = {"split_special_tokens", *TextKwargs.__annotations__} - _NO_TEXT_OPTIONS
# Generic code sends these to every processor; they are no misspellings.
_OTHER_OPTIONS = {*_NO_TEXT_OPTIONS, *VideosKwargs.__annotations__, *AudioKwargs.__annotations__}

# A model's vocabulary may be rounded up to a multiple of this for speed, and a tokenizer may hold reserved tokens that
# no text contains (mC4's holds 100); a larger difference means another tokenizer.
_VOCABULARY_ROUNDING = 128


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Makes sure that a tokenizer is that of a model: another one's ids mean other words, without any error.

    Raises:
        ValueError: naming both sizes, if they are too far apart, or a token of every text that the model does not have.
    """
    tokens = len(tokenizer)
    if abs(vocab_size - tokens) >= _VOCABULARY_ROUNDING:
        raise ValueError(
            f"The tokenizer has {tokens} tokens, but the model's vocab_size is {vocab_size}. "
            "Load the tokenizer from the model's own checkpoint."
        )
    for name in ("pad_token", "eos_token"):  # every text has them
        number = getattr(tokenizer, f"{name}_id", None)
        if number is not None and number >= vocab_size:
            raise ValueError(
                f"The tokenizer's {name} {getattr(tokenizer, name)!r} is number {number}, but the model's vocab_size "
                f"is {vocab_size}: it is not in the vocabulary that the model was trained with."
            )


class SiglipProcessor(KnownAsStock, ProcessorMixin):
    """An image processor and a tokenizer of SigLIP behind one call.

    Args:
        image_processor: a `SiglipImageProcessor` or `SiglipImageProcessorFast`.
        tokenizer: a `SiglipTokenizer` or `SiglipTokenizerFast`.

    Examples:
        >>> from siglip_hf import SiglipProcessor, default_checkpoint
        >>> processor = SiglipProcessor.from_pretrained(default_checkpoint())
        >>> inputs = processor(images="drawings/cat.png", text=["a cat", "a dog"], return_tensors="pt")
        >>> inputs["pixel_values"].shape, inputs["input_ids"].shape
        (torch.Size([1, 3, 64, 64]), torch.Size([2, 16]))
    """

    # The lowest-ranking options of the tokenizer; transformers looks for them under this name.
    text_kwargs = {"padding": "max_length", "truncation": True, "return_attention_mask": False}  # type: ignore[typeddict-item]  # noqa: RUF012

    def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Loads the parts from a folder or repository; arguments and errors as of every processor.

        Called by `AutoProcessor` with `trust_remote_code=True`, it gives the processor that the repository brings.
        """
        name = pretrained_model_name_or_path
        if kwargs.get("_from_auto") and is_ours(cls):
            files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json")
            if reference := code_in_files(name, "AutoProcessor", files, kwargs):
                if kwargs.get("trust_remote_code"):
                    own = repository_class(reference, name, "AutoProcessor", kwargs)
                    return own.from_pretrained(name, **kwargs)
                if "trust_remote_code" not in kwargs:
                    warn_of_own_code(reference, name, "AutoProcessor", cls)
        return super().from_pretrained(name, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Model inputs for pictures, texts, or both.

        The order of transformers 4, `processor(text, images)`, works as well where the types tell which is which.

        Args:
            images: one picture or a batch: paths, URLs, bytes, files, PIL images, arrays or tensors; see
                `siglip_hf.preprocessing.image_intake.load_picture`.
            text: one text or a list of texts.
            return_tensors: "pt" or "np", for both parts; None for lists.
            padding: `True` and "max_length", the default, pad to `tokenizer.model_max_length`, which the checkpoint
                sets. "longest" and `False` are obeyed, though the model was not trained on such texts.
            truncation: True by default, to the same length.
            max_length: another length than the checkpoint's.
            return_attention_mask: False by default; SigLIP was trained without one.
            text_kwargs: a dict of options for the tokenizer alone.
            images_kwargs: a dict of options for the image processor alone, those of its `preprocess`.
            **kwargs: any option of the tokenizer or of the image processor; `return_tensors` goes to both. What generic
                code passes besides, `videos=None` or `audio_kwargs={}`, is accepted, and what no part knows ignored
                with a warning.

        Returns:
            A `BatchFeature` with `input_ids` (B, L) int64 if there are texts, and `pixel_values` (B, 3, height, width)
            float32 if there are pictures.

        Raises:
            PictureError: (a `ValueError` and an `OSError`) naming a picture that cannot be used.
            ValueError: if there is nothing to process, if an option is misspelled, if there are videos or sounds, or
                if pictures and texts cannot be told apart. It names the place and the type of what is not a text.
        """
        text_options, image_options = self._sort_options(kwargs)
        images, text = _in_order(images, text)
        inputs: dict[str, Any] = {}
        if text is not None:
            text = as_texts(text, words=bool(text_options.get("is_split_into_words")), nested=False)
            if not text and not isinstance(text, str):
                raise ValueError("text is an empty list. Leave it out, or pass at least one text.")
            inputs.update(self.tokenizer(text, **text_options))
        if images is not None:
            inputs.update(self.image_processor(images, **image_options))
        return BatchFeature(inputs)

    def _sort_options(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of a call as (those of the tokenizer, those of the image processor)."""
        known = {
            "text_kwargs": _TEXT_OPTIONS,
            "images_kwargs": set(self.image_processor.valid_kwargs.__annotations__),
        }
        for part in ("videos", "audio"):
            if given.pop(part, None) is not None:
                raise ValueError(f"{part} was given, but SigLIP takes pictures and texts only.")
            for_part = given.pop(f"{part}_kwargs", None)
            check_unknown(for_part or (), (), type(self).__name__)
        for_both = {**given, **(given.get("common_kwargs") or {})}
        options = {part: dict(given.get(part) or {}) for part in known}
        unknown = {name for part, names in known.items() for name in options[part] if name not in names}
        for name, value in for_both.items():
            if name in ("common_kwargs", *known):
                continue
            parts = [part for part, names in known.items() if name in names]
            if not parts and (value or name not in _NO_TEXT_OPTIONS):
                unknown.add(name)
            for part in parts:
                if name in options[part]:
                    raise ValueError(f"{name} is given twice: by itself and in {part}. Leave one out.")
                options[part][name] = value
        anywhere = set.union(*known.values())
        check_unknown(unknown - _OTHER_OPTIONS - anywhere, anywhere, type(self).__name__)
        check_unknown(unknown & (_OTHER_OPTIONS | anywhere), (), type(self).__name__)
        text, images = (
            {name: value for name, value in options[part].items() if name in names} for part, names in known.items()
        )
        text = {**self._text_defaults(text), **{name: value for name, value in text.items() if value is not None}}
        return {**text, "padding": trained_padding(text["padding"])}, images

    def _text_defaults(self, given: dict[str, Any]) -> dict[str, Any]:
        """The options of the tokenizer that a call leaves open."""
        if given.get("add_special_tokens") is False:  # tokens are counted or compared
            return {"padding": False, "truncation": False, "return_attention_mask": False}
        built_with = getattr(self.tokenizer, "init_kwargs", {})
        kept = {name: getattr(self.tokenizer, name, built_with[name]) for name in _TEXT_OPTIONS & set(built_with)}
        return {**self.text_kwargs, **{name: value for name, value in kept.items() if value is not None}}

    def check_fits(self, model_or_config: Any, *, interpolate_pos_encoding: bool = False) -> None:
        """Makes sure that this processor and a model belong together; a mismatch gives wrong scores, not an error.

        Args:
            model_or_config: a SigLIP model or its configuration: joint, text only or vision only.
            interpolate_pos_encoding: the model will be told to adapt to other picture sizes than its own.

        Raises:
            ValueError: naming the two values, if the tokenizer's vocabulary or length, or the picture size, is not the
                model's.
        """
        config = getattr(model_or_config, "config", model_or_config)
        text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", config)
        if (vocab_size := getattr(text, "vocab_size", None)) is not None:
            check_vocabulary(self.tokenizer, vocab_size)
        if (positions := getattr(text, "max_position_embeddings", None)) is not None:
            length = self.tokenizer.model_max_length
            if length != positions:
                raise ValueError(
                    f"The tokenizer's model_max_length is {length}, but the model was trained on texts of {positions} "
                    f"tokens. Set processor.tokenizer.model_max_length = {positions}."
                )
        if (image_size := getattr(vision, "image_size", None)) is not None and not interpolate_pos_encoding:
            expected = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
            size = dict(self.image_processor.size)
            if (size.get("height"), size.get("width")) != expected:
                raise ValueError(
                    f"The image processor's size is {size}, but the model's image_size is {image_size}. Set "
                    f"processor.image_processor.size = {{'height': {expected[0]}, 'width': {expected[1]}}}, or pass "
                    "interpolate_pos_encoding=True to the model."
                )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Saves the processor for `from_pretrained`, here and in stock transformers.

        The image processor is also written to a `preprocessor_config.json` of its own, where transformers 4 and other
        programs look for it, and what `SentenceTransformer(folder)` needs beside model and processor.

        Args:
            save_directory: a folder; made if it does not exist.
            push_to_hub: also upload it.
            kwargs: for `push_to_hub`.

        Returns:
            The names of the configuration files.
        """
        written = self.image_processor.save_pretrained(save_directory)
        write_sentence_transformers_files(save_directory)
        return [*super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs), *written]


def _in_order(images: Any, text: Any) -> tuple[Any, Any]:
    """(pictures, texts), swapped if they were given the other way round."""
    if images is None and text is None:
        raise ValueError("Nothing to process: pass images, text, or both.")
    # Once, because a generator can be read once.
    images, text = (value if (items := as_list(value)) is None else items for value in (images, text))
    if text is not None and _says_pictures(text):
        if images is not None and not _says_words(images):
            raise ValueError("Both arguments are pictures. Pass texts, strings or a list of strings, as text=.")
        return text, images
    if images is None or not _says_words(images):
        return images, text
    # Only strings: are they sources of pictures?
    if any(looks_like_picture_source(leaf) for leaf in _leaves(images)) or not any(True for _ in _leaves(images)):
        return images, text
    if text is not None and _says_words(text) and all(looks_like_picture_source(leaf) for leaf in _leaves(text)):
        return text, images
    raise ValueError(
        f"images={next(_leaves(images))!r} is neither a file nor a URL, nor any other picture. If it is a text, pass "
        "it as text=..."
    )


def _says_words(value: Any) -> bool:
    return all(isinstance(leaf, str) for leaf in _leaves(value))


def _says_pictures(value: Any) -> bool:
    """Whether pictures are in it, and no words: one picture among texts is a wrong text."""
    leaves = list(_leaves(value))
    words = any(isinstance(leaf, str) and not looks_like_picture_source(leaf) for leaf in leaves)
    return not words and any(_is_picture(leaf) for leaf in leaves)


def _is_picture(leaf: Any) -> bool:
    """Whether this is a picture rather than a text or something wrong in place of one, such as NaN."""
    if isinstance(leaf, bytes | bytearray | memoryview | os.PathLike | dict | Image.Image | Picture):
        return True
    return hasattr(leaf, "read") or getattr(leaf, "ndim", 0) > 1


def _leaves(value: Any) -> Iterator[Any]:
    items = as_list(value)
    if items is None:
        yield value
    else:
        for item in items:
            yield from _leaves(item)
