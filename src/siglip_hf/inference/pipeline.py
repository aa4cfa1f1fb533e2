"""`pipeline("zero-shot-image-classification")` for SigLIP: labels are encoded once, and scores say what they are.

The contract is that of `ZeroShotImageClassificationPipeline` in transformers, which serves every other model as before.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.image_processing_utils import BatchFeature
from transformers.pipelines.base import Pipeline
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline

from siglip_hf.inference.label_bank import LabelBank, parse_labels, parse_templates
from siglip_hf.inference.label_store import LabelStore
from siglip_hf.inference.optimize import optimization
from siglip_hf.parallel import PIXELS
from siglip_hf.preprocessing.image_intake import DEFAULT_TIMEOUT, load_picture, load_pictures
from siglip_hf.preprocessing.processing_siglip import check_vocabulary

DEFAULT_TEMPLATE = "This is a photo of {}."

#: Every score by its name; each maps cosines (C,) and logits (C,) to scores (C,).
SCORES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cosine": lambda cosines, logits: cosines,
    "logit": lambda cosines, logits: logits,
    "sigmoid": lambda cosines, logits: logits.sigmoid(),
    "softmax": lambda cosines, logits: logits.softmax(dim=-1),
}

_OPTIONS = (
    "candidate_labels",
    "hypothesis_template",
    "tokenizer_kwargs",
    "function_to_apply",
    "named_scores",
    "top_k",
    "timeout",
)
_CALL_OPTIONS = ("image", "images", "batch_size", "num_workers")
# Of the module, because a pipeline with a lock could not be copied.
_MAKING_A_BANK = threading.Lock()
_PACKING = threading.Lock()
# Packing takes as long as a few pictures, and the first ones are not kept waiting for it.
_PACK_AFTER = 16
# What `transformers.pipeline` hands on to the class although it has used it itself.
_LOADING_ARGUMENTS = ("local_files_only", "torch_dtype", "dtype", "args_parser")


def is_siglip_of_this_package(model: Any) -> bool:
    """Whether a model has this package's two-tower interface, also under a wrapper such as PEFT or `torch.compile`."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    # Both: other families have methods of these names that take other things.
    return model_type.startswith("siglip") and hasattr(model, "encode_image") and hasattr(model, "encode_text")


class SiglipZeroShotImageClassificationPipeline(ZeroShotImageClassificationPipeline):
    """Scores pictures against labels given as words.

    Making one for a model that is not this package's gives transformers' own pipeline.

    All arguments of a call but the pictures may also be given when the pipeline is made, as defaults:

        classifier = pipeline("zero-shot-image-classification", model=siglip_hf.default_checkpoint())
        classifier("cat.png", candidate_labels="cat, dog")
        # [{'score': ..., 'label': 'cat'}, {'score': ..., 'label': 'dog'}]

    Each label goes through the text tower once in the life of the pipeline (see `LabelBank`); a second picture, batch
    or call costs the image tower only. With `label_bank="FOLDER"` labels are kept there too, for every process that
    names the folder (see `LabelStore`).

    A float32 model on an x86 CPU has its weights packed (see `siglip_hf.optimize`) once 16 pictures and texts have
    come: the numbers stay the same within 1e-5. Whoever asks the model for more than that (gradients, a state dict,
    `.to`, adapters, hooks) gets it, and the weights are plain again from then on.

    Args:
        optimize: True to let `siglip_hf.optimize` pick the dtype too, at once (bfloat16, where the CPU multiplies in
            it); False to leave the model alone.

    Examples:
        >>> import siglip_hf
        >>> from transformers import pipeline
        >>> classify = pipeline("zero-shot-image-classification", model=siglip_hf.default_checkpoint())
        >>> classify("drawings/cat.png", candidate_labels="cat, dog")[0]["label"]
        'cat'
    """

    # What a pipeline of this class always has; transformers declares them optional, and a module's parameters vaguely.
    model: Any
    image_processor: Any

    def __new__(cls, model: Any = None, **kwargs: Any) -> Any:
        """An instance for SigLIP models of this package, transformers' own pipeline for all others."""
        # Without a model it is being copied or unpickled.
        if model is None or is_siglip_of_this_package(model):
            return super().__new__(cls)
        if kwargs.pop("optimize", None):
            raise ValueError(f"optimize=True is for SigLIP models, and this is a {type(model).__name__}; leave it out.")
        if type(model).__module__.startswith("siglip_hf."):
            raise ValueError(
                f"zero-shot classification compares pictures with texts, and {type(model).__name__} has no two towers: "
                'use the task "image-classification" for a classifier, and a joint model (SiglipModel) for this one.'
            )
        return ZeroShotImageClassificationPipeline(model=model, **kwargs)

    def __init__(self, *, optimize: bool | None = None, **kwargs: Any):
        for name in _LOADING_ARGUMENTS:
            kwargs.pop(name, None)
        self._label_bank: LabelBank | None = None
        folder = kwargs.pop("label_bank", None)
        self._label_store = None if folder is None else LabelStore(folder)
        # Pictures and texts until the weights are packed; None once that is settled.
        self._until_packed: int | None = _PACK_AFTER if optimize is None else None
        self._computing = 0  # forward passes under way, in all threads
        super().__init__(**kwargs)
        check_vocabulary(self.tokenizer, self.model.config.text_config.vocab_size)
        if optimize:
            optimization.optimize(self.model)

    def check_model_type(self, supported_models: Any) -> None:
        """Passes: the base class compares names of classes, and would call wrappers (PEFT, ONNX) an error."""

    @property
    def label_bank(self) -> LabelBank:
        """The class embeddings known so far. A new model, tokenizer or device starts a new one."""
        with _MAKING_A_BANK:
            bank = self._label_bank
            if (
                bank is None
                or bank.model is not self.model
                or bank.tokenizer is not self.tokenizer
                or bank.device != self.device
            ):
                bank = self._label_bank = LabelBank(
                    self.model, self.tokenizer, device=self.device, store=self._label_store
                )
            return bank

    def __call__(self, image: Any = None, candidate_labels: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Scores each picture against each label.

        Args:
            image: a picture as a path, URL, data URI, `bytes`, open file, PIL image, array or tensor; or many of them
                as a list, a tuple, a batched array (N, ...), an iterator, or a torch `Dataset` (such as `KeyDataset`).
                `images` is accepted as another name.
            candidate_labels: labels as a list, or as one string that separates them by commas. A label given twice
                counts once.
            hypothesis_template (`str` or list of `str`, default "This is a photo of {}."): the text for a label, with
                `{}` in its place. Under several templates a label's normalized embeddings are averaged.
            function_to_apply (`str`, default "sigmoid"): what `score` is. "sigmoid": the probability, label by label,
                that the text fits the picture. "softmax": shares among these labels, which sum to 1. "none" or "logit":
                cosine times temperature plus bias. "cosine": the bare similarity in -1..1.
            named_scores (`bool`, default False): each result holds `cosine`, `logit`, `sigmoid` and `softmax` as well.
            top_k (`int`, optional): only the best so many labels. Softmax is over all labels nevertheless.
            tokenizer_kwargs (`dict`, optional): arguments of the tokenizer's call. By default texts are padded and
                truncated to the model's length, as in training; anything else costs accuracy.
            timeout (`float`, default 30): seconds to wait for a URL; None waits forever.
            batch_size (`int`, default 1): pictures per forward.
            num_workers (`int`, default 0): processes that load pictures.

        Returns:
            For one picture a list of `{"score": float, "label": str}`, best first. For a list, tuple or batched array a
            list of those; for an iterator or a dataset an iterator of those, which reads pictures as it goes.

        Raises:
            ValueError: for labels, templates or options that cannot be, with the value, before any picture is read.
            PictureError: (an `OSError` and `ValueError`) for a picture that cannot be read, with its name.
        """
        if "images" in kwargs:
            if image is not None:
                raise ValueError("got both image and images, two names of one argument; pass one of them.")
            image = kwargs.pop("images")
        if image is None:
            raise ValueError("no picture given; pass one or many as the first argument.")
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        elif "candidate_labels" not in self._forward_params:
            raise ValueError("no candidate_labels given; pass a list of strings, or one string like 'cat, dog'.")
        pictures = _as_pipeline_input(image)
        if isinstance(pictures, list) and not pictures:
            self._sanitize_parameters(**_without(kwargs, _CALL_OPTIONS))
            return []
        # Past the stock class, whose __call__ has nothing to add.
        return Pipeline.__call__(self, pictures, **kwargs)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:  # type: ignore[override]
        for name in kwargs:
            if name not in _OPTIONS:
                near = difflib.get_close_matches(name, (*_OPTIONS, *_CALL_OPTIONS), n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join((*_OPTIONS, *_CALL_OPTIONS))}."
                raise ValueError(f"{name}={kwargs[name]!r} is not an argument of this pipeline; {hint}")
        # None stands for the default, but where it has a meaning of its own.
        given = {name: value for name, value in kwargs.items() if value is not None or name in ("timeout", "top_k")}
        preprocess: dict[str, Any] = {}
        forward: dict[str, Any] = {}
        postprocess: dict[str, Any] = {}
        if "timeout" in given:
            preprocess["timeout"] = given["timeout"]
        if "candidate_labels" in given:
            labels = parse_labels(given["candidate_labels"])
            forward["candidate_labels"] = postprocess["candidate_labels"] = labels
        if "hypothesis_template" in given:
            forward["templates"] = parse_templates(given["hypothesis_template"])
        if "tokenizer_kwargs" in given:
            forward["tokenizer_kwargs"] = _checked_mapping(given["tokenizer_kwargs"])
        if "function_to_apply" in given:
            postprocess["score"] = _score_name(given["function_to_apply"])
        if "named_scores" in given:
            postprocess["named_scores"] = bool(given["named_scores"])
        if "top_k" in given:
            postprocess["top_k"] = _checked_top_k(given["top_k"])
        return preprocess, forward, postprocess

    def load_picture(self, image: Any, timeout: float | None = DEFAULT_TIMEOUT) -> Image.Image:
        """One picture from anything as an RGB image, a very large JPEG in no more detail than the model can use.

        Args:
            image: as `load_picture` of `siglip_hf.preprocessing.image_intake` takes it.
            timeout: seconds to wait for a URL.

        Raises:
            PictureError: if it cannot be read.
        """
        size = getattr(self.image_processor, "size", None) or {}
        sides = [size[side] for side in ("height", "width") if size.get(side)]
        return load_picture(image, timeout=timeout, draft_to=max(sides) if sides else None)

    def preprocess(self, image: Any, timeout: float | None = DEFAULT_TIMEOUT) -> Any:  # type: ignore[override]
        """One picture from anything to the inputs of the image tower, in the model's dtype; such inputs stay so."""
        if isinstance(image, BatchFeature):
            return image
        with PIXELS.bounded():
            # Without a name for the picture: it is gone before the block ends and the next one may be decoded.
            return self.image_processor(images=[self.load_picture(image, timeout)], return_tensors="pt").to(self.dtype)

    def _forward(  # type: ignore[override]
        self,
        model_inputs: Mapping[str, torch.Tensor],
        candidate_labels: Sequence[str],
        templates: Sequence[str] = (DEFAULT_TEMPLATE,),
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        with self._packed_in_time(len(next(iter(model_inputs.values()))), len(candidate_labels) * len(templates)):
            classes = self.label_bank.class_embeddings(candidate_labels, templates, tokenizer_kwargs)  # (C, E) float32
            images = self.model.encode_image(**model_inputs).float()  # (B, E)
        cosines = images @ classes.to(images.device).t()  # (B, C)
        scale, bias = (p.to(cosines) for p in (self.model.logit_scale, self.model.logit_bias))
        return {"cosines": cosines, "logits": cosines * scale.exp() + bias}

    @contextlib.contextmanager
    def _packed_in_time(self, pictures: int, texts: int) -> Iterator[None]:
        """Packs the model's weights before the forward pass within, if it is due and no thread computes with them."""
        with _PACKING:
            if self._until_packed is not None:
                bank = self.label_bank
                self._until_packed -= pictures + (0 if len(bank) else texts)
                if self._until_packed <= 0 and not self._computing:
                    bank.repack(optimization.pack)
                    self._until_packed = None
            self._computing += 1
        try:
            yield
        finally:
            with _PACKING:
                self._computing -= 1

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: Mapping[str, torch.Tensor],
        candidate_labels: Sequence[str],
        score: str = "sigmoid",
        named_scores: bool = False,
        top_k: int | None = None,
    ) -> list[dict[str, Any]]:
        """The scores of one picture, best first."""
        cosines, logits = model_outputs["cosines"][0], model_outputs["logits"][0]  # (C,)
        names = tuple(SCORES) if named_scores else (score,)
        results = ranked(cosines, logits, candidate_labels, names, top_k)
        return [{"score": row[score], "label": row["label"], **(row if named_scores else {})} for row in results]


def ranked(
    cosines: torch.Tensor, logits: torch.Tensor, labels: Sequence[str], scores: Iterable[str], top_k: int | None = None
) -> list[dict[str, Any]]:
    """The labels of one picture with their scores, best first.

    Args:
        cosines: (C,).
        logits: (C,).
        labels: C of them.
        scores: names among `SCORES`.
        top_k: only the best so many; shares of the softmax are of all labels nevertheless.
    """
    values = {name: SCORES[name](cosines, logits) for name in scores}
    # By logits whatever the score is: a sigmoid saturates, and equal scores would lose their order.
    best = logits.argsort(descending=True, stable=True)[:top_k]
    columns = {name: column[best].tolist() for name, column in values.items()}
    return [
        {"label": labels[i], **{name: column[place] for name, column in columns.items()}}
        for place, i in enumerate(best.tolist())
    ]


def _as_pipeline_input(image: Any) -> Any:
    """Many pictures in a form that `Pipeline` knows (list, generator or dataset); one picture as it is."""
    if isinstance(image, str | bytes | bytearray | memoryview | list | Dataset):
        return image
    if isinstance(image, Iterator) and not hasattr(image, "read"):  # an open file iterates over lines
        return (item for item in image)
    if getattr(image, "ndim", 0) == 4:
        return load_pictures(image)
    return list(image) if isinstance(image, Sequence) else image


def _without(kwargs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


def _checked_mapping(tokenizer_kwargs: Any) -> dict[str, Any]:
    if not isinstance(tokenizer_kwargs, Mapping):
        raise ValueError(f"tokenizer_kwargs={tokenizer_kwargs!r} must be a dict, like {{'max_length': 16}}.")
    return dict(tokenizer_kwargs)


def _score_name(function_to_apply: Any) -> str:
    # transformers' own enumeration of these names is accepted too.
    name = getattr(function_to_apply, "value", function_to_apply)
    name = "logit" if name == "none" else name
    if not isinstance(name, str) or name not in SCORES:
        raise ValueError(f"function_to_apply={function_to_apply!r} is unknown; pass one of none, {', '.join(SCORES)}.")
    return name


def _checked_top_k(top_k: Any) -> int | None:
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k={top_k!r} must be a whole number of at least 1, or None for all labels.")
    return top_k
