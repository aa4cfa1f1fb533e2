"""What `siglip_hf.optimize` does on a GPU, tried on a CPU with torch.compile's backend that only records graphs."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import siglip_hf
import tiny
import tiny_siglip2
from siglip_hf.inference.optimize import optimization
from siglip_hf.inference.optimize.compiled import CompiledBlock, FusedBlock
from siglip_hf.inference.optimize.optimization import Optimization, compile_blocks


@pytest.fixture(autouse=True)
def recording(monkeypatch):
    monkeypatch.setattr(CompiledBlock, "backend", "eager")
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def model():
    return tiny.shaken(siglip_hf.SiglipModel(tiny.tiny_config()))


def compiled(model, dtype=torch.float32):
    report = Optimization("", 1)
    compile_blocks(model, dtype, report)
    return report


@torch.no_grad()
def embed(model, count=3):
    inputs = tiny.tiny_inputs()
    return torch.cat([model.encode_image(inputs["pixel_values"][:count]), model.encode_text(inputs["input_ids"])])


def test_the_same_embeddings_from_one_graph_for_all_blocks_and_batches(model):
    want = [embed(model, count) for count in (3, 2, 1)]
    plain = copy.deepcopy(model.state_dict())
    report = compiled(model)
    assert report.packed_blocks == 3  # both of the vision tower, the first of the text tower
    assert report.notes[0] == "3 blocks compiled, with one product for queries, keys and values"
    assert all(isinstance(block.packed, CompiledBlock) for block in model.vision_model.encoder.layers)
    for count, wanted in zip((3, 2, 1), want, strict=True):
        torch.testing.assert_close(embed(model, count), wanted, atol=1e-5, rtol=0)
    # The towers differ in width and length: two each, for a batch of one and for all others.
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    for name, value in model.state_dict().items():  # asked for its weights, the model has them bit for bit
        assert torch.equal(value, plain[name]), name
    assert all(block.packed is None for block in model.vision_model.encoder.layers)
    torch.testing.assert_close(embed(model), want[0], atol=1e-6, rtol=0)


def test_naflex_with_masks(model):
    naflex = tiny.shaken(siglip_hf.Siglip2Model(tiny_siglip2.tiny_config()))
    pictures = tiny_siglip2.tiny_pictures()
    with torch.no_grad():
        want = [naflex.encode_image(**pictures, packed=packed) for packed in (False, True)]
        assert compiled(naflex).packed_blocks > 0
        for packed, wanted in zip((False, True), want, strict=True):
            got = naflex.encode_image(**pictures, packed=packed)
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert isinstance(naflex.vision_model.encoder.layers[0].packed, CompiledBlock)


@pytest.mark.parametrize(("times", "kind"), [((2, 1), CompiledBlock), ((1, 2, 3, 2), FusedBlock), ((1, 2, 1, 2), None)])
def test_what_takes_longer_is_not_taken(model, monkeypatch, times, kind):
    """Times of plain and compiled; then of plain and fused."""
    clock = iter(times)
    monkeypatch.setattr(optimization, "_probe_seconds", lambda model: next(clock))
    want = embed(model)
    report = compiled(model)
    assert type(model.vision_model.encoder.layers[0].packed) is (kind or type(None))
    assert report.packed_blocks == (3 if kind else 0)
    assert any("it takes 2000.00 ms, the plain blocks 1000.00 ms" in note for note in report.notes) == (times[0] == 1)
    torch.testing.assert_close(embed(model), want, atol=1e-5, rtol=0)
    assert model.vision_model.post_layernorm.weight.requires_grad == (kind is None)


def test_what_gives_other_embeddings_or_fails_is_not_taken(model, monkeypatch):
    want = embed(model)

    def broken(backend):
        raise RuntimeError("no such compiler\nand more")

    monkeypatch.setattr("siglip_hf.inference.optimize.compiled._compiled", broken)
    monkeypatch.setattr(FusedBlock, "_attend", lambda self, qkv, mask: qkv[..., : qkv.shape[-1] // 3])
    notes = compiled(model).notes
    assert notes[0].endswith("no such compiler")
    assert "the probe's embeddings differ" in notes[1]
    assert notes[2].startswith("plain blocks in float32")
    assert torch.equal(embed(model), want)


def test_16_bits_are_kept_only_if_the_embeddings_are(model, monkeypatch):
    good = copy.deepcopy(model)
    report = compiled(good, None)
    assert (report.dtype, good.dtype) == ("bfloat16", torch.bfloat16)
    want = embed(model)
    monkeypatch.setattr(optimization, "LEAST_COSINE", 1.1)
    report = compiled(model, None)
    assert (report.dtype, model.dtype) == ("float32", torch.float32)
    assert report.notes[0].startswith("not in bfloat16: the probe's embeddings differ")
    torch.testing.assert_close(embed(model), want, atol=1e-5, rtol=0)


def test_optimize_takes_this_way_on_a_gpu(model, monkeypatch):
    monkeypatch.setattr(optimization, "_device_type", lambda model: "cuda")
    asked = []
    monkeypatch.setattr(optimization, "_reason_against", lambda model, device: asked.append(device))
    monkeypatch.setattr(optimization, "compile_blocks", lambda model, dtype, report, int8: asked.append((dtype, int8)))
    siglip_hf.optimize(model, torch.float16, device="cpu")
    assert asked == ["cuda", (torch.float16, False)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(model, monkeypatch, dtype):
    monkeypatch.undo()
    want = embed(model)
    siglip_hf.optimize(model, dtype, device="cuda")
    assert model.optimization.dtype == str(dtype).removeprefix("torch.")
    inputs = {name: value.to("cuda") for name, value in tiny.tiny_inputs().items()}
    with torch.no_grad():
        got = torch.cat([model.encode_image(inputs["pixel_values"]), model.encode_text(inputs["input_ids"])])
    assert torch.cosine_similarity(got.float().cpu(), want).min() > 0.999
