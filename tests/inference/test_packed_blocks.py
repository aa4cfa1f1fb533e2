"""A packed model stays a model: whoever asks it for more than embeddings gets it, from plain blocks."""

import copy
import pickle
import platform
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import siglip_hf
import tiny
from siglip_hf.inference.optimize import optimization

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64"),
    reason="packed weights are for x86 CPUs",
)


@pytest.fixture
def model():
    return tiny.shaken(siglip_hf.SiglipModel(tiny.tiny_config()))


@torch.no_grad()
def embed(model):
    inputs = tiny.tiny_inputs()
    return model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"])


ASKS = {
    "gradients of the input": lambda model: (
        model.vision_model(pixels(model).requires_grad_()).pooler_output.sum().backward()
    ),
    "gradients of a weight": lambda model: (
        model.requires_grad_(True),
        model.vision_model(pixels(model)).pooler_output.sum().backward(),
    ),
    "attention weights": lambda model: model.vision_model(pixels(model), output_attentions=True).attentions[0].shape,
    "a state dict": lambda model: model.state_dict(),
    "a weight": lambda model: model.vision_model.encoder.layers[0].mlp.fc1.weight.shape,
    "parameters": lambda model: list(model.parameters()),
    "float64": lambda model: model.double(),
    "other weights": lambda model: model.load_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ),
    "a hook": lambda model: (
        model.vision_model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *args: None),
        embed(model),
    ),
    "another part": lambda model: (
        setattr(model.vision_model.encoder.layers[0], "mlp", torch.nn.Identity()),
        embed(model),
    ),
    "dropout": lambda model: (set_dropout(model, 0.5), embed(model.train())),
    "autocast": lambda model: torch.autocast("cpu", dtype=torch.bfloat16)(embed)(model),
    "a file": lambda model: pickle.dumps(model),
    "parameters of a layer": lambda model: dict(model.vision_model.encoder.layers[0].self_attn.q_proj._parameters),
}


def pixels(model):
    return tiny.tiny_inputs()["pixel_values"].to(model.dtype)


def set_dropout(model, share):
    for block in model.vision_model.encoder.layers:
        block.self_attn.dropout = share


def pairs():
    return {name: value[:2] for name, value in tiny.tiny_inputs().items()}


def packed_blocks(model):
    return [block.packed is not None for block in model.vision_model.encoder.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ask", ASKS)
def test_who_asks_for_more_gets_the_plain_block(model, ask, dtype):
    model.to(dtype)
    plain = copy.deepcopy(model)
    siglip_hf.optimize(model, dtype)
    assert packed_blocks(model) == [True, True]
    with torch.inference_mode(not ask.startswith(("gradients", "float64"))):
        ASKS[ask](model)
    assert not packed_blocks(model)[0]
    if ask == "another part":
        return
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours.to(theirs.dtype), theirs), name
        assert not ours.is_inference()


@pytest.mark.parametrize("ask", ["gradients of the input", "attention weights", "a state dict", "a weight", "float64"])
def test_int8_has_no_weights_to_give(model, ask):
    siglip_hf.optimize(model, torch.float32, int8=True)
    with pytest.raises(ValueError, match="int8 no longer has its weights"):
        ASKS[ask](model)


def test_a_restored_model_trains_saves_and_packs_again(model, tmp_path):
    inputs, plain = pairs(), copy.deepcopy(model)
    siglip_hf.optimize(model, torch.float32)
    model.requires_grad_(True)
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(**inputs, return_loss=True).loss.backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    want = embed(model)
    siglip_hf.optimize(model, torch.float32)
    assert model.optimization.packed_blocks == 3
    assert packed_blocks(model) == [True, True]
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(embed(siglip_hf.SiglipModel.from_pretrained(tmp_path)), want, atol=1e-6, rtol=0)


def test_a_held_weight_stays_the_same_object_and_counts(model):
    weight = model.vision_model.encoder.layers[0].mlp.fc1.weight
    siglip_hf.optimize(model, torch.float32)
    before = embed(model)[0]
    assert packed_blocks(model) == [True, True]
    with torch.no_grad():
        weight.mul_(-1)
    assert (embed(model)[0] - before).abs().max() > 1e-3
    assert packed_blocks(model) == [False, True]
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight is weight


def test_an_adapter_on_a_packed_model_is_at_work(model):
    peft = pytest.importorskip("peft")
    siglip_hf.optimize(model, torch.float32)
    before = embed(model)[0]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert packed_blocks(model) == [False, False]
    assert (embed(adapted.base_model.model)[0] - before).abs().max() > 1e-4


def test_what_the_pipeline_packs_keeps_dtype_threads_and_gradients(model):
    want, threads = embed(model), torch.get_num_threads()
    assert optimization.pack(model)
    assert model.optimization.packed_blocks == 3
    assert torch.get_num_threads() == threads
    torch.testing.assert_close(embed(model), want, atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not optimization.pack(model)  # once taken back it stays so


@pytest.mark.parametrize("why", ["an optimizer", "a gradient", "a weight of float64", "optimized"])
def test_what_is_in_use_is_not_packed(model, why):
    held = []
    if why == "an optimizer":
        held.append(torch.optim.SGD(model.parameters(), lr=0.1))
    elif why == "a gradient":
        model(**pairs(), return_loss=True).loss.backward()
    elif why == "optimized":
        model.optimization = optimization.Optimization("float32", 1)
    else:
        model.double()
    assert not optimization.pack(model)
    assert packed_blocks(model) == [False, False]


def test_a_copy_computes_the_same(model):
    siglip_hf.optimize(model, torch.float32)
    copied = copy.deepcopy(model)
    assert torch.equal(embed(copied)[0], embed(model)[0])
    state = copied.state_dict()
    assert packed_blocks(copied) == [False, False]
    assert packed_blocks(model) == [True, True]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_threads_compute_while_another_takes_the_weights_back(model):
    want, meet = embed(model), threading.Barrier(5, timeout=60)
    siglip_hf.optimize(model, torch.float32)

    def work(number):
        meet.wait()
        return [embed(model) for _ in range(10)] if number else model.state_dict()

    with ThreadPoolExecutor(5) as pool:
        _, *embeds = pool.map(work, range(5))
    assert packed_blocks(model) == [False, False]
    for got in (pair for each in embeds for pair in each):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
