"""mteb: our checkpoints in one of its tasks, over pictures that lie here. It needs no torchvision for that."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import siglip_hf
from siglip_hf.data.sources import open_source
from siglip_hf.evaluation import evaluate, with_truth
from siglip_hf.evaluation.mteb_model import mteb_model
from siglip_hf.inference.classify import read_truth_file
from siglip_hf.preprocessing.image_intake import load_picture

mteb = pytest.importorskip("mteb")
PICTURES = Path(__file__).parents[2] / "src" / "siglip_hf" / "apps" / "pictures"


@pytest.fixture(scope="module", params=[siglip_hf.default_checkpoint, siglip_hf.naflex_checkpoint])
def folder(request):
    return request.param()


@pytest.fixture(scope="module")
def wrapped(folder):
    return mteb_model(folder, device="cpu")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Zero-shot labels for a dozen drawings: a task as mteb's users write them, its data a folder of class folders."""
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    data = tmp_path_factory.mktemp("drawings")
    names = dict(list(read_truth_file(PICTURES / "labels.json").items())[:12])
    for file, name in names.items():
        (data / "test" / name).mkdir(parents=True)
        # Without transparency, for which mteb shows black.
        load_picture(PICTURES / file).save(data / "test" / name / file)

    class Drawings(AbsTaskZeroShotClassification):
        metadata = TaskMetadata(
            name="Drawings",
            description="Drawings of single things.",
            dataset={"path": str(data), "revision": "1"},
            type="ZeroShotClassification",
            category="i2t",
            modalities=["image", "text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
        )

        def get_candidate_labels(self):
            return [f"This is a photo of {name}." for name in sorted(names.values())]

    return Drawings(), names


def test_a_task_gives_the_numbers_of_evaluate(tmp_path, monkeypatch, wrapped, task):
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path))
    drawings, names = task
    result = mteb.evaluate(wrapped, drawings, cache=None, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    embedder = siglip_hf.SiglipEmbedder(wrapped.model_name, device="cpu", dtype="float32")
    source = with_truth(open_source([str(PICTURES / file) for file in names]), names)
    found = evaluate(embedder, source).zero_shot
    assert scores["accuracy"] == found.top(1)
    assert scores["recall"] == pytest.approx(found.mean_per_class)
    assert 1 / 12 < found.top(1) < 1
    assert result.model_name == f"siglip-hf/{Path(wrapped.model_name).name}"
    assert result.model_revision == embedder.model_sha256


@torch.no_grad()
def test_embeddings_are_those_of_the_plain_model(folder, wrapped):
    texts = ["a cat", "Two red circles above a green square", "house"]
    images = [Image.new("RGB", (80, 48), "red"), Image.new("L", (48, 80), 99)]
    model, processor = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)

    found = wrapped.get_text_embeddings([{"text": texts[:1]}, {"text": texts[1:]}], show_progress_bar=False)
    expected = model.encode_text(processor(text=texts, return_tensors="pt")["input_ids"], normalize=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    found = wrapped.get_image_embeddings([{"image": images[:1]}, {"image": images[1:]}], show_progress_bar=False)
    rgb = [image.convert("RGB") for image in images]
    expected = model.encode_image(**processor(images=rgb, return_tensors="pt"), normalize=False)
    # The pictures are resized by torch here and by Pillow there.
    cosines = torch.nn.functional.cosine_similarity(torch.as_tensor(found), expected)
    assert cosines.min() > 0.9999


def test_what_is_no_siglip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot load 'no/such-model'"):
        mteb_model("no/such-model", device="cpu")
