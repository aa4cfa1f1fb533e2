"""The recipe: what is read for training, fast towers, stages that go on, the teacher's geometry, calibration."""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from drawings.sources import write_json
from drawings.teacher import whitened
from recipe import run as recipe_run
from recipe import stages
from recipe.canvas import to_patches
from recipe.naflex_start import start_from
from recipe.pictures import Augmenter, PictureSet, largest_around, read_pictures, read_styles
from recipe.run import Progress, Run, for_training, ten_way
from recipe.start import read_data
from siglip_hf import SiglipConfig, SiglipModel

SIDE = 8
CODES = [f"{number:x}" for number in range(200)]


def concept(code: str, split: str, group: str = "objects") -> dict:
    captions = {"en": {"label": code, "tags": []}}
    return {"code": code, "label": code, "split": split, "group": group, "aliases": [], "captions": captions}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """200 emoji in two hands, the first also restyled, and 30 icons of their own; every tenth emoji is held out."""
    folder = tmp_path_factory.mktemp("data")
    pixels = np.zeros((len(CODES), 4, SIDE, SIDE), np.uint8)
    pixels[:, 0] = np.arange(len(CODES), dtype=np.uint8)[:, None, None]
    icons = [f"icon:{code}" for code in CODES[:30]]
    for name, codes in (("noto", CODES), ("noto.restyled", CODES), ("fxemoji", CODES), ("ph", icons)):
        np.save(folder / f"{name}.npy", pixels[: len(codes)])
        write_json(folder / f"{name}.json", codes)
    write_json(
        folder / "concepts.json",
        [concept(code, "held_out" if number % 10 == 0 else "train") for number, code in enumerate(CODES)],
    )
    write_json(folder / "icon_concepts.json", [concept(code, "train", "icons") for code in icons])
    styles = [
        {"name": "noto", "use": "train", "restyled": len(CODES)},
        {"name": "fxemoji", "use": "evaluate"},
        {"name": "ph", "use": "train"},
    ]
    write_json(folder / "manifest.json", {"styles": styles})
    return folder


def options(data: Path, run: Path) -> argparse.Namespace:
    return argparse.Namespace(data=data, run=run, device="cpu")


def test_training_reads_neither_held_out_styles_nor_held_out_concepts_nor_the_probe(data, tmp_path):
    assert read_styles(data, "train") == ["noto", "noto.restyled", "ph"]
    read = read_data(options(data, tmp_path))
    splits = [concept["split"] for concept in read.concepts]
    assert {splits[number] for number in read.train.concept.tolist()} == {"train"}
    assert {splits[number] for number in read.validation.concept.tolist()} == {"train"}
    assert {splits[number] for number in read.probe.concept.tolist()} == {"probe"}
    assert len(read.validation) > 0
    assert len(read.probe) > 0


def test_nothing_restyled_from_a_validation_picture_is_trained_on(data, tmp_path):
    read = read_data(options(data, tmp_path))
    noto = read_pictures(data, ["noto"], read.concepts)
    kept_back = noto[0].concept[noto[1]].tolist()
    assert kept_back
    assert not set(kept_back) & set(read.train.concept.tolist())
    # Here a concept has two training pictures, its own and the restyled one.
    emoji = read.train.concept[read.train.concept < len(CODES)]
    assert set(torch.bincount(emoji).tolist()) <= {0, 2}


def test_a_run_keeps_its_concepts_and_leaves_out_pictures_of_later_ones(data, tmp_path):
    before = read_data(options(data, tmp_path))
    write_json(tmp_path / "concepts.json", before.concepts[:100])
    after = read_data(options(data, tmp_path))
    assert len(after.concepts) == 100
    assert 0 < len(after.train) < len(before.train)
    assert int(after.train.concept.max()) < 100


def test_pixels_stay_in_their_files_and_are_the_right_ones(data, tmp_path):
    read = read_data(options(data, tmp_path))
    chosen = torch.tensor([5, 3, 90])
    pixels = read.train.pixels[chosen]
    assert pixels.shape == (3, 4, SIDE, SIDE)
    names = [read.concepts[number]["code"].removeprefix("icon:") for number in read.train.concept[chosen].tolist()]
    assert [CODES.index(name) for name in names] == pixels[:, 0, 0, 0].tolist()
    assert torch.equal(read.train.select(torch.arange(len(read.train)) == 3).pixels[:1][0], pixels[1])


def test_rare_concepts_are_drawn_more_often_per_picture():
    generator = torch.Generator().manual_seed(0)
    concepts = torch.tensor([0] * 9 + [1])
    weight = torch.bincount(concepts)[concepts] ** -0.5
    pictures = PictureSet(torch.zeros(10, 4, 2, 2, dtype=torch.uint8), concepts, concepts > 5, weight)
    share = (pictures.draw(4000, generator) == 9).float().mean().item()
    assert 0.21 < share < 0.29  # 1 against 9 / 3


def test_largest_around_is_the_pool_of_nine():
    values = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest_around(values), torch.nn.functional.max_pool2d(values, 3, stride=1, padding=1))


def test_black_icons_get_inks_and_drawings_keep_their_alpha():
    pixels = torch.zeros(64, 4, 12, 12, dtype=torch.uint8)
    pixels[:, 3, 3:9, 3:9] = 255
    augment = Augmenter(12, torch.Generator().manual_seed(0))
    inked = augment._ink(pixels.float() / 255, strength=1.0)
    assert torch.equal(inked[:, 3], pixels[:, 3].float() / 255)
    coloured = (inked[:, :3, 5, 5] > 0.05).any(1)
    assert 0.3 < coloured.float().mean().item() < 0.9
    assert torch.equal(augment._ink(pixels.float() / 255, strength=0.0), pixels.float() / 255)


def tiny_model() -> SiglipModel:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = shape | {"vocab_size": 50, "max_position_embeddings": 8, "projection_size": 32}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=shape | {"image_size": 32, "patch_size": 8}))


def test_fast_towers_give_the_same_embeddings_and_gradients():
    torch.manual_seed(0)
    model = tiny_model().train()
    fast = for_training(copy.deepcopy(model))
    pixels = torch.randn(3, 3, 32, 32)
    embeds = [one.encode_image(pixels) for one in (model, fast)]
    torch.testing.assert_close(embeds[1], embeds[0], atol=1e-5, rtol=0)
    for one in embeds:
        one[:, 0].sum().backward()
    wanted = dict(model.vision_model.named_parameters())
    for name, parameter in fast.vision_model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-3)


def test_fast_naflex_tower_gives_the_same_embeddings():
    torch.manual_seed(0)
    model = start_from(tiny_model()).eval()
    fast = for_training(copy.deepcopy(model))
    canvases = to_patches(torch.randn(2, 3, 16, 32), 8)
    with torch.no_grad():
        wanted = model.encode_image(**canvases, packed=False)
        torch.testing.assert_close(fast.encode_image(**canvases, packed=False), wanted, atol=1e-5, rtol=0)
        ids = torch.tensor([[3, 4, 1] + [0] * 13])
        torch.testing.assert_close(fast.encode_text(ids), model.encode_text(ids), atol=1e-5, rtol=0)


@pytest.fixture
def bare_run(tmp_path) -> Run:
    model = SimpleNamespace(logit_scale=torch.zeros(()))
    return Run(model, [], *[None] * 5, folder=tmp_path, every=0.0)  # type: ignore[arg-type]


def test_a_stage_stops_with_its_budget_and_goes_on_from_its_state(bare_run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(recipe_run, "clock", lambda device: now[0])

    def steps(budget: float, stop_after: int | None = None) -> list[float]:
        layer = torch.nn.Linear(1, 1)
        generator = torch.Generator().manual_seed(0)
        seen = []
        for progress, took in Progress(bare_run, "stage", budget, {"layer": layer}, (generator,)).steps(4):
            with torch.no_grad():
                layer.weight.fill_(len(seen) + 1.0)
            seen.append(progress)
            took(torch.ones(()))
            now[0] += 1.0
            if stop_after == len(seen):
                break
        final.append(layer.weight.item())
        drawn.append(torch.rand((), generator=generator).item())
        return seen

    final: list[float] = []
    drawn: list[float] = []
    assert steps(10.0, stop_after=4) == [0.0, 0.1, 0.2, 0.3]
    # The state after three whole steps is on disk; the budget may have changed.
    assert steps(6.0) == [0.5, pytest.approx(4 / 6), pytest.approx(5 / 6)]
    assert steps(6.0) == []
    assert final[2] == 3.0  # what the last step left
    assert drawn[1] != drawn[0]


def test_ten_way_is_chance_for_noise_and_one_for_the_truth():
    torch.manual_seed(0)
    classes = torch.nn.functional.normalize(torch.randn(40, 64), dim=1)
    concepts = torch.arange(5, 40)
    assert ten_way(classes[concepts], classes, concepts) == 1.0
    assert ten_way(torch.randn(35, 64), classes, concepts, draws=200) == pytest.approx(0.1, abs=0.06)
    assert math.isnan(ten_way(torch.zeros(0, 64), classes, concepts[:0]))


def test_whitening_makes_alike_vectors_tell_apart():
    generator = np.random.default_rng(0)
    vectors = 5 + generator.normal(size=(300, 16)) * np.linspace(0.2, 1, 16)
    white = whitened(vectors, shrinkage=0.01)
    np.testing.assert_allclose(np.linalg.norm(white, axis=1), 1, atol=1e-6)
    cosines = white @ white.T
    assert abs(cosines[np.triu_indices(300, 1)].mean()) < 0.02
    spread = white.std(0)
    assert spread.min() > 0.5 * spread.max()


def test_meanings_bring_a_word_that_was_never_drawn_to_its_neighbour(bare_run):
    bare_run.model = tiny_model()
    bare_run.concepts = [concept(name, "train") for name in "abcd"]
    bare_run.captions = SimpleNamespace(belongs=torch.eye(4).bool())
    meanings = np.eye(4)
    meanings[3] = [0.9, 0, 0, math.sqrt(1 - 0.81)]  # d is nearly a
    stages.place_concepts(bare_run, meanings)
    assert bare_run.table is not None
    cosines = bare_run.table @ bare_run.table.T
    assert cosines[3, 0] == pytest.approx(0.45, abs=0.05)  # half of the cosine is the captions'
    assert cosines[3, 1].abs() < 0.05


def test_calibration_puts_half_where_the_odds_are_even(bare_run, monkeypatch):
    """Labels are axes, so that a picture's embedding is the list of its cosines."""
    count = 200
    generator = torch.Generator().manual_seed(0)
    own = torch.arange(count)
    cosines = 0.2 + 0.1 * torch.randn(2, count, count, generator=generator)
    cosines[:, own, own] = 0.6 + 0.1 * torch.randn(2, count, generator=generator)
    bare_run.model = tiny_model()
    bare_run.concepts = [concept(str(number), "train") for number in range(count)]
    bare_run.validation = SimpleNamespace(concept=own)
    monkeypatch.setattr(stages, "embed_texts", lambda run, labels: torch.eye(len(labels)))
    stages.calibrate(bare_run, *cosines)
    scale, bias = bare_run.model.logit_scale.exp().item(), bare_run.model.logit_bias.item()
    # Two normal distributions of one width: even odds half way, a slope of distance / variance.
    assert -bias / scale == pytest.approx(0.4, abs=0.015)
    assert scale == pytest.approx(40, rel=0.2)
