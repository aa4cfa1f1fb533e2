"""Hidden states and attentions by argument, by configuration and by from_pretrained; towers without a head."""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, pipeline

import siglip_hf

from . import families, tiny

WAYS = ["argument", "configuration", "from_pretrained", "argument over configuration"]


def load(folder, way: str, flag: str, model_class: type = AutoModel) -> tuple[torch.nn.Module, dict[str, bool]]:
    """The saved model, set to return `flag` in one of the ways, and the arguments for its forward."""
    if way == "from_pretrained":
        return model_class.from_pretrained(folder, **{flag: True}), {}
    model = model_class.from_pretrained(folder)
    if way == "configuration":
        if flag == "output_attentions":
            # transformers refuses this setting, with the reason, under an implementation without weights.
            with pytest.raises(ValueError, match="attn_implementation"):
                model.config.output_attentions = True
            model.set_attn_implementation("eager")
        setattr(model.config, flag, True)
        return model, {}
    if way == "argument over configuration":
        model = model_class.from_pretrained(folder, **{flag: False})
    return model, {flag: True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    tiny.joint_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_hidden_states_of_the_joint_model(checkpoint, way):
    model, kwargs = load(checkpoint, way, "output_hidden_states")
    output = model(**tiny.inputs(), **kwargs)
    for tower, name, batch in (("text_model", "text_model_output", 3), ("vision_model", "vision_model_output", 2)):
        states = output[name].hidden_states
        assert [tuple(state.shape) for state in states] == [(batch, 16, 64)] * 3
        norm = getattr(model, tower).get_submodule("final_layer_norm" if tower == "text_model" else "post_layernorm")
        # Documented: the last one is the last block's output, before the final norm.
        torch.testing.assert_close(norm(states[-1]), output[name].last_hidden_state, rtol=0, atol=1e-5)
    embedded = model.vision_model.embeddings(tiny.pictures())
    torch.testing.assert_close(output.vision_model_output.hidden_states[0], embedded, rtol=0, atol=1e-5)
    assert output.vision_model_output.attentions is None


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_attentions_of_the_joint_model(checkpoint, way):
    model, kwargs = load(checkpoint, way, "output_attentions")
    output = model(**tiny.inputs(), **kwargs)
    assert [tuple(w.shape) for w in output.text_model_output.attentions] == [(3, 4, 16, 16)] * 2
    assert [tuple(w.shape) for w in output.vision_model_output.attentions] == [(2, 4, 16, 16)] * 2
    assert output.text_model_output.hidden_states is None


@pytest.mark.parametrize("tower", [siglip_hf.SiglipTextModel, siglip_hf.SiglipVisionModel])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_towers(checkpoint, way, tower):
    inputs = tiny.texts() if tower is siglip_hf.SiglipTextModel else tiny.pictures()
    model, kwargs = load(checkpoint, way, "output_hidden_states", tower)
    states = model(inputs, **kwargs).hidden_states
    assert len(states) == 3
    assert (states[1] - states[2]).abs().max() > 0.1
    model, kwargs = load(checkpoint, way, "output_attentions", tower)
    assert len(model(inputs, **kwargs).attentions) == 2


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_classifier(tmp_path, way):
    tiny.classifier().save_pretrained(tmp_path)
    for flag, name in (("output_hidden_states", "hidden_states"), ("output_attentions", "attentions")):
        model, kwargs = load(tmp_path, way, flag, siglip_hf.SiglipForImageClassification)
        output = model(tiny.pictures(), **kwargs)
        assert len(output[name]) == (3 if name == "hidden_states" else 2)


@torch.no_grad()
def test_nothing_extra_by_default(checkpoint):
    output = AutoModel.from_pretrained(checkpoint)(**tiny.inputs())
    for tower in (output.text_model_output, output.vision_model_output):
        assert tower.hidden_states is None
        assert tower.attentions is None
    assert output.vision_model_output.cross_attentions is None


@torch.no_grad()
def test_tuples_instead_of_outputs(checkpoint):
    model = AutoModel.from_pretrained(checkpoint)
    expected = model(**tiny.inputs())
    output = model(**tiny.inputs(), return_dict=False)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], expected.logits_per_image, rtol=0, atol=1e-5)
    text = model.text_model(tiny.texts(), return_dict=False, output_hidden_states=True)
    torch.testing.assert_close(text[1], expected.text_model_output.pooler_output, rtol=0, atol=1e-5)
    assert len(text[2]) == 3


@torch.no_grad()
def test_a_model_without_pooling_head(tmp_path):
    """The joint model then gives what it can: image tokens and text embeddings; embeddings of images are refused."""
    model = tiny.joint_model(vision_config={"vision_use_head": False})
    output = model(**tiny.inputs(), output_hidden_states=True)
    assert output.logits_per_image is None
    assert output.image_embeds is None
    assert tuple(output.text_embeds.shape) == (3, 64)
    with_head = tiny.joint_model().vision_model
    assert not hasattr(model.vision_model, "head")
    with_head.load_state_dict(model.vision_model.state_dict(), strict=False)
    expected = with_head(tiny.pictures()).last_hidden_state
    torch.testing.assert_close(output.vision_model_output.last_hidden_state, expected, rtol=0, atol=1e-5)
    assert output.vision_model_output.pooler_output is None
    with pytest.raises(ValueError, match="no pooling head"):
        model.encode_image(tiny.pictures())
    with pytest.raises(ValueError, match="without pooling head"):
        model(input_ids=tiny.texts(2), pixel_values=tiny.pictures(2), return_loss=True)

    model.save_pretrained(tmp_path)
    reloaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(reloaded(**tiny.inputs()).text_embeds, output.text_embeds, rtol=0, atol=1e-5)


@torch.no_grad()
def test_image_feature_extraction(tmp_path):
    """The pipeline gives a tower's tokens or its pooled vector, and a joint model's embedding."""
    model = tiny.joint_model()
    processor = siglip_hf.SiglipImageProcessor(size={"height": 32, "width": 32})
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    pixels = processor(picture, return_tensors="pt").pixel_values
    expected = model.vision_model(pixels)
    model.save_pretrained(tmp_path / "joint")
    model.vision_model.save_pretrained(tmp_path / "vision")
    for folder in (tmp_path / "joint", tmp_path / "vision"):
        processor.save_pretrained(folder)
        tower = siglip_hf.SiglipVisionModel.from_pretrained(folder)
        extract = pipeline("image-feature-extraction", model=tower, image_processor=processor)
        tokens = torch.tensor(extract(picture))
        torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
        pooled = torch.tensor(extract(picture, pool=True))
        torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-5, atol=1e-5)
    extract = pipeline("image-feature-extraction", model=str(tmp_path / "vision"))
    assert isinstance(extract.model, siglip_hf.SiglipVisionModel)
    torch.testing.assert_close(torch.tensor(extract(picture)), expected.last_hidden_state, rtol=1e-2, atol=2e-2)
    extract = pipeline("image-feature-extraction", model=str(tmp_path / "joint"), image_processor=processor)
    assert isinstance(extract.model, siglip_hf.SiglipModel)
    torch.testing.assert_close(torch.tensor(extract(picture)), model.encode_image(pixels), rtol=1e-5, atol=1e-5)
    pooled = torch.tensor(extract(picture, pool=True))
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_image_feature_extraction_of_naflex(tmp_path):
    """The joint model's embedding, or its pooled vector."""
    model = families.make("Siglip2Model")
    model.save_pretrained(tmp_path)
    processor = siglip_hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    inputs = processor(picture, return_tensors="pt")
    extract = pipeline("image-feature-extraction", model=str(tmp_path), image_processor=processor)
    assert isinstance(extract.model, siglip_hf.Siglip2Model)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.tensor(extract(picture)), model.encode_image(**inputs), **close)
    pooled = torch.tensor(extract(picture, pool=True))
    torch.testing.assert_close(pooled, model.encode_image(**inputs, normalize=False), **close)


@pytest.mark.parametrize("name", ["SiglipModel", "Siglip2Model"])
@torch.no_grad()
def test_pooled_output_of_one_tower_alone(name):
    model, inputs = families.make(name), families.inputs_of(name)
    texts = {"input_ids": inputs.pop("input_ids")}
    pictures = inputs
    output = model(**pictures)
    assert torch.equal(output.pooler_output, output.vision_model_output.pooler_output)
    output = model(**texts)
    assert torch.equal(output.pooler_output, output.text_model_output.pooler_output)
    assert "pooler_output" not in model(**texts, **pictures)  # as in stock
