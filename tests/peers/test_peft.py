"""LoRA by PEFT: which layers get adapters, whether all of them learn, merging, files, and LoRA on 4-bit weights."""

import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, BitsAndBytesConfig, ViTConfig, ViTModel

import siglip_hf

from . import tiny

peft = pytest.importorskip("peft")


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": tiny.texts(2), "pixel_values": tiny.pictures(2), "return_loss": True}


def adapters(model: torch.nn.Module) -> set[str]:
    """Names of the adapted layers."""
    return set(model.base_model.targeted_module_names)


def assert_every_adapter_learns(model: torch.nn.Module, loss: torch.Tensor) -> None:
    """LoRA starts with B = 0, so that A has a gradient of zero; B's shows whether the layer is part of the graph."""
    loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    for name, parameter in trainable.items():
        assert parameter.grad is not None, name
        if "lora_A" not in name:
            assert parameter.grad.abs().max() > 0, name


def step(model: torch.nn.Module, **inputs) -> None:
    """One training step, so that the adapters make a difference."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


ENCODER_LINEARS = {name for name in tiny.linears(tiny.joint_model()) if ".layers." in name}


@pytest.mark.parametrize("target_modules", [None, "all-linear", ["q_proj", "v_proj"]])
def test_every_adapter_learns(target_modules):
    model = peft.get_peft_model(tiny.joint_model(), peft.LoraConfig(r=4, target_modules=target_modules))
    if target_modules is None:
        assert adapters(model) == {name for name in ENCODER_LINEARS if ".self_attn." in name}
    elif target_modules == "all-linear":
        assert adapters(model) == tiny.linears(tiny.joint_model())
        assert "vision_model.head.attention.out_proj" in adapters(model)
    else:
        assert "vision_model.head.attention.q_proj" in adapters(model)
    assert_every_adapter_learns(model, model(**batch()).loss)


@pytest.mark.parametrize("tower", [siglip_hf.SiglipTextModel, siglip_hf.SiglipVisionModel])
@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_towers(tower, target_modules):
    joint = tiny.joint_model()
    model, inputs = (
        (joint.text_model, tiny.texts())
        if tower is siglip_hf.SiglipTextModel
        else (joint.vision_model, tiny.pictures())
    )
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target_modules))
    assert len(adapters(adapted)) >= 8
    assert_every_adapter_learns(adapted, adapted(inputs).pooler_output.square().mean())


def test_classifier_with_default_targets():
    """Only layers that the classifier runs are adapted, and the new layer itself is trained and saved."""
    config = peft.LoraConfig(r=4, modules_to_save=["classifier"])
    model = peft.get_peft_model(tiny.classifier(), config)
    assert adapters(model) == {n for n in ENCODER_LINEARS if n.startswith("vision_model.") and ".self_attn." in n}
    assert model.base_model.model.classifier.modules_to_save["default"].weight.requires_grad
    assert_every_adapter_learns(model, model(pixel_values=tiny.pictures(), labels=torch.tensor([0, 2])).loss)


def test_classifier_with_all_linear_layers():
    """The pooling head, which a classifier keeps but does not run, is left out by name."""
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", exclude_modules=r".*\.head\..*", modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(tiny.classifier(), config)
    assert adapters(model) == {name for name in ENCODER_LINEARS if name.startswith("vision_model.")}
    assert_every_adapter_learns(model, model(pixel_values=tiny.pictures(), labels=torch.tensor([0, 2])).loss)


@pytest.mark.parametrize("names", [["logit_scale", "logit_bias"], ["vision_model.head", "logit_bias"]])
def test_parameters_cannot_be_modules_to_save(names, tmp_path):
    with pytest.raises(ValueError, match=r"logit_bias'\] of SiglipModel are parameters.*requires_grad_\(True\)"):
        siglip_hf.lora_config(tiny.joint_model(), modules_to_save=names)
    # What the message says to do, done.
    model = peft.get_peft_model(tiny.joint_model(), peft.LoraConfig(r=4))
    model.get_base_model().logit_scale.requires_grad_(True)
    before = model.get_base_model().logit_scale.item()
    step(model, **batch())
    after = model.get_base_model().logit_scale.item()
    assert after != before
    model.merge_and_unload().save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).logit_scale.item() == after


def test_modules_to_save_takes_modules():
    base = tiny.joint_model()
    model = peft.get_peft_model(base, siglip_hf.lora_config(base, r=4, modules_to_save=["vision_model.head"]))
    head = model.base_model.model.vision_model.head.modules_to_save["default"]
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert_every_adapter_learns(model, model(**batch()).loss)


def test_modules_to_save_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"modules_to_save=\['classifier'\]: SiglipModel has no module 'classifier'"):
        siglip_hf.lora_config(tiny.joint_model(), modules_to_save=["classifier"])


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}, {"target_modules": ["fc1"]}])
def test_lora_config_chooses_as_the_table_does(options):
    base = tiny.joint_model()
    ours = peft.get_peft_model(tiny.joint_model(), siglip_hf.lora_config(base, r=4, **options))
    plain = peft.get_peft_model(tiny.joint_model(), peft.LoraConfig(r=4, **options))
    assert adapters(ours) == adapters(plain) != set()
    assert ours.peft_config["default"].r == 4


def test_merge_and_unmerge(tmp_path):
    model = peft.get_peft_model(tiny.joint_model(), peft.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        plain = model(**tiny.inputs()).logits_per_image
    step(model, **batch())
    model.eval()
    with torch.no_grad():
        adapted = model(**tiny.inputs()).logits_per_image
        assert (adapted - plain).abs().max() > 1e-2
        model.merge_adapter()
        torch.testing.assert_close(model(**tiny.inputs()).logits_per_image, adapted, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(**tiny.inputs()).logits_per_image, adapted, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(model(**tiny.inputs()).logits_per_image, plain, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload()
    assert type(merged) is siglip_hf.SiglipModel
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        reloaded = AutoModel.from_pretrained(tmp_path)(**tiny.inputs()).logits_per_image
    torch.testing.assert_close(reloaded, adapted, rtol=1e-4, atol=1e-4)


def test_save_and_reload(tmp_path):
    tiny.joint_model().save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    step(model, **batch())
    model.eval()
    with torch.no_grad():
        expected = model(**tiny.inputs()).logits_per_image
    model.save_pretrained(tmp_path / "adapter")

    reloaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(reloaded.eval()(**tiny.inputs()).logits_per_image, expected, rtol=0, atol=1e-5)
    # By transformers' own integration: the adapter's folder as a model name.
    through_auto = AutoModel.from_pretrained(tmp_path / "adapter")
    assert isinstance(through_auto, siglip_hf.SiglipModel)
    with torch.no_grad():
        torch.testing.assert_close(through_auto(**tiny.inputs()).logits_per_image, expected, rtol=0, atol=1e-5)


def test_save_and_reload_a_classifier(tmp_path):
    tiny.joint_model().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, modules_to_save=["classifier"]))
    step(model, pixel_values=tiny.pictures(), labels=torch.tensor([0, 2]))
    model.eval()
    with torch.no_grad():
        expected = model(pixel_values=tiny.pictures()).logits
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=3)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(pixel_values=tiny.pictures()).logits, expected, rtol=0, atol=1e-5)


def test_lora_on_4_bit_weights(tmp_path):
    """QLoRA: all adapters on quantized layers get a gradient, a step lowers the loss, the quantized weights stay."""
    bnb = pytest.importorskip("bitsandbytes")
    tiny.joint_model().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModel.from_pretrained(tmp_path, quantization_config=quantization, device_map="auto")
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert adapters(model) == tiny.linears(tiny.joint_model())
    assert len(tiny.linears(model, bnb.nn.Linear4bit)) == len(adapters(model))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}

    model.train()
    first = model(**batch()).loss
    assert_every_adapter_learns(model, first)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    assert model(**batch()).loss < first
    for name, parameter in model.named_parameters():
        # bitsandbytes changes the dtype of biases when it uses them.
        if name in frozen and name.endswith("weight"):
            torch.testing.assert_close(parameter.data, frozen[name].data, rtol=0, atol=0)


def test_default_targets_in_any_order_of_imports():
    """The table is filled when this package is imported, or when a model is built if PEFT is imported later."""
    code = """
import os, transformers

for order in ("import peft, siglip_hf", "import siglip_hf, peft"):
    if child := os.fork():  # what takes seconds, torch and transformers, is imported once
        assert os.waitpid(child, 0)[1] == 0, order
        continue
    exec(order)
    from peft.tuners import tuners_utils
    from peft.utils import constants

    siglip_hf.SiglipVisionModel(siglip_hf.SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=2))
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert "self_attn.q_proj" in table["siglip2"] and table["bert"] == ["query", "value"]
    assert "siglip2" in constants.TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING
    assert tuners_utils.set_additional_trainable_modules.__module__.startswith("peft.")
    break
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_other_models_are_adapted_as_before():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTModel(ViTConfig(**shape, image_size=8, patch_size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(vit, peft.LoraConfig(target_modules="all-linear", modules_to_save=["cls_token"]))
    assert adapters(model) == tiny.linears(ViTModel(vit.config))
