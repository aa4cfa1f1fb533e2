"""Cached accumulation against the large batch, in one process and in two."""

import os
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from siglip_hf.losses.sigmoid import sigmoid_loss
from siglip_hf.models.configuration_siglip import SiglipConfig
from siglip_hf.models.modeling_siglip import SiglipModel
from siglip_hf.training import cached_backward

SIZES = [4, 3, 5]
BATCH = sum(SIZES)


def make_model(dropout=0.0, dtype=torch.float64):
    towers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    towers["attention_dropout"] = dropout
    config = SiglipConfig(
        text_config={**towers, "vocab_size": 50, "max_position_embeddings": 6, "projection_size": 16},
        vision_config={**towers, "image_size": 8, "patch_size": 4},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = SiglipModel(config).train()
    with torch.no_grad():  # so that the tiny towers tell inputs apart
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.logit_bias.fill_(-3.0)
    return model.to(dtype)


def make_batch(batch=BATCH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 50, (batch, 6), generator=generator)
    return {"input_ids": input_ids, "pixel_values": torch.randn(batch, 3, 8, 8, generator=generator).to(dtype)}


def split(batch, sizes=SIZES):
    parts = {name: value.split(sizes) for name, value in batch.items()}
    return [{name: values[index] for name, values in parts.items()} for index in range(len(sizes))]


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def at_once(model, batch, positives=None):
    """The large batch, with ordinary autograd."""
    model.zero_grad()
    images, texts = model.encode_image(batch["pixel_values"]), model.encode_text(batch["input_ids"])
    loss = sigmoid_loss(images, texts, model.logit_scale, model.logit_bias, positives=positives)
    loss.backward()
    return loss.item(), gradients(model), images.detach(), texts.detach()


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    scale = torch.stack([grad.double().norm() for grad in expected.values() if grad is not None]).max()
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
            continue
        # A key bias has no gradient but for rounding, so that errors are relative to the gradient as a whole too.
        error = (found[name].double() - grad.double()).norm()
        assert error <= tolerance * max(grad.double().norm(), 0.01 * scale), name


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("keep_graphs", [1, 2, 3, 9])
def test_equals_the_large_batch(keep_graphs, dtype, tolerance):
    model, batch = make_model(dtype=dtype), make_batch(dtype=dtype)
    positives = torch.arange(BATCH) // 2
    expected, expected_grads, images, texts = at_once(make_model(), make_batch(), positives)
    assert all(grad is not None for grad in expected_grads.values())
    calls = count_calls(model.vision_model)
    result = cached_backward(model, split(batch), positives=positives, keep_graphs=keep_graphs, chunk_size=5)
    assert result.loss.item() == pytest.approx(expected, rel=tolerance)
    assert_same(gradients(model), expected_grads, tolerance)
    for found, wanted in ((result.image_embeds, images), (result.text_embeds, texts)):
        assert not found.requires_grad
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)
    kept = min(keep_graphs, 3)
    assert calls == [False] * (3 - kept) + [True] * 3  # each kept graph saves a forward pass


def test_plain_accumulation_is_not_the_large_batch():
    model, batch = make_model(), make_batch()
    expected = at_once(make_model(), batch)[1]
    for part in split(batch):
        (model(**part, return_loss=True).loss * len(part["input_ids"]) / BATCH).backward()
    with pytest.raises(AssertionError):
        assert_same(gradients(model), expected, 0.1)


def test_adds_to_gradients_that_are_there():
    model = make_model()
    expected = at_once(make_model(), make_batch())[1]
    for _ in range(2):
        cached_backward(model, split(make_batch()))
    assert_same({name: grad / 2 for name, grad in gradients(model).items()}, expected, 1e-10)


def test_micro_batches_may_be_a_generator_and_no_grad_outside_is_ignored():
    model = make_model()
    with torch.no_grad():
        cached_backward(model, (part for part in split(make_batch())))
    assert_same(gradients(model), at_once(make_model(), make_batch())[1], 1e-10)


@pytest.mark.parametrize("frozen", ["none", "vision_model", "text_model"])
def test_dropout_is_repeated(frozen):
    found = []
    for keep_graphs in (3, 1, 1):  # keeping every graph is the definition; it has nothing to repeat
        model = make_model(dropout=0.5)
        if frozen != "none":
            model.get_submodule(frozen).requires_grad_(False)
        torch.manual_seed(7)
        result = cached_backward(model, split(make_batch()), keep_graphs=keep_graphs)
        found.append((result.loss, gradients(model), torch.rand(1)))
    for loss, grads, following in found[1:]:
        assert loss == found[0][0]
        assert following == found[0][2]  # random numbers go on as if each had been drawn once
        assert_same(grads, found[0][1], 1e-10)
    assert all(torch.equal(found[1][1][name], grad) for name, grad in found[2][1].items() if grad is not None)
    torch.manual_seed(8)
    model = make_model(dropout=0.5)
    torch.manual_seed(8)
    assert cached_backward(model, split(make_batch())).loss != found[0][0]


@pytest.mark.parametrize(("frozen", "trained"), [("vision_model", "text_model"), ("text_model", "vision_model")])
def test_a_frozen_tower_runs_once(frozen, trained):
    expected_model, model = make_model(), make_model()
    for each in (expected_model, model):
        each.get_submodule(frozen).requires_grad_(False)
    expected = at_once(expected_model, make_batch())[1]
    once, twice = count_calls(model.get_submodule(frozen)), count_calls(model.get_submodule(trained))
    cached_backward(model, split(make_batch()))
    assert (len(once), len(twice)) == (3, 5)
    assert sum(grad is None for grad in expected.values()) > 10
    assert_same(gradients(model), expected, 1e-10)


def test_scale_and_bias_alone():
    expected_model, model = make_model(), make_model()
    for each in (expected_model, model):
        each.requires_grad_(False)
        each.logit_scale.requires_grad_(True)
    expected = at_once(expected_model, make_batch())[1]
    calls = count_calls(model.vision_model)
    cached_backward(model, split(make_batch()))
    assert len(calls) == 3
    assert_same(gradients(model), expected, 1e-10)


def test_gradient_checkpointing():
    model = make_model()
    model.gradient_checkpointing_enable()
    cached_backward(model, split(make_batch()))
    assert_same(gradients(model), at_once(make_model(), make_batch())[1], 1e-10)


def test_autocast():
    # Weights that autocast converts in the pass without graphs must not be those of the pass with graphs.
    found = []
    for keep_graphs in (1, 3):
        model = make_model(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            cached_backward(model, split(make_batch(dtype=torch.float32)), keep_graphs=keep_graphs)
        found.append(gradients(model))
    assert_same(found[0], found[1], 2e-2)
    assert_same(found[0], at_once(make_model(), make_batch())[1], 0.2)


def test_scaler_scales_the_gradients_not_the_loss():
    expected, expected_grads, *_ = at_once(make_model(), make_batch())
    model = make_model()
    result = cached_backward(model, split(make_batch()), scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert result.loss.item() == pytest.approx(expected)
    assert_same({name: grad / 1024 for name, grad in gradients(model).items()}, expected_grads, 1e-10)


def test_mistakes_are_named():
    model, batch = make_model(), make_batch()
    with pytest.raises(ValueError, match="empty"):
        cached_backward(model, [])
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        cached_backward(model, split(batch), keep_graphs=0)
    with pytest.raises(ValueError, match=r"no image_embeds.*input_ids"):
        cached_backward(model, [{"input_ids": batch["input_ids"]}])
    with pytest.raises(ValueError, match="Linear has no logit_scale"):
        cached_backward(nn.Linear(2, 2), split(batch))
    with pytest.raises(ValueError, match="Nothing to train"):
        cached_backward(model.requires_grad_(False), split(batch))


# Process 0 has two micro-batches and process 1 three, of the same whole batch.
PARTS = [[3, 2], [4, 2, 1]]


def own_micro_batches(rank):
    sizes = PARTS[0] + PARTS[1]
    parts = split(make_batch(sum(sizes)), sizes)
    return parts[:2] if rank == 0 else parts[2:]


def run_ddp(rank, keep_graphs):
    """Two steps in a row, and one whose gradients stay at home."""
    model = make_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    found = {}
    for step in ("first", "second"):
        wrapped.zero_grad()
        loss = cached_backward(wrapped, own_micro_batches(rank), keep_graphs=keep_graphs, chunk_size=4).loss
        found[step] = (loss, deepcopy(gradients(model)))
    wrapped.zero_grad()
    with wrapped.no_sync():
        cached_backward(wrapped, own_micro_batches(rank), keep_graphs=keep_graphs)
    found["no_sync"] = deepcopy(gradients(model))
    return found


def run_fsdp(rank):
    """Sharded towers; all processes have as many micro-batches."""
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in (*model.text_model.encoder.layers, *model.vision_model.encoder.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sizes = [3, 2, 4, 3]
    parts = split(make_batch(), sizes)
    result = cached_backward(model, parts[2 * rank : 2 * rank + 2], group=mesh.get_group())
    return result.loss, {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def worker(rank, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {keep_graphs: run_ddp(rank, keep_graphs) for keep_graphs in (1, 2, 3)}
    found["fsdp"] = run_fsdp(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("keep_graphs", [1, 2, 3])
def test_ddp_gives_the_gradients_of_the_whole_batch(found, keep_graphs):
    expected, expected_grads, *_ = at_once(make_model(), make_batch(12))
    for rank in range(2):
        for step in ("first", "second"):
            loss, grads = found[rank][keep_graphs][step]
            assert loss.item() == pytest.approx(expected)
            assert_same(grads, expected_grads, 1e-10)
    apart = [found[rank][keep_graphs]["no_sync"] for rank in range(2)]
    assert_same({name: (grad + apart[1][name]) / 2 for name, grad in apart[0].items()}, expected_grads, 1e-10)
    with pytest.raises(AssertionError):
        assert_same(apart[0], expected_grads, 0.1)


def test_fsdp_gives_the_gradients_of_the_whole_batch(found):
    expected, expected_grads, *_ = at_once(make_model(), make_batch(12))
    for rank in range(2):
        loss, grads = found[rank]["fsdp"]
        assert loss.item() == pytest.approx(expected)
        assert_same(grads, expected_grads, 1e-10)
