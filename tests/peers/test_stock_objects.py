"""Configurations and folders of other parts and of stock, the attributes of stock's modules, and odd inputs."""

import logging

import pytest
import torch
import transformers
from transformers.models.siglip import configuration_siglip as stock_configuration
from transformers.models.siglip import modeling_siglip as stock_siglip
from transformers.models.siglip2 import configuration_siglip2 as stock_configuration2
from transformers.models.siglip2 import modeling_siglip2 as stock_siglip2

import siglip_hf

from . import families


def stock_config_of(name):
    config = families.make(name).config
    module = stock_configuration2 if name.startswith("Siglip2") else stock_configuration
    stock = getattr(module, type(config).__name__).from_dict(config.to_dict())
    assert type(stock).__module__.startswith("transformers.")
    return stock


# Stock's objects


@pytest.mark.parametrize("name", families.CLASSES)
def test_stock_configurations_make_our_models(name, folder_of):
    stock, cls = stock_config_of(name), families.model_class(name)
    model = cls(stock)
    assert type(model.config) is cls.config_class
    assert model.config.to_dict() == families.make(name).config.to_dict()
    model.load_state_dict(families.make(name).state_dict())
    families.assert_same(families.outputs_of(model, name), families.outputs_of(families.make(name), name))
    loaded = cls.from_pretrained(folder_of(name), config=stock, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    families.assert_same_weights(loaded, families.make(name))


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
def test_stock_towers_in_our_joint_configuration(family):
    stock = stock_config_of(f"{family}Model")
    config_class = getattr(siglip_hf, f"{family}Config")
    config = config_class(text_config=stock.text_config, vision_config=stock.vision_config)
    for name, part in config_class.sub_configs.items():
        assert type(getattr(config, name)) is part


@pytest.mark.parametrize("name", families.CLASSES)
def test_modules_have_the_attributes_of_stocks(name):
    module = stock_siglip2 if name.startswith("Siglip2") else stock_siglip
    stock, ours = getattr(module, name)(stock_config_of(name)).eval(), families.make(name)
    modules = dict(ours.named_modules())
    for path, theirs in stock.named_modules():
        if path not in modules:  # the blocks of stock's containers
            continue
        for key, value in vars(theirs).items():
            if not key.startswith("_") and isinstance(value, (int, float, str, list, tuple)):
                if isinstance(theirs, torch.nn.MultiheadAttention) and not hasattr(modules[path], key):
                    continue
                assert getattr(modules[path], key) == value, f"{path}.{key}"


# Folders and configurations of another part


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
def test_a_classifier_of_a_vision_only_folder(family, folder_of):
    folder, name = folder_of(f"{family}VisionModel"), f"{family}ForImageClassification"
    by_class, info = families.model_class(name).from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert type(by_class.config) is getattr(siglip_hf, f"{family}VisionConfig")
    by_auto = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=3)
    families.assert_same_weights(by_class.vision_model, by_auto.vision_model)


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
@pytest.mark.parametrize(
    ("folder", "loaded"),
    [
        ("TextModel", "VisionModel"),
        ("TextModel", "Model"),
        ("TextModel", "ForImageClassification"),
        ("VisionModel", "TextModel"),
        ("VisionModel", "Model"),
    ],
)
def test_a_folder_of_another_part_is_refused(family, folder, loaded, folder_of):
    cls = families.model_class(f"{family}{loaded}")
    with pytest.raises(ValueError, match=rf"{family}{loaded} takes a .*{family}{folder.replace('Model', 'Config')}"):
        cls.from_pretrained(folder_of(f"{family}{folder}"))


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
@pytest.mark.parametrize("part", ["TextModel", "VisionModel"])
def test_a_tower_of_a_joint_folder(family, part, folder_of):
    tower, info = families.model_class(f"{family}{part}").from_pretrained(
        folder_of(f"{family}Model"), output_loading_info=True
    )
    assert not info["missing_keys"]
    joint = families.make(f"{family}Model")
    families.assert_same_weights(tower, joint.text_model if part == "TextModel" else joint.vision_model)


def test_configurations_of_the_other_family_are_refused():
    with pytest.raises(ValueError, match="SiglipVisionModel takes a SiglipVisionConfig"):
        siglip_hf.SiglipModel(families.make("Siglip2Model").config)
    with pytest.raises(ValueError, match="Siglip2Model takes a Siglip2Config"):
        siglip_hf.Siglip2Model(families.make("SiglipModel").config)


@pytest.mark.parametrize("name", families.CLASSES)
def test_a_configuration_that_asks_for_checkpointing(name):
    config = families.make(name).config
    for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
        if part is not None:
            part.gradient_checkpointing = True
    model = families.model_class(name)(config)
    assert model.is_gradient_checkpointing
    encoders = [module for module in model.modules() if type(module).__name__ == "SiglipEncoderLayer"]
    assert all(layer.gradient_checkpointing for layer in encoders)


# Labels


@pytest.mark.parametrize("name", [name for name in families.CLASSES if "Classification" in name])
def test_a_column_of_class_numbers_is_single_label(name):
    model, inputs = families.make(name), families.inputs_of(name)
    labels = torch.tensor([2, 0])
    for refused in (torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1, 2]), torch.ones(2, 2, dtype=torch.long)):
        with pytest.raises((ValueError, RuntimeError)):
            model(**inputs, labels=refused)
        assert model.config.problem_type is None
    column = model(**inputs, labels=labels[:, None]).loss
    assert model.config.problem_type == "single_label_classification"
    assert torch.equal(column, model(**inputs, labels=labels).loss)


# Empty batches


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", families.CLASSES)
@torch.no_grad()
def test_an_empty_batch_gives_an_empty_result(name, packed):
    model, whole = families.make(name), families.outputs_of(families.make(name), name)
    inputs = {key: value[:0] for key, value in families.inputs_of(name).items()}
    options = {"packed": packed} if name in families.WITH_HEAD and name.startswith("Siglip2") else {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        output = model(**inputs, **options, return_dict=True)
        for key in whole:
            assert output[key].shape[0] == 0
            if not key.startswith("logits_") and key != "last_hidden_state":
                assert output[key].shape[1:] == whole[key].shape[1:]
    if name.endswith(("SiglipModel", "Siglip2Model")):
        assert model.encode_text(inputs.pop("input_ids")).shape == (0, 64)
        assert model.encode_image(**inputs).shape == (0, 64)


# Traces


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", families.CLASSES)
def test_a_trace_does_not_depend_on_the_gradient_mode(name):
    model, inputs = families.make(name), families.inputs_of(name)
    model.config.return_dict = False
    with_gradients = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
    with torch.no_grad():
        without = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
        expected = model(**inputs)[0]
        for traced in (with_gradients, without):
            torch.testing.assert_close(traced(**inputs)[0], expected, atol=1e-5, rtol=0)


# Pictures that patches do not fill


def test_a_rest_of_pixels_is_cut_off_with_one_warning(caplog, monkeypatch):
    transformers.utils.logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("siglip_hf"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    stock, ours = (
        stock_siglip.SiglipVisionModel(stock_config_of("SiglipVisionModel")),
        families.make("SiglipVisionModel"),
    )
    pixels = torch.randn(2, 3, 33, 35, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, again = ours(pixels).pooler_output, ours(pixels).pooler_output
        assert torch.equal(first, ours(pixels[..., :32, :32]).pooler_output)
        assert torch.equal(first, again)
        stock.embeddings.load_state_dict(ours.embeddings.state_dict())
        torch.testing.assert_close(ours.embeddings(pixels), stock.embeddings(pixels))
    assert [record for record in caplog.records if "33x35" in record.getMessage()] == caplog.records
    assert len(caplog.records) == 1


# Pipelines


@pytest.mark.parametrize("name", ["SiglipForImageClassification", "SiglipVisionModel", "Siglip2TextModel"])
def test_zero_shot_needs_a_joint_model(name):
    with pytest.raises(ValueError, match=f"{name} has no two towers"):
        transformers.pipeline(
            "zero-shot-image-classification",
            model=families.make(name),
            tokenizer=siglip_hf.default_checkpoint(),
            image_processor=siglip_hf.default_checkpoint(),
        )
