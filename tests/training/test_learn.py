"""`siglip_hf.learn`: classifiers on frozen embeddings, the folder they are saved to, and the commands around it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, pipeline

import siglip_hf
from siglip_hf import Siglip2ForImageClassification, SiglipForImageClassification
from siglip_hf.cli.main import main
from siglip_hf.training.few_shot import ZERO_SHOT, class_means, fit_few_shot

CHECKPOINTS = {"siglip": siglip_hf.default_checkpoint, "naflex": siglip_hf.naflex_checkpoint}
SHAPES = ("cross", "fan", "ring", "stripes")


def draw(shape, number):
    """A black shape on white, its place and size by the number."""
    rng = np.random.default_rng(number)
    picture = Image.new("RGB", (64, 56), "white")
    pen = ImageDraw.Draw(picture)
    left, top = rng.integers(2, 14, 2).tolist()
    right, low = left + int(rng.integers(32, 44)), top + int(rng.integers(30, 38))
    if shape == "ring":
        pen.ellipse((left, top, right, low), outline="black", width=6)
    elif shape == "cross":
        pen.line((left, top, right, low), fill="black", width=6)
        pen.line((left, low, right, top), fill="black", width=6)
    elif shape == "fan":
        pen.pieslice((left, top, right, low), 20, 160, fill="red")
    else:
        for y in range(top, low, 8):
            pen.rectangle((left, y, right, y + 3), fill="blue")
    return picture


def write_classes(folder, each=5, shapes=SHAPES):
    for shape in shapes:
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            draw(shape, number).save(folder / shape / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("learn") / "classes")


@pytest.fixture(scope="module", params=CHECKPOINTS)
def learned(request, classes, tmp_path_factory):
    """(family, folder, what was learned)"""
    out = tmp_path_factory.mktemp(request.param) / "mine"
    return request.param, out, siglip_hf.learn(classes, out, model=CHECKPOINTS[request.param](), device="cpu")


def clusters(classes=6, each=12, noise=0.6, width=24):
    """Unit embeddings around a direction for each class, and texts that point there only roughly."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(classes, width))
    truth = np.repeat(np.arange(classes), each)
    unit = [
        values / np.linalg.norm(values, axis=1, keepdims=True)
        for values in (
            centres[truth] + noise * rng.normal(size=(len(truth), width)),
            centres + 3.0 * rng.normal(size=centres.shape),
        )
    ]
    return unit[0].astype(np.float32), truth, unit[1].astype(np.float32)


# --- Classifiers ---


def test_the_best_classifier_beats_the_texts_and_its_probabilities_hold():
    embeds, truth, texts = clusters(each=40, noise=1.1)
    known = np.arange(len(truth)) % 40 < 12
    found = fit_few_shot(embeds[known], truth[known], texts)
    accuracy = {one.name: one.accuracy for one in found.candidates}
    assert found.best.accuracy >= accuracy[ZERO_SHOT] + 0.3
    assert found.best.log_loss == min(one.log_loss for one in found.candidates)
    logits = torch.from_numpy(found.classifier.logits(embeds[~known]))
    sure, given = logits.softmax(1).max(1)
    reached = (given.numpy() == truth[~known]).mean()
    assert abs(reached - found.best.accuracy) < 0.1
    assert abs(sure.mean().item() - reached) < 0.1


def test_texts_that_are_right_are_made_use_of():
    embeds, truth, _ = clusters(each=2, noise=1.2)
    right = class_means(*clusters(each=200, noise=1.2)[:2])
    assert ZERO_SHOT in fit_few_shot(embeds, truth, right).best.name


def test_nearest_mean_is_the_nearest_mean_by_distance():
    embeds, truth, texts = clusters(noise=1.5)
    from siglip_hf.training.few_shot import _candidates

    classifier = dict(_candidates(embeds, truth, texts, "class means"))["class means"]
    means = np.stack([embeds[truth == number].mean(axis=0) for number in range(6)])
    distances = ((embeds[:, None] - means) ** 2).sum(-1)
    np.testing.assert_array_equal(classifier.logits(embeds).argmax(1), distances.argmin(1))


@pytest.mark.parametrize("number_of_classes", [2, 5])
def test_logistic_regression_is_scikit_learns(number_of_classes):
    from sklearn.linear_model import LogisticRegression

    from siglip_hf.training.few_shot import _logistic_regressions

    embeds, truth, _ = clusters(number_of_classes)
    scaled = (embeds - embeds.mean(0)) / np.sqrt(embeds.var(0).mean())
    expected = LogisticRegression(C=0.1, max_iter=300).fit(scaled, truth).predict_proba(scaled)
    logits = torch.from_numpy(next(_logistic_regressions(embeds, truth, [0.1])).logits(embeds))
    np.testing.assert_allclose(logits.softmax(1), expected, atol=1e-4)


def test_few_pictures_that_are_all_right_prove_no_certainty():
    embeds, truth, texts = clusters(3, each=4, noise=0.05)
    found = fit_few_shot(embeds, truth, texts)
    sure = torch.from_numpy(found.classifier.logits(embeds)).softmax(1).max(1).values
    assert found.best.accuracy == 1.0
    assert 0.8 < sure.mean() < 0.99


def test_pictures_of_classes_left_out_lie_farther_from_all_means():
    found = fit_few_shot(*clusters())
    assert np.quantile(found.nearest, 0.05) > np.quantile(found.nearest_other, 0.9)


# --- The folder ---


def test_learned_classes_are_told_apart_by_every_way_in(learned):
    family, folder, found = learned
    assert found.pictures == 20
    assert found.accuracy >= 0.9 >= found.zero_shot
    new = [draw(shape, number) for shape in SHAPES for number in range(100, 103)]
    truth = [shape for shape in SHAPES for _ in range(3)]

    head = siglip_hf.load_head(folder, device="cpu")
    results = head(new)
    best = [result["labels"][0] for result in results]
    assert [one["label"] for one in best] == truth
    assert all(abs(sum(one["probability"] for one in result["labels"]) - 1) < 1e-5 for result in results)

    direct = found.classifier(new)
    for one, other in zip(results, direct, strict=True):
        assert one["similarity"] == pytest.approx(other["similarity"], abs=2e-3)

    by_pipeline = pipeline("image-classification", model=str(folder), device="cpu")(new, top_k=1)
    kind = SiglipForImageClassification if family == "siglip" else Siglip2ForImageClassification
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = AutoImageProcessor.from_pretrained(folder)(new, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        logits = model(**inputs).logits
    assert [model.config.id2label[number] for number in logits.argmax(1).tolist()] == truth
    for one, (row,), probabilities in zip(best, by_pipeline, logits.float().softmax(1), strict=True):
        assert row["label"] == one["label"]
        assert row["score"] == pytest.approx(one["probability"], abs=5e-3)
        assert probabilities.max().item() == pytest.approx(one["probability"], abs=5e-3)


def test_the_tower_is_the_checkpoints_own(learned):
    family, folder, _ = learned
    original = siglip_hf.loading.load_model(CHECKPOINTS[family]()).vision_model.state_dict()
    saved = siglip_hf.loading.load_image_classifier(folder)[0].vision_model.state_dict()
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[name], saved[name]) for name in original)


def test_what_is_like_no_class_is_called_unknown(learned):
    _, folder, found = learned
    head = siglip_hf.load_head(folder, device="cpu")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert head(noise)[0]["unknown"]
    known = head([draw(shape, number) for shape in SHAPES for number in range(5)])
    assert np.mean([result["unknown"] for result in known]) <= found.unknown_rate + 0.05


def test_every_parameter_of_the_head_learns_further(learned):
    _, folder, _ = learned
    model, processor = siglip_hf.loading.load_image_classifier(folder)
    model.float().train()
    inputs = processor([draw("ring", 1), draw("fan", 2)], return_tensors="pt")
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_a_second_run_embeds_only_what_is_new(classes, tmp_path):
    import shutil

    folder = shutil.copytree(classes, tmp_path / "classes")
    siglip_hf.learn(folder, tmp_path / "mine", device="cpu", folds=2)
    for shape in SHAPES:
        draw(shape, 77).save(folder / shape / "new.png")
    done = []
    again = siglip_hf.learn(
        folder, tmp_path / "mine", folds=2, overwrite=True, on_progress=lambda *told: done.append(told)
    )
    assert max(total for what, _, total in done if what == "embedding pictures") == 4
    assert again.pictures == 24


def test_a_table_serves_as_well_as_folders(classes, tmp_path):
    rows = [{"file": str(path), "kind": path.parent.name} for path in sorted(classes.rglob("*.png"))]
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    found = siglip_hf.learn(table, label_column="kind", device="cpu", folds=2)
    assert (found.pictures, found.classifier.labels) == (20, sorted(SHAPES))


@pytest.mark.parametrize(
    ("shapes", "each", "named"),
    [(("ring",), 3, "one class only, 'ring'"), (("ring", "fan"), 1, "fewer than two pictures")],
)
def test_what_cannot_be_learned_is_said_before_any_work(tmp_path, shapes, each, named):
    with pytest.raises(ValueError, match=named):
        siglip_hf.learn(write_classes(tmp_path / "few", each, shapes), tmp_path / "mine")
    assert not (tmp_path / "mine.emb").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("learned_head", [1]), ("learned_head", {"unknown_below": "x"}), ("id2label", {"0": "a", "7": "b"})],
)
def test_a_damaged_configuration_is_named(learned, tmp_path, name, value):
    folder = Path(shutil.copytree(learned[1], tmp_path / "head"))
    config = json.loads((folder / "config.json").read_text())
    (config if name in config else config["vision_config"])[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"damaged|cannot load"):
        siglip_hf.load_head(folder)


def test_a_joint_checkpoint_is_no_head():
    with pytest.raises(ValueError, match=r"lack classifier.*siglip-hf learn"):
        siglip_hf.load_head(siglip_hf.default_checkpoint())


# --- The commands ---


def test_the_commands_learn_and_classify(classes, tmp_path, capsys):
    (tmp_path / "classes" / "ring").mkdir(parents=True)
    write_classes(tmp_path / "classes")
    (tmp_path / "classes" / "ring" / "broken.png").write_bytes(b"no picture")
    out, confusion = tmp_path / "mine", tmp_path / "confusion.png"
    line = ["learn", str(tmp_path / "classes"), "--out", str(out), "--confusion", str(confusion), "--folds", "2"]
    assert main(line) == 1
    told = capsys.readouterr()
    assert "20 pictures of 4 classes" in told.out
    assert "their names alone give" in told.out
    assert "skipped ring/broken.png" in told.err
    assert Image.open(confusion).width > 100

    new = tmp_path / "new.png"
    draw("fan", 500).save(new)
    assert main(["classify", str(new), "--head", str(out), "--json", "--device", "cpu"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["labels"][0]["label"] == "fan"
    assert set(entry) == {"source", "labels", "unknown", "similarity"}
    assert main(["classify", str(new), "--head", str(out), "--top", "2", "--device", "cpu"]) == 0
    assert "probability" in capsys.readouterr().out
    assert main(["classify", str(new), "--head", str(out), "--labels", "a, b"]) == 2
    assert "--labels and --head are both given" in capsys.readouterr().err
