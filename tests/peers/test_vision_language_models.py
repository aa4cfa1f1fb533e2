"""Vision-language models of transformers with our tower: the answers and the files of those with the stock tower."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText

import siglip_hf

from . import tiny, vision_language

NAMES = list(vision_language.configurations())
# Idefics3 and SmolVLM bring a vision tower of their own, a relative of SigLIP's; it stays theirs.
WITH_OUR_TOWER = [name for name in NAMES if name not in ("idefics3", "smolvlm")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models made, run and saved by stock transformers, in a process that does not import this package."""
    path = tmp_path_factory.mktemp("vision_language")
    tiny.run_without_siglip_hf("", vision_language.__file__, "make", path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    """The same models, loaded with this package."""
    models = {}
    for name in NAMES:
        model, info = AutoModelForImageTextToText.from_pretrained(folder / name, output_loading_info=True)
        assert not info["missing_keys"], name
        assert not info["unexpected_keys"], name
        models[name] = model
    return models


@pytest.mark.parametrize("name", NAMES)
def test_same_answers(name, folder, loaded):
    towers = [m for m in loaded[name].modules() if isinstance(m, siglip_hf.SiglipVisionModel)]
    assert len(towers) == (1 if name in WITH_OUR_TOWER else 0)
    if towers:
        assert towers[0].use_head == ("with head" in name)
    expected = torch.load(folder / name / "logits.pt")
    assert expected.std() > 0.01
    torch.testing.assert_close(vision_language.run(loaded[name], name), expected, rtol=1e-5, atol=1e-5)


def test_saved_models_load_in_stock_transformers(folder, loaded):
    for name, model in loaded.items():
        model.save_pretrained(folder / name / "again")
        before, after = (load_file(path / "model.safetensors") for path in (folder / name, folder / name / "again"))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            torch.testing.assert_close(after[key], tensor, rtol=0, atol=0)
    vision_language.check(folder)
    tiny.run_without_siglip_hf("", vision_language.__file__, "check", folder)


@pytest.mark.parametrize("name", WITH_OUR_TOWER)
def test_made_from_a_configuration(name):
    """A new model trains: its loss reaches the tower's first layer."""
    model = tiny.randomize(AutoModelForImageTextToText.from_config(vision_language.configurations()[name]))
    inputs = vision_language.inputs_for(name)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    (tower,) = (module for module in model.modules() if isinstance(module, siglip_hf.SiglipVisionModel))
    assert tower.embeddings.patch_embedding.weight.grad.abs().max() > 0


@torch.no_grad()
def test_layer_norm_and_head_for_a_model_of_ones_own(tmp_path):
    """What docs/vision_language_models.md says about layers, the post-norm and the head."""
    tiny.joint_model().save_pretrained(tmp_path)
    tower = siglip_hf.SiglipVisionModel.from_pretrained(tmp_path)
    output = tower(tiny.pictures(), output_hidden_states=True)
    torch.testing.assert_close(tower.post_layernorm(output.hidden_states[-1]), output.last_hidden_state)
    pooled, _ = tower.head(output.last_hidden_state)
    torch.testing.assert_close(pooled, output.pooler_output)
    # Without the head: its weights in the file are skipped.
    bare, info = AutoModel.from_pretrained(
        tmp_path, config=siglip_hf.SiglipVisionConfig(**tiny.VISION, vision_use_head=False), output_loading_info=True
    )
    assert isinstance(bare, siglip_hf.SiglipVisionModel)
    assert not info["missing_keys"]
    assert bare(tiny.pictures()).pooler_output is None
    torch.testing.assert_close(bare(tiny.pictures()).last_hidden_state, output.last_hidden_state)
