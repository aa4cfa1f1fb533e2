"""The image classifier: problem types, label formats, no labels, checkpoints it starts from, its pipeline."""

import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoModelForImageClassification, pipeline

import siglip_hf

from . import tiny


def loss_of(labels: torch.Tensor, problem_type: str | None = None, num_labels: int = 3) -> tuple:
    """Loss and logits of a classifier, and its gradient with respect to the classifier's bias."""
    model = tiny.classifier(num_labels=num_labels)
    model.config.problem_type = problem_type
    output = model(tiny.pictures(), labels=labels)
    output.loss.backward()
    return output.loss, output.logits, model.classifier.bias.grad


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_one_label_each(problem_type):
    labels = torch.tensor([2, 0])
    loss, logits, gradient = loss_of(labels, problem_type)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, labels))
    expected = (logits.softmax(-1) - functional.one_hot(labels, 3)).mean(0)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_several_labels_each(problem_type, dtype):
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=dtype)
    loss, logits, gradient = loss_of(labels, problem_type)
    torch.testing.assert_close(loss, functional.binary_cross_entropy_with_logits(logits, labels.float()))
    torch.testing.assert_close(gradient, (logits.sigmoid() - labels.float()).mean(0) / 3)


@pytest.mark.parametrize(("problem_type", "num_labels"), [(None, 1), ("regression", 1), ("regression", 3)])
def test_regression(problem_type, num_labels):
    labels = torch.tensor([0.5, -1.0]) if num_labels == 1 else torch.tensor([[0.5, 1, 2], [-1.0, 0, 3]])
    loss, logits, _ = loss_of(labels, problem_type, num_labels)
    torch.testing.assert_close(loss, functional.mse_loss(logits.squeeze(-1), labels))


def test_half_precision_multi_hot():
    model = tiny.classifier().to(torch.bfloat16)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    output = model(tiny.pictures(), labels=labels)
    expected = functional.binary_cross_entropy_with_logits(output.logits.float(), labels.float())
    torch.testing.assert_close(output.loss.float(), expected, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_without_labels_the_features_come_out(tmp_path):
    model = tiny.classifier(num_labels=0)
    assert isinstance(model.classifier, torch.nn.Identity)
    features = model.vision_model(tiny.pictures()).last_hidden_state.mean(1)
    torch.testing.assert_close(model(tiny.pictures()).logits, features)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(tiny.pictures()).logits, features)


@pytest.mark.parametrize("kind", ["joint", "vision"])
@torch.no_grad()
def test_starts_from_any_checkpoint(kind, tmp_path):
    """A vision-only checkpoint does as well as a joint one, and what comes of it is saved and loaded again."""
    joint = tiny.joint_model()
    (joint if kind == "joint" else joint.vision_model).save_pretrained(tmp_path / "base")
    model, info = AutoModelForImageClassification.from_pretrained(
        tmp_path / "base",
        id2label={0: "cat", 1: "dog", 2: "fish"},
        label2id={"cat": 0, "dog": 1, "fish": 2},
        output_loading_info=True,
    )
    assert isinstance(model, siglip_hf.SiglipForImageClassification)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    tokens = joint.vision_model(tiny.pictures()).last_hidden_state
    expected = model.classifier(tokens.mean(1))
    torch.testing.assert_close(model(tiny.pictures()).logits, expected)
    assert model.classifier.weight.std() > 0.05

    model.save_pretrained(tmp_path / "tuned")
    reloaded, info = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert reloaded.config.id2label == {0: "cat", 1: "dog", 2: "fish"}
    torch.testing.assert_close(reloaded(tiny.pictures()).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["joint", "vision"])
@torch.no_grad()
def test_pipeline(kind, tmp_path):
    config = tiny.joint_config(id2label={0: "cat", 1: "dog", 2: "fish"})
    if kind == "vision":
        config = siglip_hf.SiglipVisionConfig(**tiny.VISION, id2label={0: "cat", 1: "dog", 2: "fish"})
    model = tiny.randomize(siglip_hf.SiglipForImageClassification(config))
    processor = siglip_hf.SiglipImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), image_processor=processor)
    assert isinstance(classify.model, siglip_hf.SiglipForImageClassification)
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    result = classify(picture, top_k=3, function_to_apply="softmax")
    scores = model(processor(picture, return_tensors="pt").pixel_values).logits[0].softmax(-1)
    expected = sorted(zip(scores.tolist(), ("cat", "dog", "fish"), strict=True), reverse=True)
    assert [entry["label"] for entry in result] == [label for _, label in expected]
    assert [entry["score"] for entry in result] == pytest.approx([score for score, _ in expected], abs=1e-5)


def test_every_trainable_parameter_gets_a_gradient():
    """Those of the unused pooling head are frozen, so that distributed training does not wait for them."""
    model = tiny.classifier()
    model(tiny.pictures(), labels=torch.tensor([0, 1])).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {f"vision_model.head.{name}" for name, _ in model.vision_model.head.named_parameters()}
    assert not any(model.get_parameter(name).requires_grad for name in without)
