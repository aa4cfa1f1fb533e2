"""Captions of the concepts as texts, prompts and token ids; the SentencePiece vocabulary made of them.

A text may belong to several concepts ("face", "animal"): `belongs` says to which, so that no pair is a false negative.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from siglip_hf import canonicalize_text

VOCABULARY_SIZE = 10_000
TEXT_LENGTH = 16

# How a label is wrapped in training, by language; the English ones are also the ensemble of the evaluation.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "{}",
        "a picture of {}",
        "a photo of {}",
        "a photo of a {}",
        "this is a photo of {}",
        "a drawing of a {}",
        "an emoji of a {}",
        "an icon of {}",
        "{} emoji",
        "a cartoon {}",
    ),
    "de": ("{}", "ein bild von {}", "ein foto von {}", "{} emoji"),
    "fr": ("{}", "une image de {}", "une photo de {}", "émoji {}"),
    "es": ("{}", "una imagen de {}", "una foto de {}", "emoji de {}"),
    "it": ("{}", "un'immagine di {}", "una foto di {}", "emoji {}"),
    "pt": ("{}", "uma imagem de {}", "uma foto de {}", "emoji de {}"),
    "ru": ("{}", "изображение {}", "фото {}", "эмодзи {}"),
    "ko": ("{}", "{} 사진", "{} 그림", "{} 이모티콘"),
    "ja": ("{}", "{}の写真", "{}の絵", "{}の絵文字"),
    "zh": ("{}", "{}的照片", "一张{}的图片", "{}表情符号"),
}


@dataclass(frozen=True)
class Text:
    """One caption before it is wrapped in a template: its words, its language, and whether it names the concept."""

    words: str
    language: str
    is_label: bool


def texts_of(concept: dict[str, Any]) -> list[Text]:
    """All captions of a concept: labels and aliases, then tags."""
    texts = [Text(alias, "en", True) for alias in concept["aliases"]]
    for language, caption in concept["captions"].items():
        texts.append(Text(caption["label"].lower(), language, True))
        texts += [Text(tag.lower(), language, False) for tag in caption["tags"]]
    return list(dict.fromkeys(texts))


class Captions:
    """All texts of all concepts.

    Attributes:
        texts: (T) distinct texts.
        belongs: (T, C) bool, which concepts a text is a caption of.
        labels: per concept, the numbers of the texts that name it.
        tags: per concept, the numbers of its other texts.
    """

    def __init__(self, concepts: list[dict[str, Any]]) -> None:
        numbers: dict[Text, int] = {}
        self.labels: list[list[int]] = []
        self.tags: list[list[int]] = []
        pairs = []
        for index, concept in enumerate(concepts):
            self.labels.append([])
            self.tags.append([])
            for text in texts_of(concept):
                number = numbers.setdefault(text, len(numbers))
                (self.labels if text.is_label else self.tags)[index].append(number)
                pairs.append((number, index))
        self.texts = list(numbers)
        self.belongs = torch.zeros(len(self.texts), len(concepts), dtype=torch.bool)
        self.belongs[tuple(torch.tensor(pairs).T)] = True
        # The same words as a label here and as a tag there ("dog") are one caption of both.
        by_words: dict[tuple[str, str], list[int]] = {}
        for number, text in enumerate(self.texts):
            by_words.setdefault((text.words, text.language), []).append(number)
        for same in by_words.values():
            if len(same) > 1:
                self.belongs[same] = self.belongs[same].any(0)

    def prompt(self, number: int, random_source: random.Random) -> str:
        """A text as a prompt: half of the labels bare, the others in a template of their language; tags mostly bare."""
        text = self.texts[number]
        if random_source.random() < (0.5 if text.is_label else 0.8):
            return text.words
        return random_source.choice(TEMPLATES[text.language]).format(text.words)


class Encoder:
    """Turns texts into padded ids straight from SentencePiece, and remembers them.

    The ids are those of `SiglipTokenizer` (the export checks it); a training step needs thousands of them.
    """

    def __init__(self, vocabulary: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        """Ids (B, TEXT_LENGTH) long, padded with the end token."""
        return torch.tensor([self._ids(text) for text in texts])

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            end = self.pieces.eos_id()
            ids = self.pieces.encode(canonicalize_text(text))[: TEXT_LENGTH - 1]
            self._known[text] = ids + [end] * (TEXT_LENGTH - len(ids))
        return self._known[text]


def build_vocabulary(captions: Captions, path: Path) -> None:
    """Train the SentencePiece model and write it to `path`, with the special ids of the published ones (</s> is 1)."""
    lines = [text.words for text in captions.texts]
    for text in captions.texts[::5]:
        lines += [template.format(text.words) for template in TEMPLATES[text.language][1:]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(canonicalize_text(line) for line in lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY_SIZE,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        # Needed as pieces by tokenizers that put "<unk>" before a text to protect its first space.
        required_chars="<>",
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
