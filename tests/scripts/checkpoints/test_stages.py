"""Each stage of both trainings takes a step, from the options to the exported folder, on a handful of drawings."""

from __future__ import annotations

import pytest
import torch

from recipe import naflex_stages, stages
from recipe.captions import Captions
from recipe.naflex_start import SHORT_LENGTH, start_from
from recipe.naflex_vocabulary import Encoder, gemma_tokenizer
from recipe.pictures import PictureSet
from recipe.run import Run, for_training
from siglip_hf import SiglipConfig, SiglipModel

NAMES = ("cat", "dog", "key", "house", "tree", "fish", "star", "moon", "sun", "boat", "car", "bus")


@pytest.fixture
def run(tmp_path) -> Run:
    concepts = [
        {
            "label": name,
            "split": "train",
            "group": "objects",
            "aliases": [],
            "captions": {language: {"label": name, "tags": ["thing"]} for language in ("en", "de", "ko")},
        }
        for name in NAMES
    ]
    captions = Captions(concepts)
    gemma_tokenizer([text.words for text in captions.texts] * 3, 290).save(str(tmp_path / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 4, 24, 24), generator=generator, dtype=torch.uint8)
    drawings = PictureSet(pixels, torch.arange(12), torch.ones(12, dtype=torch.bool), torch.ones(12))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = shape | {"vocab_size": 300, "max_position_embeddings": SHORT_LENGTH, "projection_size": 32}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=shape | {"image_size": 32, "patch_size": 8}))
    encoder = Encoder(tmp_path / "tokenizer.json", SHORT_LENGTH)
    return Run(model, concepts, captions, encoder, drawings, drawings, drawings, tmp_path)  # type: ignore[arg-type]


def curve(run: Run) -> list[str]:
    return [line.split('"')[3] for line in (run.folder / "learning_curve.jsonl").read_text().splitlines()]


def test_square_stages_take_a_step_each(run):
    before = {name: value.clone() for name, value in for_training(run.model).state_dict().items()}
    stages.place_concepts(run, None, steps=2)
    for stage in (stages.words, stages.pictures, stages.locked, stages.joint):
        stage(run, 1e-6)
    stages.calibrate(run, stages.embed_pictures(run, run.validation))
    assert curve(run) == ["table", "words", "pictures", "locked", "joint", "calibrate"]
    after = run.model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"vision_model", "text_model", "logit_scale", "logit_bias"}


def test_naflex_stages_take_a_step_each(run):
    run.model = for_training(start_from(run.model))
    run.table = torch.nn.functional.normalize(torch.randn(len(NAMES), 32), dim=1)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    for stage in (stages.words, naflex_stages.canvases, naflex_stages.joint):
        stage(run, 1e-6)
    grids = naflex_stages.VALIDATION_GRIDS.values()
    stages.calibrate(run, *(naflex_stages.embed_canvases(run, run.validation, grid) for grid in grids))
    assert curve(run) == ["words", "canvases", "joint", "calibrate"]
    after = run.model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"vision_model", "text_model", "logit_scale", "logit_bias"}
