"""NLLB-CLIP through open_clip itself, tiny and with random weights, in both pages and in `classify --model`.

open_clip prepares pictures with torchvision; `make test-layouts` installs both into folders of their own and runs this.
"""

import json

import pytest
import torch

from bench.stand_in import import_peer, import_torchvision

torchvision = import_torchvision()  # before transformers, which asks for it
open_clip = torchvision and import_peer("open_clip")
pytestmark = pytest.mark.skipif(not open_clip, reason="open_clip and torchvision are not installed: make test-layouts")

from siglip_hf.apps import compare, multilingual, page  # noqa: E402
from siglip_hf.apps.scorers import load_scorer  # noqa: E402
from siglip_hf.cli.main import main  # noqa: E402
from tiny_nllb_clip import write_tiny_nllb_clip  # noqa: E402

(PATH,) = (path for path in page.demo_pictures() if path.endswith("cat.png"))
ROWS = {
    "English": ("cat", "dog"),
    "Deutsch": ("Katze", "Hund"),
    "kor_Hang": ("고양이", "개"),
    "Klingon": ("cat", "dog"),
}
CODES = ("eng_Latn", "deu_Latn", "kor_Hang", "eng_Latn")  # what is not known is read as English


@pytest.fixture(scope="module", params=["softmax", "sigmoid"])
def folder(request, tmp_path_factory):
    return write_tiny_nllb_clip(open_clip, tmp_path_factory.mktemp("nllb") / request.param, request.param)


@pytest.fixture(scope="module")
def scorer(folder):
    return load_scorer(f"open_clip:local-dir:{folder}")


@pytest.fixture(scope="module")
def plain(folder):
    """Cosines and logits of the cat with texts in one language, by open_clip and transformers alone."""
    from transformers import NllbTokenizer

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    pixels = transform(page.read_upload(PATH))[None]

    @torch.no_grad()
    def ask(texts, language):
        tokenizer = NllbTokenizer.from_pretrained(folder, src_lang=language)
        ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        assert ids[:, 0].tolist() == [tokenizer.convert_tokens_to_ids(language)] * len(texts)
        texts = model.eval().encode_text(ids, normalize=True)
        cosines = (model.encode_image(pixels, normalize=True) @ texts.T)[0]
        bias = 0 if model.logit_bias is None else model.logit_bias
        return texts, cosines, cosines * model.logit_scale.exp() + bias

    return ask


def test_each_language_reaches_the_text_tower(folder, scorer, plain):
    assert scorer.reads_as == folder.name
    found = multilingual.score_languages(scorer, page.read_upload(PATH), ROWS)
    for (language, labels), code in zip(ROWS.items(), CODES, strict=True):
        _, _, logits = plain(list(labels), code)
        torch.testing.assert_close(found[language][0], scorer.scores(logits), atol=1e-5, rtol=1e-4)
        assert found[language][1] == int(logits.argmax())
    torch.testing.assert_close(found["English"][0], found["Klingon"][0])
    german = scorer.logits(page.read_upload(PATH), ROWS["English"], ["deu_Latn"] * 2)
    assert (german - plain(list(ROWS["English"]), "eng_Latn")[2]).abs().min() > 1e-3


def test_both_pages(scorer, plain):
    pytest.importorskip("gradio")
    _, _, logits = plain(["a cat", "a dog"], "eng_Latn")
    for room, arguments in (
        (compare, (PATH, "cat, dog", "a {}")),
        (multilingual, (PATH, "English: cat, dog\nkor_Hang: 고양이, 개")),
    ):
        blocks = room.build([scorer])
        (answer,) = {function.fn for function in blocks.fns.values() if function.fn.__name__ == "answer"}
        said = answer(*arguments)
        assert "problem" not in said
        assert scorer.name in said
        assert scorer.reads_as in said
        if room is compare:
            assert f"{logits.softmax(dim=0).max():.1%}" in said
        else:
            assert "고양이" in said
    assert "language=&#x27;zzz_Zzzz&#x27; is none of this model&#x27;s" in answer(PATH, "zzz_Zzzz: a, b")


def test_classify(folder, scorer, plain, capsys):
    templates = ["ein Bild: {}", "{}"]
    line = ["classify", PATH, "--labels", "Katze, Hund", "--model", f"open_clip:local-dir:{folder}", "--json"]
    options = [option for template in templates for option in ("--template", template)]
    assert main([*line, *options, "--language", "deu_Latn"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    expected = {}
    for label in ("Katze", "Hund"):
        texts, cosines, _ = plain([template.format(label) for template in templates], "deu_Latn")
        mean = texts.mean(dim=0)
        expected[label] = (cosines.mean() / mean.norm()).item()
    assert {row["label"]: row["cosine"] for row in found["labels"]} == pytest.approx(expected, abs=1e-5)
    assert ("sigmoid" in found["labels"][0]) == (scorer.reads_as == "sigmoid")
    assert sum(row["softmax"] for row in found["labels"]) == pytest.approx(1)
    assert main([*line, *options]) == 0
    (english,) = json.loads(capsys.readouterr().out)
    assert english["labels"] != found["labels"]


def test_a_damaged_folder_is_told_in_one_line(folder, tmp_path, capsys):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    capsys.readouterr()
    assert main(["classify", PATH, "--labels", "a, b", "--model", f"open_clip:local-dir:{tmp_path}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"cannot load 'open_clip:local-dir:{tmp_path}'" in error
