"""Models of any kind that compare a picture with texts, behind one interface, for the pages that show them together.

SigLIP and SigLIP 2 run through this package's pipeline, other families through transformers' Auto classes, and models
of open_clip through open_clip.
"""

from __future__ import annotations

import re
import threading
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
from siglip_hf.inference.label_bank import parse_labels, parse_templates
from siglip_hf.inference.optimize.optimization import optimize
from siglip_hf.inference.pipeline import DEFAULT_TEMPLATE, SCORES, ranked
from siglip_hf.inference.pooling_map import pooling_attention
from siglip_hf.loading import check_weights, from_checkpoint
from siglip_hf.parallel import PIXELS
from siglip_hf.preprocessing.image_intake import load_picture
from siglip_hf.preprocessing.text_cleaning import label_words

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
    """A model of open_clip, NLLB-CLIP among them, whose tokenizer wants to know the language.

    `siglip_hf.inference.classify.classify_files` takes it as it takes a pipeline.

    Args:
        name: "open_clip:" and the model, as `load_scorer` takes it.
        device: where it runs; the CPU if None.
        language: of texts whose language is not given, as a code of FLORES-200; the tokenizer's own, English, if None.
    """

    def __init__(self, name: str, device: str | None = None, language: str | None = None):
        try:
            import open_clip
        except ImportError as error:
            raise missing(f"{name} needs open_clip, which cannot be imported here ({error})", "open-clip") from error
        model_name, weights = _open_clip_name(name)
        self._device = device or "cpu"
        try:
            self._model, self._transform = open_clip.create_model_from_pretrained(
                model_name, pretrained=weights, device=self._device
            )
            self._tokenizer = open_clip.get_tokenizer(model_name)
        except Exception as error:  # damaged files raise almost anything: TypeError, SafetensorError, ...
            raise ValueError(f"cannot load {name!r}: {first_line(error)}") from error
        check_weights(name, self._model)
        self._model.eval()
        super().__init__(name, self._model)
        if getattr(self._model, "logit_bias", None) is not None:  # trained with SigLIP's loss
            self.reads_as = "sigmoid"
        # transformers' tokenizer within open_clip's. One like NLLB's begins a text with its language, which is set for
        # all threads at once; open_clip's own `set_language` does not last until the text is read.
        inner = getattr(self._tokenizer, "tokenizer", None)
        self._inner = inner if hasattr(inner, "src_lang") else None
        self._one_language = threading.Lock()
        self._language = language or getattr(inner, "src_lang", None)
        if language:
            self._check_language(language)
        self._last: tuple[Any, torch.Tensor] | None = None  # the texts asked last, and their embeddings

    def logits(self, picture: Image.Image, texts: Sequence[str], languages: Languages = None) -> torch.Tensor:
        return self._logits(self._cosines([self._transform(picture)], self._embeds([[t] for t in texts], languages)))[0]

    def preprocess(self, source: Any) -> torch.Tensor:
        """A picture from a path, URL, bytes or the like as the model's pixels (3, height, width).

        Raises:
            PictureError: if it cannot be read.
        """
        with PIXELS.bounded():
            return self._transform(load_picture(source))

    def __call__(
        self,
        pictures: Sequence[torch.Tensor],
        labels: Sequence[str] | str,
        *,
        hypothesis_template: str | Sequence[str] | None = None,
        top_k: int | None = None,
        **kwargs: Any,
    ) -> list[list[dict[str, Any]]]:
        """Labels with their scores for each picture, best first; arguments as of this package's pipeline.

        A model that shares out 100 % among the labels (softmax) gives no `sigmoid`.
        """
        names, templates = parse_labels(labels), parse_templates(hypothesis_template or DEFAULT_TEMPLATE)
        if not pictures:
            return []
        texts = [[template.format(label_words(name)) for template in templates] for name in names]
        cosines = self._cosines(pictures, self._embeds(texts))  # (B, C)
        logits = self._logits(cosines)
        scores = [score for score in SCORES if score != "sigmoid" or self.reads_as == "sigmoid"]
        return [ranked(*rows, names, scores, top_k) for rows in zip(cosines, logits, strict=True)]

    @torch.inference_mode()
    def _cosines(self, pictures: Sequence[torch.Tensor], embeds: torch.Tensor) -> torch.Tensor:
        """Of B pictures (3, height, width) and embeddings (C, E): (B, C), float32 on the CPU."""
        pixels = torch.stack(list(pictures)).to(self._device)  # (B, 3, height, width)
        return (self._model.encode_image(pixels, normalize=True) @ embeds.T).float().cpu()

    @torch.inference_mode()
    def _logits(self, cosines: torch.Tensor) -> torch.Tensor:
        logits = cosines * self._model.logit_scale.exp().to(cosines)
        return logits + self._model.logit_bias.to(cosines) if self.reads_as == "sigmoid" else logits

    @torch.inference_mode()
    def _embeds(self, texts: Sequence[Sequence[str]], languages: Languages = None) -> torch.Tensor:
        """One embedding (C, E) for each of C groups of T texts: their mean, at length 1. The last ones are kept."""
        asked = (texts, languages)
        if (last := self._last) is not None and last[0] == asked:
            return last[1]
        flat = [text for group in texts for text in group]
        codes = [code for code, group in zip(languages or [None] * len(texts), texts, strict=True) for _ in group]
        input_ids = torch.cat(list(self._tokens(flat, codes)))  # (C * T, L)
        rows = self._model.encode_text(input_ids.to(self._device), normalize=True)
        means = torch.nn.functional.normalize(rows.unflatten(0, (len(texts), -1)).mean(dim=1), dim=-1)
        self._last = (asked, means)
        return means

    def _tokens(self, texts: Sequence[str], languages: Sequence[str | None]) -> Iterator[torch.Tensor]:
        """Token ids (n, L) of each run of texts in one language."""
        for language, run in groupby(zip(languages, texts, strict=True), key=itemgetter(0)):
            with self._one_language:
                if self._inner is not None:
                    # Also where no language is given, or the tokenizer would keep the one before.
                    self._check_language(code := language or self._language)
                    self._inner.src_lang = code
                input_ids = self._tokenizer([text for _, text in run])
            yield input_ids

    def _check_language(self, code: str | None) -> None:
        """Refuses a language that this model was not trained on: the tokenizer would begin its texts with <unk>."""
        if self._inner is None:
            raise ValueError(f"language={code!r}: the tokenizer of {self.source!r} is told no language; leave it out.")
        if self._inner.convert_tokens_to_ids(code) in (None, self._inner.unk_token_id):
            raise ValueError(
                f"language={code!r} is none of this model's; write a code of FLORES-200, such as kor_Hang."
            )


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
