"""`siglip_hf.optimize`: the same embeddings as the plain model, and what it does where it cannot help."""

import copy
import platform
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers.activations

import siglip_hf
import tiny
import tiny_siglip2
from siglip_hf.inference.optimize import onednn, optimization, packed
from siglip_hf.inference.optimize.packed import PackedBlock, is_packable

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64"),
    reason="packed weights are for x86 CPUs",
)


@pytest.fixture
def model():
    return tiny.shaken(siglip_hf.SiglipModel(tiny.tiny_config()))


@pytest.fixture
def threads():
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@torch.no_grad()
def embed(model):
    inputs = tiny.tiny_inputs()
    return model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"])


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu", "relu", "quick_gelu"])
def test_float32_equals_the_plain_model(activation):
    config = tiny.tiny_config()
    config.text_config.hidden_act = config.vision_config.hidden_act = activation
    model = tiny.shaken(siglip_hf.SiglipModel(config))
    want = embed(model)
    assert siglip_hf.optimize(model, torch.float32) is model
    assert model.optimization.packed_blocks == 3  # both of the vision tower, the first of the text tower
    for ours, plain in zip(embed(model), want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


def test_bfloat16_points_where_float32_does(model):
    want = embed(model)
    siglip_hf.optimize(model, torch.bfloat16)
    assert model.optimization.dtype == "bfloat16"
    assert model.optimization.packed_blocks == 3
    for ours, plain in zip(embed(model), want, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.cosine_similarity(ours.float(), plain).min() >= 0.9998


def test_long_sequences_are_attended_in_parts(model, monkeypatch):
    monkeypatch.setattr(
        "siglip_hf.inference.optimize.packed._SCORES_AT_A_TIME", 16**2 * 5
    )  # 5 of 3 x 4 heads at a time
    want = embed(model)
    siglip_hf.optimize(model, torch.bfloat16)
    assert torch.cosine_similarity(embed(model)[0].float(), want[0]).min() >= 0.9998


@pytest.fixture
def rows(monkeypatch):
    """How many pictures or texts each call of a block took."""
    forward, seen = PackedBlock._forward, []
    monkeypatch.setattr(
        PackedBlock,
        "_forward",
        lambda self, states, *args: seen.append(len(states)) or forward(self, states, *args),
    )
    return seen


@pytest.mark.parametrize(("at_a_time", "parts"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (4, [3, 2]), (5, [5])])
def test_large_batches_go_through_a_block_in_parts(model, monkeypatch, rows, at_a_time, parts):
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = model.config.vision_config
    tokens = config.patch_grid[0] * config.patch_grid[1]
    with torch.no_grad():
        want = model.encode_image(pixels)
        siglip_hf.optimize(model, torch.float32)
        rows.clear()
        monkeypatch.setattr(packed, "_STATES_AT_A_TIME", at_a_time * tokens * config.intermediate_size * 4)
        got = model.encode_image(pixels)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert rows == parts * config.num_hidden_layers


@pytest.mark.parametrize("masked", [True, False])
def test_texts_in_parts_take_their_masks_along(model, monkeypatch, rows, masked):
    ids = tiny.tiny_inputs()["input_ids"].repeat(3, 1)[:5]
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[3], [16], [5], [9], [2]])).long() if masked else None
    kept = torch.ones_like(ids).bool() if mask is None else mask.bool()
    with torch.no_grad():
        want = model.text_model(ids, attention_mask=mask).last_hidden_state
        siglip_hf.optimize(model, torch.float32)
        rows.clear()
        monkeypatch.setattr(packed, "_STATES_AT_A_TIME", 1)
        got = model.text_model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[kept], want[kept], atol=1e-5, rtol=1e-5)
    assert rows == [1] * 5  # the last block is the plain one


def test_hidden_states_and_logits_equal_the_plain_model(model):
    inputs = tiny.tiny_inputs()
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True)
        got = siglip_hf.optimize(model, torch.float32)(**inputs, output_hidden_states=True)
    torch.testing.assert_close(got.logits_per_image, want.logits_per_image, atol=1e-4, rtol=0)
    for tower in ("vision_model_output", "text_model_output"):
        for ours, plain in zip(got[tower].hidden_states, want[tower].hidden_states, strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_attention_mask_of_texts(model):
    input_ids = tiny.tiny_inputs()["input_ids"]
    mask = torch.ones_like(input_ids)
    mask[0, 9:] = 0
    with torch.no_grad():
        want = model.text_model(input_ids, attention_mask=mask).last_hidden_state
        siglip_hf.optimize(model, torch.float32)
        got = model.text_model(input_ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_naflex_with_padding_equals_the_plain_model(attn_implementation):
    model = tiny.shaken(siglip_hf.Siglip2Model(tiny_siglip2.tiny_config()))
    model.set_attn_implementation(attn_implementation)
    inputs = tiny_siglip2.tiny_pictures()
    with torch.no_grad():
        want = model.encode_image(**inputs, packed=False)
        siglip_hf.optimize(model, torch.float32)
        assert model.optimization.packed_blocks > 0
        torch.testing.assert_close(model.encode_image(**inputs, packed=False), want, atol=1e-5, rtol=0)
        if attn_implementation == "sdpa":
            torch.testing.assert_close(model.encode_image(**inputs, packed=True), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["SiglipVisionModel", "SiglipTextModel", "SiglipForImageClassification"])
def test_towers_and_classifier(name):
    config = tiny.tiny_config(num_labels=3)
    config = {"SiglipVisionModel": config.vision_config, "SiglipTextModel": config.text_config}.get(name, config)
    model = tiny.shaken(getattr(siglip_hf, name)(config))
    inputs = tiny.tiny_inputs()[model.main_input_name]
    with torch.no_grad():
        want = model(inputs)
        got = siglip_hf.optimize(model, torch.float32)(inputs)
    assert model.optimization.packed_blocks > 0
    for key in want:
        torch.testing.assert_close(got[key], want[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_near_and_says_so(model, monkeypatch, dtype):
    want = embed(model)
    siglip_hf.optimize(model, dtype, int8=True)
    assert model.optimization.packed_blocks == 3
    assert model.optimization.cosine >= 0.99
    assert any("int8" in note for note in model.optimization.notes)
    for ours, plain in zip(embed(model), want, strict=True):
        assert torch.cosine_similarity(ours.float(), plain).min() >= 0.99
        assert not torch.allclose(ours.float(), plain, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-9.0, -0.5, 0.0, 9.0])
def test_states_are_quantized_to_half_a_step(monkeypatch, dtype, shift):
    monkeypatch.setattr(packed, "_QUANTIZED_AT_A_TIME", 50)  # not a divisor of 7 x 33
    states = (torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) + shift).to(dtype)
    quantized, scale, zero = packed._quantize(states)
    assert (quantized.dtype, quantized.shape) == (torch.uint8, states.shape)
    error = ((quantized.float() - zero) * scale - states.float()).abs().max()
    assert 0.25 * scale < error <= 0.501 * scale
    least, largest = min(states.min().item(), 0), max(states.max().item(), 0)
    assert scale == pytest.approx((largest - least) / 254)


def test_zeros_are_quantized():
    quantized, scale, zero = packed._quantize(torch.zeros(3, 4))
    assert torch.equal((quantized.float() - zero) * scale, torch.zeros(3, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_int8_cannot_hold_is_an_error(model, bad):
    siglip_hf.optimize(model, torch.float32, int8=True)
    with pytest.raises(ValueError, match=r"NaN or infinity.*pixel_values"):
        model.encode_image(tiny.tiny_inputs()["pixel_values"].fill_(bad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu_pytorch_tanh", "gelu", "relu"])
def test_int8_linear_is_the_product_of_quantized_numbers(dtype, activation):
    torch.manual_seed(0)
    layer, states, residual = (
        torch.nn.Linear(40, 24),
        torch.randn(5, 7, 40).to(dtype),
        torch.randn(5, 24, 7).to(dtype).mT,
    )
    ours = packed.Int8Linear(layer, dtype=dtype, activation=activation)
    quantized, scale, zero = packed._quantize(states)
    steps = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    weight = (layer.weight.detach() / steps).round() * steps
    product = (quantized.double() - zero) * scale @ weight.double().T + layer.bias.detach().double()
    rounding = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    if activation is None:
        torch.testing.assert_close(ours.add_to(residual, states).double(), residual.double() + product, **rounding)
    else:
        product = transformers.activations.ACT2FN[activation](product)
    torch.testing.assert_close(ours(states).double(), product, **rounding)


# The choice of dtype and threads


@pytest.mark.parametrize("has_instructions", [True, False])
def test_dtype_follows_the_hardware(model, monkeypatch, has_instructions):
    monkeypatch.setattr(optimization, "multiplies_bfloat16", lambda: has_instructions)
    monkeypatch.setattr(optimization, "LEAST_COSINE", 0.999)  # random weights are not what bfloat16 suits best
    siglip_hf.optimize(model)
    assert model.optimization.dtype == ("bfloat16" if has_instructions else "float32")
    assert embed(model)[0].dtype == getattr(torch, model.optimization.dtype)
    assert any("instructions" in note for note in model.optimization.notes)


def test_float16_is_refused_with_a_warning(model, monkeypatch):
    warnings = []
    monkeypatch.setattr(optimization.logger, "warning", warnings.append)
    monkeypatch.setattr(optimization, "multiplies_bfloat16", lambda: False)
    siglip_hf.optimize(model, torch.float16)
    assert model.optimization.dtype == "float32"
    assert "float16" in warnings[0]
    assert any("float16" in note for note in model.optimization.notes)


def test_unknown_dtype_is_an_error(model):
    with pytest.raises(ValueError, match="int8"):
        siglip_hf.optimize(model, torch.int8)


def test_no_more_threads_than_cores(model, monkeypatch, threads):
    monkeypatch.setattr(optimization, "usable_cores", lambda: 1)
    torch.set_num_threads(2)
    siglip_hf.optimize(model, torch.float32)
    assert torch.get_num_threads() == model.optimization.threads == 1
    monkeypatch.setattr(optimization, "usable_cores", lambda: 64)
    siglip_hf.optimize(tiny.shaken(siglip_hf.SiglipModel(tiny.tiny_config())), torch.float32)
    assert torch.get_num_threads() == 1  # what was set on purpose is not raised


# The guard


def test_a_model_whose_embeddings_change_is_put_back(model, monkeypatch):
    want = embed(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward = PackedBlock.__call__
    monkeypatch.setattr(PackedBlock, "__call__", lambda self, states, *a, **k: -forward(self, states, *a, **k))
    monkeypatch.setattr(optimization, "multiplies_bfloat16", lambda: True)
    siglip_hf.optimize(model)
    assert model.optimization.packed_blocks == 0
    assert model.optimization.cosine is None
    assert [note[:6] for note in model.optimization.notes[-3:]] == ["not in", "not in", "left a"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    for ours, plain in zip(embed(model), want, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_are_never_two_copies_of_the_weights(model, monkeypatch, dtype):
    model.to(dtype)
    weights = [weakref.ref(block.mlp.fc1.weight) for block in model.vision_model.encoder.layers]
    probe, alive = optimization._embed_probe, []
    monkeypatch.setattr(
        optimization,
        "_embed_probe",
        lambda model: alive.append([weight() is not None for weight in weights]) or probe(model),
    )
    siglip_hf.optimize(model, dtype)
    assert alive == [[True, True], [False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_can_be_undone_to_the_bit(model, monkeypatch, dtype):
    model.to(dtype)
    model.vision_model.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    monkeypatch.setattr(optimization, "LEAST_COSINE", 1.1)
    monkeypatch.setattr(optimization, "LARGEST_DIFFERENCE", -1.0)
    siglip_hf.optimize(model, dtype)
    assert model.optimization.packed_blocks == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == len(state)  # savers drop tensors that share storage


def test_bfloat16_falls_back_to_float32(model, monkeypatch):
    want = embed(model)
    monkeypatch.setattr(optimization, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(optimization, "LEAST_COSINE", 1.1)
    siglip_hf.optimize(model)
    assert model.optimization.dtype == "float32"
    assert model.optimization.packed_blocks == 3
    torch.testing.assert_close(embed(model)[0], want[0], atol=1e-5, rtol=0)


def test_a_product_that_oneDNN_refuses_leaves_the_plain_model(model, monkeypatch):
    want, state = embed(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made, pack = [], PackedBlock.__init__

    def refuse_the_second(self, block, int8):
        made.append(block)
        if len(made) == 2:
            raise RuntimeError("could not create a primitive\nmore")
        pack(self, block, int8)

    monkeypatch.setattr(PackedBlock, "__init__", refuse_the_second)
    siglip_hf.optimize(model, torch.float32)
    assert model.optimization.packed_blocks == 0
    assert "not in float32: could not create a primitive" in model.optimization.notes
    assert {name: torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()} == dict.fromkeys(
        state, True
    )
    for ours, plain in zip(embed(model), want, strict=True):
        assert torch.equal(ours, plain)


@pytest.fixture
def fresh_self_test():
    onednn.why_not.cache_clear()
    yield
    onednn.why_not.cache_clear()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("missing", ["mkldnn", "onednn"])
def test_operators_that_torch_no_longer_has_leave_the_plain_model(model, monkeypatch, fresh_self_test, missing, int8):
    want = embed(model)
    monkeypatch.setattr(torch.ops, missing, types.SimpleNamespace())
    siglip_hf.optimize(model, torch.float32, int8=int8)
    needed = "onednn" if int8 else "mkldnn"
    assert model.optimization.packed_blocks == (0 if missing == needed else 3)
    assert any("do not work here (AttributeError" in note for note in model.optimization.notes) == (missing == needed)
    if missing == needed:
        assert model.optimization.notes[-1].startswith("left as it is")
        for ours, plain in zip(embed(model), want, strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_that_give_other_numbers_are_noticed(model, monkeypatch, fresh_self_test, dtype):
    assert onednn.why_not(dtype) is None
    assert onednn.why_not(dtype, int8=True) is None
    onednn.why_not.cache_clear()
    linear, linear_int8 = onednn.linear, onednn.linear_int8
    monkeypatch.setattr(onednn, "linear", lambda *arguments: linear(*arguments) * 1.2)
    monkeypatch.setattr(onednn, "linear_int8", lambda *arguments: linear_int8(*arguments) * 1.2)
    assert "other numbers" in onednn.why_not(dtype)
    assert "other numbers" in onednn.why_not(dtype, int8=True)
    assert siglip_hf.optimize(model, dtype).optimization.packed_blocks == 0


def test_only_one_module_calls_the_private_operators():
    package = Path(siglip_hf.__file__).parent
    calls = [
        path.name
        for path in package.rglob("*.py")
        if "torch.ops.mkldnn" in (text := path.read_text()) or "torch.ops.onednn" in text
    ]
    assert calls == ["onednn.py"]


def test_eight_threads_that_optimize_one_model_do_it_once(model):
    want, meet = embed(model), threading.Barrier(8, timeout=30)

    def work(_):
        meet.wait()
        return siglip_hf.optimize(model, torch.float32).optimization, embed(model)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert len({id(report) for report, _ in results}) == 1
    assert results[0][0].packed_blocks == 3
    for _, embeds in results:
        for ours, plain in zip(embeds, want, strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


# What stays as it is


def test_lora_stays_as_it_is(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert siglip_hf.optimize(adapted).optimization.packed_blocks == 0
    assert siglip_hf.optimize(adapted.base_model.model).optimization.packed_blocks == 0
    assert "adapters" in adapted.base_model.model.optimization.notes[0]


def test_hooks_and_offload_stay_as_they_are(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    block = model.vision_model.encoder.layers[0]
    assert is_packable(block)
    hook = block.mlp.register_forward_hook(lambda *args: None)
    assert not is_packable(block)
    assert siglip_hf.optimize(copy.deepcopy(model)).optimization.packed_blocks == 0
    hook.remove()
    assert is_packable(block)
    add_hook_to_module(block.self_attn.q_proj, ModelHook())
    assert not is_packable(block)


def test_other_models_stay_as_they_are():
    other = siglip_hf.optimize(torch.nn.Linear(2, 2))
    assert other.optimization.notes == ["left as it is: Linear is no SigLIP model of this package"]


def test_twice_is_once(model):
    siglip_hf.optimize(model, torch.float32)
    report = model.optimization
    assert siglip_hf.optimize(model).optimization is report
