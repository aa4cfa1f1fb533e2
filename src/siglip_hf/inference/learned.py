"""Classes that were taught with pictures: what `siglip_hf.learn` saved, on new pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from siglip_hf.inference.optimize.optimization import optimize
from siglip_hf.loading import load_image_classifier, pick_device
from siglip_hf.parallel import PIXELS
from siglip_hf.preprocessing.image_intake import load_picture


class HeadClassifier:
    """Says which of the classes that it was taught a picture shows, or that it shows none of them.

    Attributes:
        labels: the classes, in the order of the model's outputs.
        unknown_below: cosine with the nearest class below which a picture is of none; None if that was not learned.
        model: the tower with its classifier.
        image_processor: of the model.
    """

    def __init__(self, model: Any, image_processor: Any) -> None:
        """Takes a model and its image processor.

        Raises:
            ValueError: if the configuration does not name each class, or its threshold is no number.
        """
        self.model, self.image_processor = model, image_processor
        if model.is_learned:
            model.classifier.float()  # it costs nothing, and close probabilities stay apart
        names, tower = model.config.id2label, getattr(model.config, "vision_config", model.config)
        learned = tower.learned_head or {}
        below = learned.get("unknown_below") if isinstance(learned, dict) else learned
        if set(names) != set(range(model.num_labels)) or not isinstance(below, float | None):
            raise ValueError(
                f"config.json of the classifier is damaged: id2label has {sorted(names)[:20]}, unknown_below is "
                f"{below!r:.100}; make it again with `siglip-hf learn`."
            )
        self.labels = [names[number] for number in range(model.num_labels)]
        self.unknown_below: float | None = below

    def prepare(self, picture: Any) -> Mapping[str, torch.Tensor]:
        """Inputs of the model for one picture; may run in a thread.

        Args:
            picture: a path, a URL, bytes, a PIL image or an array.

        Returns:
            `pixel_values` (1, C, height, width), for NaFlex (1, patches, P) with mask and shapes.

        Raises:
            PictureError: naming the picture, if it cannot be read.
        """
        sides = [side for side in dict(getattr(self.image_processor, "size", None) or {}).values() if side]
        with PIXELS.bounded():
            # Without a name for the picture: it is gone before the block ends and the next one may be decoded.
            return self.image_processor(
                images=[load_picture(picture, draft_to=max(sides, default=None))], return_tensors="pt"
            )

    @torch.inference_mode()
    def score(self, inputs: Sequence[Mapping[str, torch.Tensor]], top_k: int | None = None) -> list[dict[str, Any]]:
        """What `__call__` returns, in one forward.

        Args:
            inputs: what `prepare` has made of each picture, `pixel_values` of (1, ...).
            top_k: only the best so many classes.

        Returns:
            A dict for each picture.
        """
        if not inputs:
            return []
        tower = self.model.vision_model
        joined = {name: torch.cat([one[name] for one in inputs]).to(tower.device) for name in inputs[0]}
        joined["pixel_values"] = joined["pixel_values"].to(tower.dtype)
        similarity: list[float | None] = [None] * len(inputs)
        if self.model.is_learned:
            embeds = tower(**joined).pooler_output  # (B, E)
            logits, similarity = self.model.classifier(embeds), self.model.classifier.similarity(embeds).tolist()
        else:
            logits = self.model(**joined).logits.float()  # (B, C)
        results = []
        for row, near in zip(logits.softmax(dim=-1), similarity, strict=True):
            best = row.argsort(descending=True, stable=True)[:top_k].tolist()
            unknown = near is not None and self.unknown_below is not None and near < self.unknown_below
            found = [{"label": self.labels[number], "probability": row[number].item()} for number in best]
            results.append({"labels": found, "unknown": unknown, "similarity": near})
        return results

    def __call__(self, pictures: Any, *, top_k: int | None = None, batch_size: int = 8) -> list[dict[str, Any]]:
        """The classes of each picture.

        Args:
            pictures: one picture or a list of them: paths, URLs, bytes, PIL images or arrays.
            top_k: only the best so many classes.
            batch_size: pictures in one forward.

        Returns:
            For each picture a dict: `labels` (dicts of `label` and `probability`, best first; the probabilities of all
            classes sum to 1), `unknown` (whether it is like none of the classes) and `similarity` (its cosine with the
            nearest class; None where that was not learned).

        Raises:
            PictureError: naming the first picture that cannot be read.
        """
        many = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
        batches = (many[start : start + batch_size] for start in range(0, len(many), batch_size))
        return [result for batch in batches for result in self.score([self.prepare(one) for one in batch], top_k)]


def load_head(name: str | os.PathLike[str], *, device: str | None = None, fast: bool = False) -> HeadClassifier:
    """Loads what `siglip_hf.learn` saved, or any SigLIP with a classifier.

    Args:
        name: its folder, or its name on the hub.
        device: "cpu", "cuda", ...; the first accelerator by default.
        fast: on a CPU, make it faster (`siglip_hf.optimize`), which rounds the scores to the dtype that it picks.

    Raises:
        ValueError: if there is no such device or checkpoint, or it has no classifier.
    """
    where = pick_device(device)
    model, image_processor = load_image_classifier(name)
    model.to(where)
    if fast:
        optimize(model)
    return HeadClassifier(model, image_processor)
