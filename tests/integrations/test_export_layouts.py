"""ONNX where other programs look for it: names of files, inputs and outputs, and embeddings held against PyTorch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, pipeline

import siglip_hf
from siglip_hf import SiglipModel, export_layout
from siglip_hf.cli.main import main
from siglip_hf.integrations import onnx_layouts
from siglip_hf.preprocessing.text_cleaning import canonicalize_text
from tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("export") / "checkpoint")


def session(file):
    found = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return found, [one.name for one in found.get_inputs()], [one.name for one in found.get_outputs()]


@pytest.fixture
def inputs(checkpoint):
    model = SiglipModel.from_pretrained(checkpoint).eval()
    pictures, ids = torch.randn(3, 3, 32, 32), torch.randint(2, 30, (2, 16))
    with torch.no_grad():
        return pictures, ids, model.encode_image(pictures), model.encode_text(ids), model(ids, pictures)


@pytest.mark.slow  # five exports
def test_transformers_js_finds_its_files_names_and_numbers(checkpoint, inputs, tmp_path):
    result = export_layout(checkpoint, tmp_path / "js", layout="transformers.js", precisions=["fp32", "q8"])
    assert set(result.cosines) == {
        f"onnx/{name}{suffix}.onnx" for name in ("model", "vision_model", "text_model") for suffix in ("", "_quantized")
    }
    assert min(value for name, value in result.cosines.items() if "quantized" not in name) > 0.99999
    pictures, ids, images, texts, joint = inputs
    run, names, outputs = session(tmp_path / "js/onnx/model.onnx")
    assert (names, outputs[:2]) == (["input_ids", "pixel_values"], ["logits_per_image", "logits_per_text"])
    logits, _, text_embeds, image_embeds = run.run(
        ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"],
        {"input_ids": ids.numpy(), "pixel_values": pictures.numpy()},
    )
    np.testing.assert_allclose(logits, joint.logits_per_image.detach(), atol=1e-3)
    np.testing.assert_allclose(text_embeds, texts, atol=1e-5)
    np.testing.assert_allclose(image_embeds, images, atol=1e-5)
    run, names, outputs = session(tmp_path / "js/onnx/vision_model.onnx")
    assert (names, outputs) == (["pixel_values"], ["last_hidden_state", "pooler_output"])
    sizes = {name: (tmp_path / "js/onnx" / name).stat().st_size for name in ("model.onnx", "model_quantized.onnx")}
    assert sizes["model_quantized.onnx"] < sizes["model.onnx"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "js" / name).is_file()


def test_immich_finds_its_files_names_and_numbers(checkpoint, inputs, tmp_path):
    export_layout(checkpoint, tmp_path / "immich", layout="immich")
    pictures, ids, images, texts, _ = inputs
    run, names, _ = session(tmp_path / "immich/visual/model.onnx")
    assert names == ["image"]
    np.testing.assert_allclose(run.run(None, {"image": pictures.numpy()})[0], images, atol=1e-5)
    run, names, _ = session(tmp_path / "immich/textual/model.onnx")
    assert names == ["text"]
    np.testing.assert_allclose(run.run(None, {"text": ids.int().numpy()})[0], texts, atol=1e-5)
    settings = json.loads((tmp_path / "immich/visual/preprocess_cfg.json").read_text())
    assert (settings["size"], settings["interpolation"], settings["mean"]) == ([32, 32], "bicubic", [0.5, 0.5, 0.5])

    # What immich does with a text: it cleans it, and pads with the token that the configuration names.
    length = json.loads((tmp_path / "immich/config.json").read_text())["text_cfg"]["context_length"]
    pad = json.loads((tmp_path / "immich/textual/tokenizer_config.json").read_text())["pad_token"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "immich/textual/tokenizer.json"))
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    ours = AutoTokenizer.from_pretrained(checkpoint)("A Cat, a dog!")["input_ids"]
    assert tokenizer.encode(canonicalize_text("A Cat, a dog!")).ids == ours


def test_a_file_that_is_not_pytorchs_is_refused_and_nothing_stays(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_layouts, "lowest_cosine", lambda *_: float("nan"))
    with pytest.raises(ValueError, match=r"model.onnx does not give PyTorch's embeddings: the lowest cosine is nan"):
        export_layout(checkpoint, tmp_path / "out", layout="immich")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "coreml"}, "layout='coreml' is unknown"),
        ({"layout": "transformers.js", "precisions": ["q2"]}, r"precision \['q2'\] is not for transformers.js"),
        ({"layout": "immich", "precisions": ["fp32", "q8"]}, "give of fp32, fp16, q8 one"),
    ],
)
def test_what_no_layout_has_is_refused(checkpoint, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_layout(checkpoint, tmp_path / "out", **options)


def test_the_command_refuses_what_does_not_go_together(checkpoint, tmp_path, capsys):
    line = ["export", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main([*line, "--layout", "immich", "--dtype", "float16"]) == 2
    assert "--precision fp16" in capsys.readouterr().err
    assert main([*line, "--precision", "q8"]) == 2
    assert "--precision goes with --layout" in capsys.readouterr().err


@pytest.mark.slow  # SIGLIP_NODE_MODULES=FOLDER with `npm install --ignore-scripts @huggingface/transformers` in it
def test_transformers_js_gives_the_order_of_python(tmp_path):
    modules = os.environ.get("SIGLIP_NODE_MODULES")
    if modules is None or shutil.which("node") is None:
        pytest.skip("node with @huggingface/transformers is needed: SIGLIP_NODE_MODULES=FOLDER")
    export_layout(
        siglip_hf.default_checkpoint(), tmp_path / "js", layout="transformers.js", precisions=["fp32", "fp16", "q8"]
    )
    pictures = Path(siglip_hf.__file__).parent / "apps" / "pictures"
    right = json.loads((pictures / "labels.json").read_text())
    labels = list(right.values())
    for name in right:  # on white, as the drawings are tried everywhere
        drawing = Image.open(pictures / name).convert("RGBA").resize((64, 64), Image.Resampling.BICUBIC)
        Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB").save(tmp_path / name)
    script = f"""
        import {{ createRequire }} from "node:module";
        const require = createRequire({json.dumps(modules + "/")});
        const {{ pipeline, env }} = require("@huggingface/transformers");
        env.allowRemoteModels = false; env.localModelPath = {json.dumps(str(tmp_path))};
        const found = {{}};
        for (const dtype of ["fp32", "fp16", "q8"]) {{
          const classify = await pipeline("zero-shot-image-classification", "js", {{ dtype }});
          found[dtype] = {{}};
          for (const name of {json.dumps(list(right))})
            found[dtype][name] = await classify({json.dumps(str(tmp_path))} + "/" + name, {json.dumps(labels)},
              {{ hypothesis_template: "This is a photo of {{}}." }});
        }}
        console.log(JSON.stringify(found));
    """
    (tmp_path / "run.mjs").write_text(script)
    done = subprocess.run(["node", str(tmp_path / "run.mjs")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # The checkpoint is stored in float16; the files are held against float32.
    classify = pipeline("zero-shot-image-classification", model=siglip_hf.default_checkpoint(), dtype=torch.float32)
    ours = {name: classify(str(tmp_path / name), candidate_labels=labels) for name in right}
    for name, rows in ours.items():
        assert [row["label"] for row in found["fp32"][name][:5]] == [row["label"] for row in rows[:5]], name
        assert found["fp32"][name][0]["score"] == pytest.approx(rows[0]["score"], abs=1e-3)
    hits = {dtype: sum(rows[name][0]["label"] == right[name] for name in right) for dtype, rows in found.items()}
    assert hits["fp16"] == hits["fp32"]
    assert abs(hits["q8"] - hits["fp32"]) <= 1
