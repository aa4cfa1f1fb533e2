"""Models of any kind that compare a picture with texts, behind one interface, for the pages that show them together.

SigLIP and SigLIP 2 run through this package's pipeline, other families through transformers' Auto classes, and models
of open_clip through open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from siglip_hf.extras import missing
from siglip_hf.files import first_line
from siglip_hf.inference.classify import load_classifier
from siglip_hf.inference.optimize.optimization import optimize
from siglip_hf.inference.pooling_map import pooling_attention
from siglip_hf.loading import from_checkpoint

#: In front of a model's name: it is one of open_clip.
OPEN_CLIP = "open_clip:"

Languages = Sequence[str | None] | None  # None: not known


class Scorer:
    """A model that compares a picture with texts.

    Attributes:
        source: the checkpoint, as the user gave it.
        name: the same, shortened to what tells it apart.
        reads_as: how its logits become scores: "sigmoid", each text on its own, or "softmax", shares among the texts.
        parameters: how many it has.
    """

    reads_as = "softmax"

    def __init__(self, name: str, model: Any):
        self.source = name
        self.name = Path(name).name if Path(name).exists() else name
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    def logits(self, picture: Image.Image, texts: Sequence[str], languages: Languages = None) -> torch.Tensor:
        """How well each of C texts fits.

        Args:
            picture: an RGB picture.
            texts: C texts.
            languages: of each text, as a code of FLORES-200 such as "deu_Latn"; only some tokenizers ask for it.

        Returns:
            (C,) float32 on the CPU.
        """
        raise NotImplementedError

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (C,) as this family's scores (C,) in 0..1."""
        return logits.sigmoid() if self.reads_as == "sigmoid" else logits.softmax(dim=-1)

    def attention(self, picture: Image.Image) -> torch.Tensor | None:
        """(rows, columns): how much the pooling head looks at each patch; None for models without such a head."""
        return None


class SiglipScorer(Scorer):
    """SigLIP or SigLIP 2; texts that were asked before are remembered (see `LabelBank`)."""

    reads_as = "sigmoid"

    def __init__(self, name: str, device: str | None = None):
        self._pipeline = load_classifier(name, device)
        model = self._pipeline.model
        super().__init__(name, model)
        if model.device.type == "cpu":
            # In float32, because people compare the scores, and CPUs compute slowly in float16.
            optimize(model.float(), torch.float32)

    def logits(self, picture: Image.Image, texts: Sequence[str], languages: Languages = None) -> torch.Tensor:
        rows = self._pipeline(picture, list(texts), hypothesis_template="{}", function_to_apply="logit")
        by_text = {row["label"]: row["score"] for row in rows}
        return torch.tensor([by_text[text] for text in texts])

    def attention(self, picture: Image.Image) -> torch.Tensor | None:
        model = self._pipeline.model
        if not model.vision_model.use_head:
            return None
        inputs = self._pipeline.image_processor(images=[picture], return_tensors="pt")
        return pooling_attention(model, inputs.to(model.device, model.dtype))[0]


class ClipScorer(Scorer):
    """CLIP, AltCLIP, Chinese-CLIP, ALIGN and others that transformers gives `logits_per_image`."""

    def __init__(self, name: str, device: str | None = None):
        from transformers import AutoModel, AutoProcessor

        self._model = from_checkpoint(AutoModel, name).eval()
        if not hasattr(self._model, "get_image_features") or not hasattr(self._model, "get_text_features"):
            raise ValueError(f"it is a {type(self._model).__name__}, which does not compare pictures with texts.")
        self._processor = from_checkpoint(AutoProcessor, name)
        if device:
            self._model.to(device)
        super().__init__(name, self._model)

    @torch.inference_mode()
    def logits(self, picture: Image.Image, texts: Sequence[str], languages: Languages = None) -> torch.Tensor:
        inputs = self._processor(text=list(texts), images=[picture], return_tensors="pt", padding=True, truncation=True)
        return self._model(**inputs.to(self._model.device)).logits_per_image[0].float().cpu()


class OpenClipScorer(Scorer):
    """A model of open_clip, NLLB-CLIP among them, whose tokenizer wants to know the language."""

    def __init__(self, name: str, device: str | None = None):
        try:
            import open_clip
        except ImportError as error:
            raise missing(f"{name} needs open_clip, which cannot be imported here ({error})", "open-clip") from error
        model_name, weights = _open_clip_name(name)
        self._device = device or "cpu"
        self._model, self._transform = open_clip.create_model_from_pretrained(
            model_name, pretrained=weights, device=self._device
        )
        self._model.eval()
        self._tokenizer = open_clip.get_tokenizer(model_name)
        if getattr(self._model, "logit_bias", None) is not None:  # trained with SigLIP's loss
            self.reads_as = "sigmoid"
        super().__init__(name, self._model)

    @torch.inference_mode()
    def logits(self, picture: Image.Image, texts: Sequence[str], languages: Languages = None) -> torch.Tensor:
        pixels = self._transform(picture).unsqueeze(0).to(self._device)  # (1, 3, height, width)
        image = self._model.encode_image(pixels, normalize=True)[0]  # (E,)
        input_ids = torch.cat(list(self._tokens(texts, languages)))  # (C, L)
        embeds = self._model.encode_text(input_ids.to(self._device), normalize=True)  # (C, E)
        logits = embeds @ image * self._model.logit_scale.exp()
        if self.reads_as == "sigmoid":
            logits = logits + self._model.logit_bias
        return logits.float().cpu()

    def _tokens(self, texts: Sequence[str], languages: Languages) -> Iterator[torch.Tensor]:
        """Token ids (n, L) of each run of texts in one language."""
        for language, run in groupby(zip(languages or [None] * len(texts), texts, strict=True), key=itemgetter(0)):
            if language and hasattr(self._tokenizer, "set_lang_fn"):
                self._tokenizer.set_language(language)
            yield self._tokenizer([text for _, text in run])


def load_scorer(name: str, device: str | None = None) -> Scorer:
    """The model of a name or folder.

    Args:
        name: a checkpoint of transformers, by name or folder; or "open_clip:" and a name of open_clip: with its
            weights as in "open_clip:nllb-clip-base-siglip/v1", or "open_clip:hf-hub:...", "open_clip:local-dir:...".
        device: where it runs; the first accelerator for SigLIP and the CPU for others if None.

    Raises:
        ValueError: if it cannot be loaded, or does not compare pictures with texts.
        ImportError: if open_clip is asked for and not installed.
    """
    from transformers import AutoConfig

    kind: type[SiglipScorer] | type[ClipScorer] | type[OpenClipScorer]
    try:
        if name.startswith(OPEN_CLIP):
            kind = OpenClipScorer
        else:
            is_siglip = from_checkpoint(AutoConfig, name).model_type.startswith("siglip")
            kind = SiglipScorer if is_siglip else ClipScorer
        scorer = kind(name, device)
        # A model that cannot answer should say so now; and the first answer shown should not pay for warming up.
        scorer.logits(Image.new("RGB", (64, 64)), ["a text"])
        return scorer
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if str(error).startswith("cannot load"):
            raise
        raise ValueError(f"cannot load {name!r}: {first_line(error)}") from error


def _open_clip_name(name: str) -> tuple[str, str | None]:
    """Model and weights out of "open_clip:MODEL/WEIGHTS"; the schemas of open_clip say both at once."""
    rest = name.removeprefix(OPEN_CLIP)
    if re.match(r"(hf-hub|local-dir):.", rest):
        return rest, None
    model, _, weights = rest.partition("/")
    if not model or not weights:
        raise ValueError(
            "write open_clip:MODEL/WEIGHTS, like open_clip:nllb-clip-base-siglip/v1 (open_clip.list_pretrained() "
            "names them all), open_clip:hf-hub:ORGANIZATION/REPOSITORY, or open_clip:local-dir:FOLDER."
        )
    return model, weights
