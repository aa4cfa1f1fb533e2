"""The Trainer: one loss for processes and micro-batches, resumed runs, logs, evaluation, and the usual options."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

import siglip_hf
from siglip_hf.evaluation import retrieval_recall
from siglip_hf.losses.sigmoid import sigmoid_loss
from siglip_hf.losses.tiles import _product
from siglip_hf.training import SiglipTrainer, SiglipTrainingArguments
from siglip_hf.training.measuring import measure_pairs
from siglip_hf.training.pairs import Draw, PairSampler, positive_groups
from tiny_checkpoint import write_tiny_checkpoint
from tiny_siglip2 import write_naflex
from training_data import largest_difference, make_trainer, weights, write_two_captions

RANDOM = {"augment": ["crop", "flip", "color"]}
# Ways to make a batch of 8 out of two processes: pairs per micro-batch, micro-batches.
SHAPES = {"at once": (4, 1), "accumulated": (2, 2)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_two_captions(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def reference(checkpoint, data, tmp_path_factory):
    """One process, one batch."""
    trainer = make_trainer(checkpoint, data, tmp_path_factory.mktemp("reference"), **RANDOM)
    trainer.train()
    return trainer, weights(trainer), trainer.evaluate()


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_training_changes_the_weights_and_lowers_the_loss(reference, checkpoint):
    trainer, trained, _ = reference
    before = dict(siglip_hf.SiglipModel.from_pretrained(checkpoint).named_parameters())
    # A bias of keys shifts all scores of a query alike, so that it has no gradient.
    assert all(not torch.equal(value, before[name]) for name, value in trained.items() if "k_proj.bias" not in name)
    losses = logged(trainer, "loss")
    assert len(losses) == 3
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("size", "steps"), [(4, 2), (3, 3)])
def test_accumulation_is_the_large_batch(reference, checkpoint, data, tmp_path, size, steps):
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    options["dataloader_num_workers"] = 1  # another process draws the same
    if size * steps == 8:
        expected = reference[0], reference[1]
    else:
        whole = make_trainer(checkpoint, data, tmp_path / "whole", per_device_train_batch_size=size * steps, **RANDOM)
        whole.train()
        expected = whole, weights(whole)
    trainer = make_trainer(checkpoint, data, tmp_path, **options, **RANDOM)
    trainer.train()
    assert trainer.batch_size == size * steps
    assert largest_difference(weights(trainer), expected[1]) < 1e-5
    assert logged(trainer, "loss") == pytest.approx(logged(expected[0], "loss"), rel=1e-5)
    assert logged(trainer, "epoch")[:3] == pytest.approx(logged(expected[0], "epoch")[:3])


def count_bytes():
    """Lets the collectives that evaluation may use note what this process sends: [bytes of tensors, of objects]."""
    sent = {"tensors": 0, "objects": 0, "measured": 0}
    originals = {name: getattr(dist, name) for name in ("gather", "broadcast_object_list", "all_gather_object")}

    def gather(tensor, gather_list=None, **kwargs):
        sent["tensors"] += tensor.numel() * tensor.element_size()
        return originals["gather"](tensor, gather_list, **kwargs)

    def broadcast_object_list(objects, **kwargs):
        sent["objects"] += len(pickle.dumps(objects))
        return originals["broadcast_object_list"](objects, **kwargs)

    def all_gather_object(everyone, value, **kwargs):
        sent["objects"] += len(pickle.dumps(value))
        return originals["all_gather_object"](everyone, value, **kwargs)

    def measure(*args):
        sent["measured"] += 1
        return measure_pairs(*args)

    for function in (gather, broadcast_object_list, all_gather_object):
        setattr(dist, function.__name__, function)
    siglip_hf.training.trainer.measure_pairs = measure
    return sent


def run_in_process(rank, kind, shape, checkpoint, data, folder):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    size, steps = SHAPES[shape]
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, **RANDOM}
    options |= {"save_strategy": "steps", "save_steps": 2, "fsdp": kind == "fsdp" or None}
    output = Path(folder) / f"{kind}-{shape}"
    trainer = make_trainer(checkpoint, data, output, **options)
    trainer.train()
    sent = count_bytes()
    sharded = any(hasattr(value, "full_tensor") for value in trainer.model.parameters())
    found = {"weights": weights(trainer), "loss": logged(trainer, "loss"), "metrics": trainer.evaluate()}
    found["sharded"], found["sent"] = sharded, dict(sent)
    dist.barrier()
    if shape == "at once":
        return found
    # Once more, from the checkpoint.
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = make_trainer(checkpoint, data, output, **options)
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    found["resumed"] = weights(resumed)
    return found


def worker(rank, checkpoint, data, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        os.environ[name] = str(value)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {
        (kind, shape): run_in_process(rank, kind, shape, checkpoint, data, folder)
        for kind in ("ddp", "fsdp")
        for shape in SHAPES
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(checkpoint, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, (str(checkpoint), str(data), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)], folder


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one_with_the_same_batch(found, reference, kind, shape):
    trainer, expected, metrics = reference
    for rank in range(2):
        result = found[0][rank][kind, shape]
        assert result["sharded"] == (kind == "fsdp")
        assert largest_difference(result["weights"], expected) < 1e-5
        assert result["loss"] == pytest.approx(logged(trainer, "loss"), rel=1e-5)
        for name, value in metrics.items():
            if "loss" in name or "recall" in name:
                assert result["metrics"][name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_evaluation_sends_each_row_once_and_measures_once(found, kind):
    folder = found[1] / f"{kind}-accumulated" / "checkpoint-3"
    width = siglip_hf.SiglipConfig.from_pretrained(folder).vision_config.hidden_size
    for rank in range(2):
        sent = found[0][rank][kind, "at once"]["sent"]
        assert sent["measured"] == (1 if rank == 0 else 0)
        # 10 pictures and 20 texts in batches of 8: 16 and 32 rows with the places of each, half from either process.
        assert sent["tensors"] == (8 + 16) * (4 * width + 8)
        assert sent["objects"] < 4096


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_go_on_from_a_checkpoint(found, kind):
    shape = "accumulated"
    for rank in range(2):
        result = found[0][rank][kind, shape]
        assert largest_difference(result["resumed"], result["weights"]) < 1e-6
    folder = found[1] / f"{kind}-{shape}"
    loaded = dict(siglip_hf.SiglipModel.from_pretrained(folder / "checkpoint-3").named_parameters())
    assert largest_difference(loaded, found[0][0][kind, shape]["weights"]) < 1e-6


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_takes_the_same_steps(checkpoint, data, tmp_path, at):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5, "save_steps": 1}
    options |= {"adam_epsilon": 1e-8, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", **RANDOM}
    options |= {"save_strategy": "steps", "scale_learning_rate": 1e-2, "max_grad_norm": 1.0}

    def with_dropout():
        model = siglip_hf.SiglipModel.from_pretrained(checkpoint)
        for name in ("text_config", "vision_config"):
            getattr(model.config, name).attention_dropout = 0.1
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.1
        return model

    unbroken = make_trainer(checkpoint, data, tmp_path / "run", model=with_dropout(), **options)
    unbroken.train()
    resumed = make_trainer(checkpoint, data, tmp_path / "again", model=with_dropout(), **options)
    torch.rand(7)  # whatever the random state is, that of the checkpoint counts
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{at}"))
    assert largest_difference(weights(resumed), weights(unbroken)) == 0
    assert logged(resumed, "loss") == logged(unbroken, "loss")


def test_a_checkpoint_appears_whole(checkpoint, data, tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 4}
    trainer = make_trainer(checkpoint, data, tmp_path, **options)
    seen = []
    write = SiglipTrainer._save_optimizer_and_scheduler

    def watch(self, folder):
        seen.append(sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint")))
        write(self, folder)

    monkeypatch.setattr(SiglipTrainer, "_save_optimizer_and_scheduler", watch)
    trainer.train()
    # While a checkpoint is being written, it is not there yet, and two older ones still are.
    assert seen == [[], ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_the_best_checkpoint_is_kept_and_loaded(checkpoint, data, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(checkpoint, data, tmp_path, metric_for_best_model="bias", **options)
    measured = iter([3.0, 1.0, 2.0])
    trainer.evaluation_loop = lambda *_, **__: EvalLoopOutput((), None, {"eval_bias": next(measured)}, 1)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best = dict(siglip_hf.SiglipModel.from_pretrained(tmp_path / "checkpoint-1").named_parameters())
    assert largest_difference(weights(trainer), best) == 0
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_logs(checkpoint, data, tmp_path, shape):
    size, steps = shape
    trainer = make_trainer(
        checkpoint, data, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1
    )
    model, source = trainer.model, trainer.train_dataset
    scale, bias = model.logit_scale.exp().item(), model.logit_bias.item()
    places = [place for place, _ in PairSampler(len(source), 8, 42, lambda: 0)][:8]
    batch = trainer.data_collator([Draw(source[place], number) for number, place in enumerate(places)])
    with torch.no_grad():
        images = model.encode_image(batch["pixel_values"])
        texts = model.encode_text(batch["input_ids"])
    trainer.train()
    entry = trainer.state.log_history[0]
    after = trainer.model.logit_scale.exp().item(), trainer.model.logit_bias.item()
    assert (entry["scale"], entry["bias"]) == pytest.approx(after)
    logits = after[0] * images @ texts.T + after[1]
    assert entry["positive_logit"] == pytest.approx(logits.diagonal().mean().item(), abs=1e-4)
    wrong = (logits.sum() - logits.diagonal().sum()) / 56
    assert entry["negative_logit"] == pytest.approx(wrong.item(), abs=1e-4)
    assert entry["pairs_per_second"] > 0
    loss = sigmoid_loss(images, texts, torch.tensor(math.log(scale)), torch.tensor(bias))
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_evaluation_is_that_of_the_whole_set(reference, checkpoint, data):
    trainer, _, metrics = reference
    processor = siglip_hf.SiglipProcessor.from_pretrained(checkpoint)
    files = sorted(data.glob("*.png"))
    captions = [line for file in files for line in file.with_suffix(".txt").read_text().splitlines()]
    owners = torch.arange(10).repeat_interleave(2)
    model = trainer.model.eval()
    with torch.no_grad():
        images = model.encode_image(processor(images=[str(file) for file in files], return_tensors="pt").pixel_values)
        texts = model.encode_text(processor(text=captions, return_tensors="pt").input_ids)
        loss = sigmoid_loss(images[owners], texts, model.logit_scale, model.logit_bias, positives=owners)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = retrieval_recall(images, texts, owners, ks=(1, 5)).as_dict()
    assert len(expected) == 4
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-6)


def test_a_dataset_of_datasets(checkpoint, tmp_path, reference, data):
    datasets = pytest.importorskip("datasets")
    files = sorted(data.glob("*.png"))
    rows = {"image": [str(file) for file in files]}
    rows["captions"] = [file.with_suffix(".txt").read_text().splitlines() for file in files]
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    trainer = make_trainer(checkpoint, None, tmp_path)
    trained = SiglipTrainer(
        trainer.model, trainer.args, dataset, {"own": dataset}, processing_class=trainer.processing_class
    )
    trained.train()
    assert trained.state.global_step == 3
    assert {"eval_own_loss", "eval_own_image_to_text_recall_at_1"} <= trained.evaluate().keys()


def test_weight_decay_and_learning_rates(checkpoint, data, tmp_path):
    trainer = make_trainer(checkpoint, data, tmp_path, weight_decay=0.3, scale_learning_rate=0.5)
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    found = [({names[id(value)] for value in group["params"]}, group["weight_decay"], group["lr"]) for group in groups]
    decayed, plain, scalars = found
    assert decayed[1:] == (0.3, 0.05)
    assert plain[1:] == (0.0, 0.05)
    assert scalars == ({"logit_scale", "logit_bias"}, 0.0, 0.5)
    assert all(name.endswith("weight") for name in decayed[0])
    assert {"text_model.head.weight", "vision_model.embeddings.patch_embedding.weight"} <= decayed[0]
    assert not any("norm" in name or "token_embedding" in name or "position" in name for name in decayed[0])
    assert {"vision_model.head.probe", "text_model.embeddings.position_embedding.weight"} <= plain[0]
    assert len(decayed[0]) + len(plain[0]) + 2 == len(names)
    both = make_trainer(checkpoint, data, tmp_path).create_optimizer().param_groups
    assert len(both) == 2


@pytest.mark.parametrize(
    ("option", "accumulation"),
    [("bf16", 1), ("bf16", 2), ("gradient_checkpointing", 1), ("gradient_checkpointing", 2), ("torch_compile", 2)],
)
def test_with_the_usual_options(reference, checkpoint, data, tmp_path, option, accumulation):
    options = {option: True, "per_device_train_batch_size": 8 // accumulation}
    if option == "torch_compile":
        options["torch_compile_backend"] = "eager"
    trainer = make_trainer(checkpoint, data, tmp_path, gradient_accumulation_steps=accumulation, **options, **RANDOM)
    trainer.train()
    tolerance = 2e-2 if option == "bf16" else 1e-5
    assert largest_difference(weights(trainer), reference[1]) < tolerance
    assert logged(trainer, "loss") == pytest.approx(logged(reference[0], "loss"), rel=tolerance)
    assert trainer.model.dtype == torch.float32


def test_lora_with_scale_and_bias_goes_on_from_a_checkpoint(checkpoint, data, tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(1)
        model = peft.get_peft_model(siglip_hf.SiglipModel.from_pretrained(checkpoint), peft.LoraConfig(r=2))
        model.get_base_model().logit_bias.requires_grad_(True)
        return model

    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    options |= {"gradient_accumulation_steps": 2}
    unbroken = make_trainer(checkpoint, data, tmp_path, model=adapted(), **options)
    unbroken.train()
    resumed = make_trainer(checkpoint, data, tmp_path / "again", model=adapted(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert largest_difference(weights(resumed), weights(unbroken)) == 0
    changed = {name for name, value in weights(unbroken).items() if not torch.equal(value, weights_of(adapted())[name])}
    assert any("lora_" in name for name in changed)
    assert any("logit_bias" in name for name in changed)
    assert not any("logit_scale" in name or "base_layer" in name for name in changed)


def weights_of(model):
    return dict(model.named_parameters())


def test_broken_pictures_are_counted_and_replaced(checkpoint, data, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(data, folder)
    (folder / "cat.png").write_bytes(b"nothing")
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(checkpoint, folder, tmp_path, **options)
    trainer.train()
    assert trainer.state.global_step == 2
    assert set(trainer.broken) == {"cat.png"}
    resumed = make_trainer(checkpoint, folder, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.broken == trainer.broken  # what was found before the interruption is counted too
    metrics = trainer.evaluate()
    assert set(trainer.broken) == {"cat.png"}
    assert "not a picture" in trainer.broken["cat.png"]
    assert metrics["eval_samples_per_second"] > 0


def test_naflex(tmp_path, data):
    (tmp_path / "naflex").mkdir()
    write_naflex(tmp_path / "naflex")
    model = siglip_hf.Siglip2Model.from_pretrained(tmp_path / "naflex")
    processor = siglip_hf.Siglip2Processor.from_pretrained(tmp_path / "naflex")
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": [], "max_steps": 2}
    args = SiglipTrainingArguments(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_tqdm=True, save_strategy="no", **options
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = SiglipTrainer(model, args, str(data), str(data), processing_class=processor)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert largest_difference(weights(trainer), before) > 0


class Reads(TorchFunctionMode):
    """Counts what would wait for an accelerator: values of floating-point tensors that Python asks for."""

    names = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__", "__float__", "__int__")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.names and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("repeated", [False, True], ids=["each alone", "shared pictures"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_reads_nothing_back(checkpoint, data, tmp_path, accumulation, repeated):
    reads = {}
    for steps in (1, 2):
        options = {"per_device_train_batch_size": (20 if repeated else 4) // accumulation, "max_steps": steps}
        options |= {"gradient_accumulation_steps": accumulation, "optim": "sgd", "logging_steps": 100}
        trainer = make_trainer(checkpoint, data, tmp_path, **options)
        assert trainer.get_train_dataloader().device is None  # the keys of a batch stay on the CPU
        with Reads() as counter:
            trainer.train()
        reads[steps] = sorted(counter.found)
        assert (trainer._latest[2] is not None) == repeated
    assert reads[2] == reads[1]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp16", 5e-3)])
def test_mixed_precision_reaches_the_loss(checkpoint, data, tmp_path, monkeypatch, precision, tolerance, accumulation):
    dtypes = []
    monkeypatch.setattr(
        "siglip_hf.losses.tiles._product", lambda a, b, out: (dtypes.append(a.dtype), _product(a, b, out))
    )

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found[name] = torch.cat([value.grad.flatten() for value in model.parameters()])

    found = {}
    for name in ("fp32", precision):
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(
            checkpoint, data, tmp_path, max_steps=1, bf16=name != "fp32", callbacks=[Keep()], **options
        )
        if name == "fp16":  # accelerate has no float16 on a CPU, but PyTorch has
            trainer.accelerator.state._mixed_precision = "fp16"
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        trainer.train()
        assert set(dtypes) == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]}
        dtypes.clear()
    error = (found[precision] - found["fp32"]).norm() / found["fp32"].norm()
    assert 0 < error < tolerance


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_overflows_in_float16_is_left_out(checkpoint, data, tmp_path, accumulation):
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(checkpoint, data, tmp_path, max_steps=1, bf16=True, **options)
    trainer.accelerator.state._mixed_precision = "fp16"
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = weights(trainer)
    trainer.train()
    assert largest_difference(weights(trainer), before) == 0
    assert scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("steps", [5, 6])
def test_a_finished_run_takes_no_step(checkpoint, data, tmp_path, steps):
    # Epochs of 3 steps: the end in the middle of one, and at the end of one.
    options = {"per_device_train_batch_size": 4, "max_steps": steps, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(checkpoint, data, tmp_path, **options)
    whole.train()
    again = make_trainer(checkpoint, data, tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert largest_difference(weights(again), weights(whole)) == 0
    assert logged(again, "loss") == logged(whole, "loss")


def test_mistakes_are_named(checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match="SiglipTrainingArguments"):
        SiglipTrainer(nn.Linear(1, 1), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="processing_class"):
        SiglipTrainer(nn.Linear(1, 1), SiglipTrainingArguments(str(tmp_path), use_cpu=True))
    trainer = make_trainer(checkpoint, None, tmp_path)
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.train()
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate()


def test_sampler_shows_every_pair_and_does_not_depend_on_processes():
    epoch = 0
    sampler = PairSampler(10, 4, seed=3, epoch=lambda: epoch)
    first = list(sampler)
    assert len(first) == len(sampler) == 12
    assert {place for place, _ in first[:10]} == set(range(10))
    assert [number for _, number in first] == list(range(12))
    assert list(sampler) == first
    epoch = 1
    second = list(sampler)
    assert [number for _, number in second] == list(range(12, 24))
    assert [place for place, _ in second] != [place for place, _ in first]
    few = [place for place, _ in PairSampler(3, 8, seed=0, epoch=lambda: 0)]
    assert sorted(few[:3]) == sorted(few[3:6]) == [0, 1, 2]
    assert len(few) == 8


def test_positive_groups():
    assert positive_groups(torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9])) is None
    # 0 and 2 share a picture; 2 and 3 a text, so that all three are one group.
    groups = positive_groups(torch.tensor([5, 6, 5, 7, 8]), torch.tensor([1, 2, 3, 3, 4]))
    assert groups.tolist() == [0, 1, 0, 0, 4]
