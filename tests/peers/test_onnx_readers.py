"""Other libraries on what `export` writes: OpenVINO on the plain files, fastembed on the layout of transformers.js.

`make test-layouts` installs both into a folder of their own and runs this.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from siglip_hf import export_layout, export_onnx
from tiny_checkpoint import write_tiny_checkpoint

TEXTS = ["A Cat, a dog!", "two red circles above a green square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def ours(folder):
    """Pictures, pixels (B, 3, height, width), ids (C, L), and the unit embeddings of both, in float32."""
    model, processor = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    pictures = [Image.fromarray(one).resize((90, 70), Image.Resampling.BICUBIC) for one in noise]
    inputs = processor(images=pictures, text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        embeds = model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"])
    return pictures, inputs["pixel_values"].numpy(), inputs["input_ids"].numpy(), *(one.numpy() for one in embeds)


def lowest_cosine(found, expected):
    found = np.asarray(found, dtype=np.float64)
    return ((found * expected).sum(axis=1) / np.linalg.norm(found, axis=1)).min()


def test_openvino_converts_reads_and_runs_both_towers(tmp_path, folder, ours):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: make test-layouts")
    _, pixels, ids, images, texts = ours
    export_onnx(folder, tmp_path / "onnx")
    for tower, given, expected in (("vision", pixels, images), ("text", ids, texts)):
        converted = openvino.convert_model(tmp_path / "onnx" / f"{tower}.onnx")
        for half, least in ((False, 0.9999), (True, 0.999)):
            file = tmp_path / f"{tower}-{half}.xml"
            openvino.save_model(converted, file, compress_to_fp16=half)
            compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            assert lowest_cosine(compiled(given)[0], expected) > least


def test_fastembed_reads_the_layout_of_transformers_js(tmp_path, folder, ours):
    fastembed = pytest.importorskip("fastembed", reason="fastembed is not installed: make test-layouts")
    pictures, _, _, images, texts = ours
    export_layout(folder, tmp_path / "js", layout="transformers.js", precisions=["fp32"])
    where = {"specific_model_path": str(tmp_path / "js"), "local_files_only": True}
    name = "google/siglip2-base-patch16-224"  # says which files are read and how; the folder is ours
    found = list(fastembed.ImageEmbedding(name, **where).embed(pictures))
    assert lowest_cosine(found, images) > 0.9999
    found = list(fastembed.TextEmbedding(name, **where).embed(TEXTS))
    assert lowest_cosine(found, texts) > 0.9999
