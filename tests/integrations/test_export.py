"""ONNX export: embeddings as PyTorch's, metadata that is enough to prepare inputs, and refusal where they differ."""

from __future__ import annotations

import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import pipeline

import siglip_hf
from siglip_hf.cli.main import main
from siglip_hf.integrations import onnx as export_module
from siglip_hf.integrations.onnx import OnnxSiglip, export_onnx, onnx_classifier
from siglip_hf.preprocessing.image_processing_siglip import SiglipImageProcessor
from tiny import shaken, tiny_config, tiny_inputs
from tiny_checkpoint import write_tiny_checkpoint

PREPARATION = {
    "model_type": "siglip",
    "image_size": [32, 32],
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "resample": 3,
    "text_length": 16,
}


def tiny_model(seed=0):
    config = tiny_config()
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    return shaken(siglip_hf.SiglipModel(config), seed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("export") / "checkpoint")


@pytest.fixture(scope="module")
def exported(checkpoint):
    """(model, folder, what `export` returned)."""
    folder = checkpoint.with_name("onnx")
    return siglip_hf.SiglipModel.from_pretrained(checkpoint), folder, export_onnx(checkpoint, folder)


@pytest.fixture
def picture():
    values = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_embeddings_are_those_of_pytorch_for_any_batch_size(exported):
    model, folder, result = exported
    assert set(result.cosines) == {"vision", "text"}
    assert min(result.cosines.values()) > 0.999999
    onnx_model = OnnxSiglip(folder, num_threads=1)
    for batch in (1, 2, 7):
        inputs = tiny_inputs(images=batch, texts=batch, seed=batch)
        inputs["input_ids"] %= model.config.text_config.vocab_size
        with torch.no_grad():
            images, texts = model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"])
            logits = model(**inputs).logits_per_image
        torch.testing.assert_close(onnx_model.encode_image(inputs["pixel_values"]), images, atol=1e-5, rtol=0)
        torch.testing.assert_close(onnx_model.encode_text(inputs["input_ids"].numpy()), texts, atol=1e-5, rtol=0)
        torch.testing.assert_close(onnx_model(**inputs), logits, atol=1e-4, rtol=1e-4)


def test_files_are_valid_onnx_and_say_how_to_prepare_inputs(exported):
    model, folder, result = exported
    for tower, name, shape, dtype in (
        ("vision", "pixel_values", ["batch", 3, 32, 32], "tensor(float)"),
        ("text", "input_ids", ["batch", 16], "tensor(int64)"),
    ):
        onnx.checker.check_model(folder / f"{tower}.onnx")
        session = onnxruntime.InferenceSession(folder / f"{tower}.onnx", providers=["CPUExecutionProvider"])
        (given,), (made,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.shape, given.type) == (name, shape, dtype)
        assert (made.name, made.shape, made.type) == ("embeds", ["batch", 32], "tensor(float)")
        properties = session.get_modelmeta().custom_metadata_map
        metadata = {key: json.loads(value) for key, value in properties.items()}
        assert metadata == result.metadata
        assert metadata | PREPARATION == metadata
        assert metadata["logit_scale"] == model.logit_scale.item()
        assert metadata["logit_bias"] == model.logit_bias.item()
        assert [entry.version for entry in onnx.load(folder / f"{tower}.onnx").opset_import] == [20]
    assert siglip_hf.SiglipConfig.from_pretrained(folder).text_config == model.config.text_config


def test_the_metadata_alone_prepares_a_picture(exported, picture):
    model, folder, result = exported
    settings = result.metadata
    resized = picture.resize(settings["image_size"][::-1], settings["resample"])
    pixels = np.asarray(resized, np.float32) * settings["rescale_factor"]
    pixels = (pixels - settings["image_mean"]) / settings["image_std"]
    by_hand = OnnxSiglip(folder).encode_image(pixels.transpose(2, 0, 1)[None].astype(np.float32))
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    with torch.no_grad():
        expected = model.encode_image(processor(picture, return_tensors="pt").pixel_values)
    torch.testing.assert_close(by_hand, expected, atol=1e-5, rtol=0)


def test_the_pipeline_gives_the_scores_of_pytorch(checkpoint, exported, picture, caplog):
    _, folder, _ = exported
    options = {"candidate_labels": ["cat", "dog", "red car"], "named_scores": True}
    with caplog.at_level("ERROR"):
        classify = onnx_classifier(folder)
    assert [record.message for record in caplog.records] == []
    found = classify([picture, picture.rotate(90)], batch_size=2, **options)
    expected = pipeline("zero-shot-image-classification", model=str(checkpoint))(
        [picture, picture.rotate(90)], **options
    )
    assert len(found) == 2
    for rows, expected_rows in zip(found, expected, strict=True):
        assert [row["label"] for row in rows] == [row["label"] for row in expected_rows]
        for row, expected_row in zip(rows, expected_rows, strict=True):
            assert row["cosine"] == pytest.approx(expected_row["cosine"], abs=1e-5)
            assert row["logit"] == pytest.approx(expected_row["logit"], abs=1e-4)
    assert classify.label_bank.texts_encoded == 3


def test_the_command_line_exports_and_classifies(checkpoint, exported, picture, tmp_path, monkeypatch, capsys):
    calls = []

    def record(model, output, **options):
        calls.append((model, output, options))
        return exported[2]

    monkeypatch.setattr(export_module, "export_onnx", record)
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--dtype", "float16", "--opset", "18"]) == 0
    assert calls == [
        (str(checkpoint), tmp_path / "out", {"dtype": "float16", "opset": 18, "overwrite": False}),
    ]
    assert "lowest cosine to PyTorch: vision.onnx 1.0000000, text.onnx 1.0000000" in capsys.readouterr().out

    picture.save(tmp_path / "cat.png")
    scores = []
    for source in (["--onnx", str(exported[1])], ["--model", str(checkpoint), "--no-fast"]):
        assert main(["classify", str(tmp_path / "cat.png"), "--labels", "cat, dog", "--json", *source]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        scores.append({label["label"]: label["logit"] for label in row["labels"]})
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    for option in ("--model", "--device"):
        assert main(["classify", "cat.png", "--labels", "a", "--onnx", "x", option, "cpu"]) == 2
        assert f"{option} and --onnx are both given" in capsys.readouterr().err


def test_inputs_of_another_size_are_refused(exported):
    onnx_model = OnnxSiglip(exported[1])
    with pytest.raises(ValueError, match=r"the pictures are \[16, 32\], the exported tower takes \[32, 32\]"):
        onnx_model.encode_image(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match="the texts have 5 tokens, the exported tower takes 16"):
        onnx_model.encode_text(torch.zeros(1, 5, dtype=torch.int64))


def test_an_export_in_half_precision(tmp_path):
    model = tiny_model()
    result = export_onnx(model, tmp_path / "half", dtype="float16", opset=18)
    assert 0.999 < min(result.cosines.values()) < 1
    assert sorted(path.name for path in result.folder.iterdir()) == ["config.json", "text.onnx", "vision.onnx"]
    with pytest.raises(ValueError, match="half has no tokenizer or image processor"):
        onnx_classifier(result.folder)
    assert result.metadata["dtype"] == "float16"
    file = onnx.load(tmp_path / "half" / "vision.onnx")
    assert [entry.version for entry in file.opset_import] == [18]
    halves = [t for t in file.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    stored = sum(int(np.prod(tensor.dims)) for tensor in halves)
    assert stored >= sum(parameter.numel() for parameter in model.vision_model.parameters())
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = model.encode_image(inputs["pixel_values"])
    cosines = (OnnxSiglip(tmp_path / "half").encode_image(inputs["pixel_values"]) * expected).sum(-1)
    assert cosines.min() > 0.999


def given_file(file):
    """An exporter that gives this file for any tower."""

    def to_onnx(tower, example, opset):
        model = types.SimpleNamespace(metadata_props={})
        return types.SimpleNamespace(model=model, save=lambda path: path.write_bytes(file.read_bytes()))

    return to_onnx


def test_a_difference_is_refused_with_its_measure(tmp_path, monkeypatch, exported):
    monkeypatch.setattr(export_module, "to_onnx", given_file(exported[1] / "vision.onnx"))
    other = tiny_model(seed=1)
    tower = export_module._VisionTower(other)
    pictures = tower.example(other.config, 5)
    with torch.no_grad():
        cosine = (tower(pictures) * OnnxSiglip(exported[1]).encode_image(pictures)).sum(-1).min().item()
    assert cosine < 0.9
    with pytest.raises(ValueError, match=r"vision tower .* at least 0\.9999 is needed in float32") as raised:
        export_onnx(other, tmp_path / "out")
    measured = re.search(r"the lowest cosine is (\S+),", str(raised.value))
    assert float(measured[1]) == pytest.approx(cosine, abs=1e-5)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_embeddings_that_are_not_finite_are_refused(tmp_path, monkeypatch, exported, value):
    # ONNX Runtime gives infinite embeddings, not NaN, where a layer leaves the range of float16.
    monkeypatch.setattr(export_module, "to_onnx", given_file(exported[1] / "vision.onnx"))
    monkeypatch.setattr(export_module, "_run", lambda session, values: np.full((5, 32), value, np.float32))
    with pytest.raises(ValueError, match=r"the lowest cosine is nan, at least 0\.999 is needed in float16"):
        export_onnx(tiny_model(), tmp_path / "out", dtype=torch.float16)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_user_mistakes_are_named(exported, tmp_path):
    model, folder, _ = exported
    with pytest.raises(ValueError, match=r"dtype=torch\.bfloat16 cannot be exported"):
        export_onnx(model, tmp_path / "out", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="opset=17 cannot be exported; give one of 18 to 23"):
        export_onnx(model, tmp_path / "out", opset=17)
    with pytest.raises(ValueError, match="a SiglipTextModel cannot be exported"):
        export_onnx(model.text_model, tmp_path / "out")
    processor = types.SimpleNamespace(image_processor=SiglipImageProcessor(size={"height": 48, "width": 48}))
    with pytest.raises(ValueError, match=r"resizes pictures to .*48.*, but the model takes \[32, 32\]"):
        export_onnx(model, tmp_path / "out", processor=processor)
    with pytest.raises(ValueError, match="onnx is not empty"):
        export_onnx(model, folder)
    with pytest.raises(ValueError, match=r"has no vision\.onnx; make it with `siglip-hf export"):
        OnnxSiglip(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_naflex_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a NaFlex model cannot be exported"):
        export_onnx(siglip_hf.naflex_checkpoint(), tmp_path / "out")
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_damaged_export_is_one_clear_error(exported, tmp_path):
    folder = Path(shutil.copytree(exported[1], tmp_path / "onnx"))
    whole = (folder / "vision.onnx").read_bytes()
    (folder / "vision.onnx").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot load .*vision\.onnx: "):
        OnnxSiglip(folder)
    scale = json.dumps(exported[2].metadata["logit_scale"]).encode()
    for old, new, message in (
        (b"image_size", b"image_sizf", "lack image_size"),
        (b"[32, 32]", b"[32, 32 ", "damaged"),
        (scale, b'"' + scale[2:] + b'"', "damaged: logit_scale is no number"),
        (scale, b"NaN" + b" " * (len(scale) - 3), "damaged: logit_scale is no number"),
    ):
        assert old in whole
        (folder / "vision.onnx").write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match=message):
            OnnxSiglip(folder)


def test_the_extra_to_install_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="onnx, onnxscript, onnxruntime: pip install onnx"):
        export_onnx("any", tmp_path / "out")
    assert main(["export", "any", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("siglip-hf: this needs onnx, onnxscript, onnxruntime: pip install")


def test_the_snippets_of_the_page_run(checkpoint, exported, picture, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    # Those of other programs' packages are only read.
    snippets = re.findall(r"(?<!<!-- no-run -->\n)```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(siglip_hf, "default_checkpoint", lambda: str(checkpoint))
    Path("drawings").mkdir()
    picture.save("drawings/cat.png")
    # The page's first step is the fixture's; tracing it once more would tell nothing.
    monkeypatch.setattr(
        siglip_hf, "export_onnx", lambda model, output, **_: shutil.copytree(exported[1], output) and exported[2]
    )
    names: dict = {}
    for snippet in snippets:
        exec(snippet, names)
    table = page[page.index("| key") : page.index("## What is")]
    assert set(names["metadata"]) == set(re.findall(r"`(\w+)`", table))
    rows = names["classify"]("drawings/cat.png", candidate_labels=["a cat", "a dog"], hypothesis_template="{}")
    scores = {row["label"]: row["score"] for row in rows}
    assert names["probabilities"][0].tolist() == pytest.approx([scores["a cat"], scores["a dog"]], rel=1e-3)
