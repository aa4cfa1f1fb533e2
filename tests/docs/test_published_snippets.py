"""The published snippets of SigLIP and SigLIP 2, word for word after `import siglip_hf`, on the embedded checkpoints.

Replaced are only what the network would give: the name of the checkpoint (its folder) and the picture (a fixture); and
`device=0`, which needs a GPU. The SigLIP page's labels are those that the fixture shows.
"""

import io
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import siglip_hf

PICTURE = Path(__file__).parents[2] / "src" / "siglip_hf" / "apps" / "pictures" / "cat.png"

PIPELINE = """
import torch
from transformers import pipeline

image = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg"
candidate_labels = ["a cat", "a rocket", "a pizza"]

pipeline = pipeline(task="zero-shot-image-classification", model="google/siglip-base-patch16-224", device="cpu", dtype=torch.bfloat16)
result = pipeline(image, candidate_labels=candidate_labels)
"""

AUTO_MODEL = """
import torch
import requests
from PIL import Image
from transformers import AutoProcessor, AutoModel

model = AutoModel.from_pretrained("google/siglip-base-patch16-224", dtype=torch.float16, device_map="auto", attn_implementation="sdpa")
processor = AutoProcessor.from_pretrained("google/siglip-base-patch16-224")

url = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg"
image = Image.open(requests.get(url, stream=True).raw)
candidate_labels = ["a cat", "a rocket", "a pizza"]
texts = [f'This is a photo of {label}.' for label in candidate_labels]
inputs = processor(text=texts, images=image, padding="max_length", return_tensors="pt").to(model.device)

with torch.no_grad():
    outputs = model(**inputs)

logits_per_image = outputs.logits_per_image
probs = torch.sigmoid(logits_per_image)
print(f"{probs[0][0]:.1%} that image 0 is '{candidate_labels[0]}'")
"""

# transformers' page of SigLIP 2. PADDING there is the second of NAFLEX_PADDINGS; the first is that of its snippet for a
# fixed resolution.
NAFLEX = """
import torch
import requests
from PIL import Image
from transformers import AutoProcessor, AutoModel

model = AutoModel.from_pretrained("google/siglip2-base-patch16-naflex", dtype=torch.float16, device_map="auto", attn_implementation="sdpa")
processor = AutoProcessor.from_pretrained("google/siglip2-base-patch16-naflex")

url = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg"
image = Image.open(requests.get(url, stream=True).raw)
candidate_labels = ["a Pallas cat", "a lion", "a Siberian tiger"]
texts = [f'This is a photo of {label}.' for label in candidate_labels]

# default value for `max_num_patches` is 256, but you can increase resulted image resolution providing higher values e.g. `max_num_patches=512`
inputs = processor(text=texts, images=image, PADDING, return_tensors="pt").to(model.device)

with torch.no_grad():
    outputs = model(**inputs)

logits_per_image = outputs.logits_per_image
probs = torch.sigmoid(logits_per_image)
print(f"{probs[0][0]:.1%} that image 0 is '{candidate_labels[0]}'")
"""
NAFLEX_PADDINGS = ('padding="max_length", max_length=64', 'padding="max_length", max_num_patches=256')

# The checkpoint's card. It names the picture `url` and then says `image`, which no package can mend.
NAFLEX_CARD_PIPELINE = """
from transformers import pipeline

# load pipeline
ckpt = "google/siglip2-base-patch16-naflex"
image_classifier = pipeline(model=ckpt, task="zero-shot-image-classification")

# load image and candidate labels
image = "http://images.cocodataset.org/val2017/000000039769.jpg"
candidate_labels = ["2 cats", "a plane", "a remote"]

# run inference
outputs = image_classifier(image, candidate_labels)
print(outputs)
"""
# In transformers 5 the features are an object, and the card's last line, `print(image_embeddings.shape)`, fails with any
# checkpoint (see docs/troubleshooting.md).
NAFLEX_CARD_FEATURES = """
import torch
from transformers import AutoModel, AutoProcessor
from transformers.image_utils import load_image

# load the model and processor
ckpt = "google/siglip2-base-patch16-naflex"
model = AutoModel.from_pretrained(ckpt, device_map="auto").eval()
processor = AutoProcessor.from_pretrained(ckpt)

# load the image
image = load_image("https://huggingface.co/datasets/merve/coco/resolve/main/val2017/000000000285.jpg")
inputs = processor(images=[image], return_tensors="pt").to(model.device)

# run infernece
with torch.no_grad():
    image_embeddings = model.get_image_features(**inputs)
"""


@pytest.fixture
def run(monkeypatch):
    """Runs a snippet and returns its variables."""
    requests = types.ModuleType("requests")
    requests.get = lambda url, stream: types.SimpleNamespace(raw=io.BytesIO(PICTURE.read_bytes()))
    monkeypatch.setitem(sys.modules, "requests", requests)

    def execute(snippet: str) -> dict:
        code = snippet.replace("google/siglip-base-patch16-224", siglip_hf.default_checkpoint())
        code = code.replace("google/siglip2-base-patch16-naflex", siglip_hf.naflex_checkpoint())
        if "requests" not in code:
            code = re.sub(r"https?://[^\"]+", str(PICTURE), code)
        variables: dict = {}
        exec(compile(code, "snippet", "exec"), variables)
        return variables

    return execute


def test_pipeline_snippet(run):
    result = run(PIPELINE)["result"]
    assert [set(entry) for entry in result] == [{"score", "label"}] * 3
    scores = [entry["score"] for entry in result]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert result[0]["label"] == "a cat"


def test_auto_model_snippet(run, capsys):
    variables = run(AUTO_MODEL)
    assert type(variables["model"]).__module__ == "siglip_hf.models.modeling_siglip"
    assert type(variables["processor"]).__module__ == "siglip_hf.preprocessing.processing_siglip"
    assert set(variables["inputs"]) == {"input_ids", "pixel_values"}
    probs = variables["probs"]
    assert probs.shape == (1, 3)
    assert probs[0].argmax() == 0
    assert capsys.readouterr().out.endswith("that image 0 is 'a cat'\n")


@pytest.mark.parametrize("padding", NAFLEX_PADDINGS)
def test_naflex_snippet(run, padding, capsys):
    variables = run(NAFLEX.replace("PADDING", padding))
    assert type(variables["model"]).__module__ == "siglip_hf.models.modeling_siglip2"
    assert type(variables["processor"]).__module__ == "siglip_hf.preprocessing.processing_siglip2"
    inputs = variables["inputs"]
    assert set(inputs) == {"input_ids", "pixel_values", "pixel_attention_mask", "spatial_shapes"}
    assert inputs["input_ids"].shape == (3, 64)
    assert inputs["spatial_shapes"].tolist() == ([[16, 16]] if "256" in padding else [[8, 8]])
    model, processor = variables["model"].float(), variables["processor"]
    with torch.no_grad():
        texts = model.encode_text(processor(text=variables["texts"], return_tensors="pt")["input_ids"])
        images = model.encode_image([variables["image"]], max_num_patches=inputs["pixel_values"].shape[1])
        expected = torch.sigmoid(images @ texts.T * model.logit_scale.exp() + model.logit_bias)
    torch.testing.assert_close(variables["probs"].float(), expected, atol=5e-3, rtol=0.05)
    assert capsys.readouterr().out == f"{variables['probs'][0][0]:.1%} that image 0 is 'a Pallas cat'\n"


def test_naflex_card_pipeline(run, capsys):
    outputs = run(NAFLEX_CARD_PIPELINE)["outputs"]
    assert {entry["label"] for entry in outputs} == {"2 cats", "a plane", "a remote"}
    assert outputs[0]["label"] == "2 cats"  # the fixture shows one
    assert [entry["score"] for entry in outputs] == sorted((entry["score"] for entry in outputs), reverse=True)
    assert capsys.readouterr().out == f"{outputs}\n"


def test_naflex_card_features(run):
    variables = run(NAFLEX_CARD_FEATURES)
    model = variables["model"]
    features = variables["image_embeddings"].pooler_output
    assert features.shape == (1, model.config.text_config.projection_size)
    with torch.no_grad():
        unit = model.encode_image([variables["image"]])
    torch.testing.assert_close(
        features / features.norm(dim=-1, keepdim=True), unit, atol=1e-3, rtol=0
    )  # float16, as saved


def test_both_snippets_give_the_same_scores(run):
    by_pipeline = {entry["label"]: entry["score"] for entry in run(PIPELINE)["result"]}
    variables = run(AUTO_MODEL)
    for label, probability in zip(variables["candidate_labels"], variables["probs"][0].tolist(), strict=True):
        assert by_pipeline[label] == pytest.approx(probability, abs=0.02)  # bfloat16 against float16


def test_get_features_and_encode(run):
    """`get_*_features` follow the installed transformers; `encode_*` are tensors in every version."""
    variables = run(AUTO_MODEL)
    model, inputs = variables["model"], variables["inputs"]
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        image, text = model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"])
        torch.testing.assert_close(image, features / features.norm(dim=-1, keepdim=True))
        logits = image @ text.T * model.logit_scale.exp() + model.logit_bias
    torch.testing.assert_close(logits, variables["logits_per_image"], atol=0.05, rtol=0)
