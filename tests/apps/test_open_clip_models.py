"""Models of open_clip in the pages and in `classify`, with a model of two lines; tests/peers has open_clip itself."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from siglip_hf.apps import multilingual, page
from siglip_hf.apps.scorers import OpenClipScorer, load_scorer
from siglip_hf.cli import main as cli

PICTURES = {Path(path).stem: page.read_upload(path) for path in page.demo_pictures()[:4]}


class Inner:
    """As transformers' tokenizer of NLLB, which begins texts with the language that it was given last."""

    def __init__(self):
        self.told: list[str] = []
        self._language, self.unk_token_id = "eng_Latn", 3

    def convert_tokens_to_ids(self, code: str) -> int:
        return sum(map(ord, code)) if code in ("eng_Latn", "deu_Latn", "tha_Thai") else self.unk_token_id

    @property
    def src_lang(self) -> str:
        return self._language

    @src_lang.setter
    def src_lang(self, code: str) -> None:
        self.told.append(code)
        self._language = code


class Tokenizer:
    """As open_clip's for NLLB: texts to ids (C, 4), begun by the language."""

    def __init__(self):
        self.tokenizer = Inner()

    def __call__(self, texts: list[str]) -> torch.Tensor:
        first = self.tokenizer.convert_tokens_to_ids(self.tokenizer.src_lang)
        return torch.tensor([[first, *map(ord, f"{text:<3}"[:3])] for text in texts])


class TwoTowers(torch.nn.Module):
    """As open_clip's models, with embeddings that can be worked out by hand."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.logit_bias: torch.nn.Parameter | None = torch.nn.Parameter(torch.tensor(-3.0))

    def encode_image(self, pixels, normalize=False):
        assert normalize
        return torch.nn.functional.normalize(pixels.flatten(1), dim=-1)

    def encode_text(self, ids, normalize=False):
        assert normalize
        return torch.nn.functional.normalize(ids.float(), dim=-1)


@pytest.fixture
def open_clip(monkeypatch):
    """open_clip's interface with a model of two lines, which remembers what was asked of it."""
    module = types.ModuleType("open_clip")
    module.asked = []
    module.model, module.tokenizer = TwoTowers(), Tokenizer()

    def create_model_from_pretrained(name, pretrained=None, device=None):
        module.asked.append((name, pretrained))
        return module.model, lambda picture: torch.tensor([1.0, 2.0, 3.0, 4.0])

    module.create_model_from_pretrained = create_model_from_pretrained
    module.get_tokenizer = lambda name: module.tokenizer
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return module


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("open_clip:nllb-clip-base-siglip/v1", ("nllb-clip-base-siglip", "v1")),
        ("open_clip:ViT-B-32//models/own.pt", ("ViT-B-32", "/models/own.pt")),
        ("open_clip:hf-hub:org/repo", ("hf-hub:org/repo", None)),
        ("open_clip:local-dir:/models/nllb", ("local-dir:/models/nllb", None)),
    ],
)
def test_names(open_clip, name, asked):
    assert load_scorer(name).name == name
    assert open_clip.asked == [asked]


@pytest.mark.parametrize("name", ["open_clip:nllb-clip-base", "open_clip:", "open_clip:hf-hub:", "open_clip:/v1"])
def test_names_without_weights(open_clip, name):
    with pytest.raises(ValueError, match="write open_clip:MODEL/WEIGHTS"):
        load_scorer(name)


def test_logits_with_and_without_a_bias(open_clip):
    scorer = load_scorer("open_clip:nllb/v1")
    assert (scorer.reads_as, scorer.parameters) == ("sigmoid", 2)
    image = torch.nn.functional.normalize(torch.tensor([1.0, 2.0, 3.0, 4.0]), dim=0)
    english = float(sum(map(ord, "eng_Latn")))
    text = torch.nn.functional.normalize(torch.tensor([english, *map(ord, "cat")]), dim=0)
    expected = (image @ text) * torch.tensor(2.0).exp()
    torch.testing.assert_close(scorer.logits(PICTURES["cat"], ["cat"]), (expected - 3)[None])
    open_clip.model.logit_bias = None
    scorer = OpenClipScorer("open_clip:nllb/v1")
    assert scorer.reads_as == "softmax"
    torch.testing.assert_close(scorer.logits(PICTURES["cat"], ["cat"]), expected[None])


def test_the_language_reaches_the_tokenizer(open_clip):
    scorer = load_scorer("open_clip:nllb/v1")
    rows = {"Deutsch": ("Katze", "Hund"), "tha_Thai": ("แมว", "หมา"), "Klingon": ("a", "b")}
    found = multilingual.score_languages(scorer, PICTURES["cat"], rows)
    # A language that is not known is read as English, not as the one before it.
    assert open_clip.tokenizer.tokenizer.told == ["eng_Latn", "deu_Latn", "tha_Thai", "eng_Latn"]
    german = scorer.logits(PICTURES["cat"], rows["Deutsch"], ["deu_Latn"] * 2)
    torch.testing.assert_close(found["Deutsch"][0], german.sigmoid())
    assert not torch.allclose(german, scorer.logits(PICTURES["cat"], rows["Deutsch"]))


def test_a_language_that_the_model_does_not_know(open_clip):
    scorer = load_scorer("open_clip:nllb/v1")
    with pytest.raises(ValueError, match="language='xxx_Xxxx' is none of this model's"):
        multilingual.score_languages(scorer, PICTURES["cat"], {"xxx_Xxxx": ("a", "b")})
    open_clip.tokenizer = lambda texts: torch.ones(len(texts), 4)
    with pytest.raises(ValueError, match="is told no language; leave it out"):
        OpenClipScorer("open_clip:clip/v1", language="deu_Latn")


def test_texts_asked_again_are_remembered(open_clip, monkeypatch):
    scorer = load_scorer("open_clip:nllb/v1")
    before = scorer.logits(PICTURES["cat"], ["cat", "dog"])
    monkeypatch.setattr(open_clip.model, "encode_text", lambda *args, **kwargs: pytest.fail("it was encoded again"))
    assert torch.equal(scorer.logits(PICTURES["cat"], ["cat", "dog"]), before)


def test_weights_that_cannot_be_used(open_clip, monkeypatch):
    with torch.no_grad():
        open_clip.model.logit_scale.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"cannot load 'open_clip:nllb/v1': the weight logit_scale is not finite"):
        load_scorer("open_clip:nllb/v1")
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: {}["no such"])
    with pytest.raises(ValueError, match="cannot load 'open_clip:nllb/v1': 'no such'"):
        load_scorer("open_clip:nllb/v1")


def test_classify_takes_it(open_clip, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    line = ["classify", str(tmp_path / "broken.png"), page.demo_pictures()[0], "--labels", "cat, hot_dog", "--json"]
    assert cli.main([*line, "--model", "open_clip:nllb/v1", "--language", "deu_Latn", "--template", "{}"]) == 1
    broken, found = json.loads(capsys.readouterr().out)
    assert "not a picture" in broken["error"]
    scorer = load_scorer("open_clip:nllb/v1")
    logits = scorer.logits(PICTURES["cat"], ["cat", "hot dog"], ["deu_Latn"] * 2)
    assert {row["label"]: row["logit"] for row in found["labels"]} == pytest.approx(
        dict(zip(["cat", "hot_dog"], logits.tolist(), strict=True))
    )
    assert set(found["labels"][0]) == {"label", "cosine", "logit", "sigmoid", "softmax"}
    open_clip.model.logit_bias = None
    assert cli.main([*line, "--model", "open_clip:nllb/v1"]) == 1
    _, shares = json.loads(capsys.readouterr().out)
    assert set(shares["labels"][0]) == {"label", "cosine", "logit", "softmax"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--language", "kor_Hang"], "--language kor_Hang is for a model of open_clip"),
        (["--model", "open_clip:nllb/v1", "--label-bank", "x"], "--label-bank keeps labels of SigLIP models"),
        (["--model", "open_clip:nllb/v1", "--language", "Korean"], "language='Korean' is none of this model's"),
        (["--model", "open_clip:nllb"], "write open_clip:MODEL/WEIGHTS"),
    ],
)
def test_mistakes_of_classify(open_clip, options, said, capsys):
    assert cli.main(["classify", page.demo_pictures()[0], "--labels", "a, b", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        load_scorer("open_clip:nllb-clip-base/v1")
