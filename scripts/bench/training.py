"""Training with the sigmoid loss across processes and micro-batches: transformers, open_clip and this package.

    python scripts/bench/training.py                       # 2 and 4 processes, 64 x 64 against 4,096 at once
    python scripts/bench/training.py --batch 256 --micro-batches 8 --micro-size 16      # a quick look
    python scripts/bench/training.py --only-reading        # samples/s from tar shards against the same data as files

Needs the loss of open_clip: pip install --no-deps open_clip_torch. Errors are relative to the plain formula of the
whole batch in float64. Peak memory is the most that was resident in a process above its inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from common import in_turn, machine, noise_picture, resident, to_jpeg
from loss import transformers_loss
from siglip_hf import SiglipConfig, SiglipModel, SiglipProcessor, default_checkpoint
from siglip_hf.data.streams import open_stream
from siglip_hf.losses.sigmoid import sigmoid_loss
from siglip_hf.training import PairCollator, cached_backward
from siglip_hf.training.pairs import Draw, PairSampler, training_pairs
from siglip_hf.training.streams import StreamDraws, StreamedPairs

PACKAGES = ("transformers", "open_clip", "siglip_hf")


def open_clip_loss_class() -> Any:
    """SigLipLoss of open_clip, from its file alone: the package as a whole imports torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("This needs open_clip: pip install --no-deps open_clip_torch")
    path = Path(package.submodule_search_locations[0], "loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SigLipLoss


def loss_of(package: str, rank: int = 0, world: int = 1) -> Callable[..., Tensor]:
    """The loss as each package computes it on one of several processes."""
    if package == "transformers":
        return transformers_loss  # of the pairs of this process: it knows of no others
    if package == "open_clip":
        form = open_clip_loss_class()(rank=rank, world_size=world)
        return lambda images, texts, scale, bias: form(images, texts, scale.exp(), bias)
    group = dist.group.WORLD if world > 1 else None
    return lambda *inputs: sigmoid_loss(*inputs, group=group)


def whole_batch(batch: int, width: int) -> list[Tensor]:
    """Image embeddings, text embeddings, scale and bias: pairs that a half-trained model has found."""
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(batch, width, generator=generator) for _ in range(2))
    return [
        *(F.normalize(side, dim=-1) for side in (images, images + 2 * noise)),
        torch.tensor([2.3]),
        torch.tensor([-5.0]),
    ]


def plain_formula(inputs: list[Tensor]) -> tuple[float, list[Any]]:
    """The loss and its gradients in float64, some rows of the matrix of pairs at a time."""
    images, texts, scale, bias = leaves = [value.double().requires_grad_() for value in inputs]
    total, batch = 0.0, len(images)
    for rows in torch.arange(batch).split(1024):
        signs = 2.0 * (rows[:, None] == torch.arange(batch)) - 1
        loss = -F.logsigmoid(signs * (images[rows] @ texts.T * scale.exp() + bias)).sum() / batch
        loss.backward()
        total += loss.item()
    return total, [leaf.grad for leaf in leaves]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def worker(rank: int, world: int, package: str, folder: str, options: argparse.Namespace) -> None:
    """One process: loss and gradients of its part of the batch, then the memory and the time they take."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    form = loss_of(package, rank, world)
    inputs = whole_batch(world * options.batch, options.dim)
    leaves = [value.chunk(world)[rank].clone() if value.ndim == 2 else value for value in inputs]
    del inputs
    leaves = [value.requires_grad_() for value in leaves]
    form(*(value.detach()[:8].requires_grad_() for value in leaves)).backward()  # start threads and connections
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark of the most resident memory
    before, start = resident()[0], time.perf_counter()
    loss = form(*leaves)
    loss.backward()
    seconds, peak = time.perf_counter() - start, resident()[1] - before
    grads: list[Any] = [leaf.grad for leaf in leaves]
    for value in (loss.data, grads[2], grads[3]):  # what DDP takes the mean of; embeddings get it through their tower
        dist.all_reduce(value)
        value /= world
    found = {"loss": loss.item(), "grads": grads, "seconds": seconds, "bytes": peak}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def compare_processes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Loss, gradients and memory with several processes, the same batch in each."""
    rows = []
    for world in options.processes:
        expected, expected_grads = plain_formula(whole_batch(world * options.batch, options.dim))
        for package in PACKAGES:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(worker, (world, package, folder, options), nprocs=world)
                runs = [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]
            sides = [torch.cat([run["grads"][side] for run in runs]) / world for side in (0, 1)]
            errors = [relative_error(side, grad) for side, grad in zip(sides, expected_grads, strict=False)]
            errors += [relative_error(runs[0]["grads"][place], expected_grads[place]) for place in (2, 3)]
            row = {"processes": world, "package": package, "loss": runs[0]["loss"], "expected": expected}
            row |= {"gradient_error": max(errors), "seconds": max(run["seconds"] for run in runs)}
            rows.append({**row, "bytes": max(run["bytes"] for run in runs)})
    print(
        f"\nLoss across processes: {options.batch:,} pairs in each, D = {options.dim}, float32, forward and backward\n"
    )
    print("| processes | package | loss | of the whole batch | error of gradients | peak memory per process | time |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['processes']} | {row['package']} | {row['loss']:.4f} | {row['expected']:.4f} "
            f"| {row['gradient_error']:.1e} | {row['bytes'] / 1e6:.0f} MB | {row['seconds']:.2f} s |"
        )
    for package in PACKAGES:
        peaks = [row["bytes"] for row in rows if row["package"] == package]
        print(f"{package}: memory with {options.processes[-1]} / {options.processes[0]}: {peaks[-1] / peaks[0]:.2f}")
    return rows


def tiny_model() -> SiglipModel:
    """Towers so small that thousands of pairs fit at once."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 100, "max_position_embeddings": 8, "projection_size": 64}
    config = SiglipConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8})
    torch.manual_seed(0)
    model = SiglipModel(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.logit_bias.fill_(-5.0)
    return model


def micro_batches(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    size = options.micro_size
    return [
        {
            "input_ids": torch.randint(0, 100, (size, 8), generator=generator),
            "pixel_values": torch.randn(size, 3, 16, 16, generator=generator),
        }
        for _ in range(options.micro_batches)
    ]


def at_once(model: SiglipModel, batches: list[dict[str, Tensor]]) -> None:
    """The large batch in one forward and one backward."""
    batch = {name: torch.cat([part[name] for part in batches]) for name in batches[0]}
    images, texts = model.encode_image(batch["pixel_values"]), model.encode_text(batch["input_ids"])
    transformers_loss(images, texts, model.logit_scale, model.logit_bias).backward()


def mean_of_small_losses(model: SiglipModel, batches: list[dict[str, Tensor]]) -> None:
    """What the Trainer of transformers does with gradient_accumulation_steps."""
    for batch in batches:
        images, texts = model.encode_image(batch["pixel_values"]), model.encode_text(batch["input_ids"])
        (transformers_loss(images, texts, model.logit_scale, model.logit_bias) / len(batches)).backward()


def open_clip_accumulation(model: SiglipModel, batches: list[dict[str, Tensor]]) -> None:
    """What the training loop of open_clip does with --accum-freq: the loss of the whole batch once per micro-batch."""
    form = loss_of("open_clip")
    with torch.no_grad():
        cached = [[model.encode_image(b["pixel_values"]), model.encode_text(b["input_ids"])] for b in batches]
    for index, batch in enumerate(batches):
        live = [model.encode_image(batch["pixel_values"]), model.encode_text(batch["input_ids"])]
        sides = [torch.cat([live[s] if i == index else kept[s] for i, kept in enumerate(cached)]) for s in (0, 1)]
        form(*sides, model.logit_scale, model.logit_bias).backward()
    # Scale and bias are in each of these losses; open_clip leaves their gradients that many times too large.


def ways_of(count: int) -> dict[str, Callable[[SiglipModel, list[dict[str, Tensor]]], Any]]:
    """Ways to take one step on a batch in `count` parts."""
    half = count // 2
    return {
        "at once": at_once,
        "transformers, Trainer": mean_of_small_losses,
        "open_clip, --accum-freq": open_clip_accumulation,
        "siglip_hf": cached_backward,
        f"siglip_hf, keep_graphs={half}": lambda model, parts: cached_backward(model, parts, keep_graphs=half),
    }


def accumulate(_: int, name: str, folder: str, options: argparse.Namespace) -> None:
    """One way in a process of its own, whose memory nothing else has touched."""
    torch.set_num_threads(os.cpu_count() or 1)
    batches, model = micro_batches(options), tiny_model()
    expected = torch.load(f"{folder}/expected.pt")
    at_once(tiny_model(), [{key: value[:2] for key, value in batches[0].items()}])  # start threads and libraries
    seen: list[int] = []
    model.vision_model.register_forward_hook(lambda _, __, output: seen.append(len(output.pooler_output)))
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark of the most resident memory
    before, start = resident()[0], time.perf_counter()
    ways_of(options.micro_batches)[name](model, batches)
    seconds, peak = time.perf_counter() - start, resident()[1] - before
    towers, scalars = gradient_errors(model, expected)
    passes = sum(seen) / (options.micro_batches * options.micro_size)
    row = f"| {name} | {towers:.1e} | {scalars:.1e} | {passes:.2f} | {peak / 1e6:.0f} MB | {seconds:.1f} s |"
    Path(folder, "row").write_text(row)


def compare_accumulation(options: argparse.Namespace) -> None:
    """Gradients, memory and time of one step on a batch in parts."""
    print(f"\nOne step on {options.micro_batches} x {options.micro_size} pairs, tiny towers, float32\n")
    print("| way | error of gradients, towers | scale, bias | forward passes | peak memory | time |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        reference = tiny_model().double()
        doubled = [
            {n: v.double() if v.is_floating_point() else v for n, v in b.items()} for b in micro_batches(options)
        ]
        at_once(reference, doubled)
        torch.save({name: value.grad for name, value in reference.named_parameters()}, f"{folder}/expected.pt")
        for name in ways_of(options.micro_batches):
            mp.spawn(accumulate, (name, folder, options), nprocs=1)
            print(Path(folder, "row").read_text())


def gradient_errors(model: nn.Module, expected: dict[str, Any]) -> tuple[float, float]:
    """Relative errors of the gradients of both towers as one vector, and of scale and bias as another."""
    grads: dict[str, Any] = {name: value.grad for name, value in model.named_parameters()}
    parts: list[float] = []
    for scalars in (False, True):
        names = [name for name in expected if name.startswith("logit_") == scalars]
        vectors = [torch.cat([side[name].double().flatten() for name in names]) for side in (grads, expected)]
        parts.append(relative_error(*vectors))
    return parts[0], parts[1]


def compare_reading(options: argparse.Namespace) -> None:
    """Samples per second of CPU time: pairs read, decoded and resized, from files and from tar shards."""
    rng, batch, pairs = np.random.default_rng(0), 32, options.pairs
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        Path(folder, "files").mkdir()
        shards = [stack.enter_context(tarfile.open(Path(folder, f"{number}.tar"), "w")) for number in range(4)]
        for number in range(pairs):
            width, height = (int(side) for side in rng.integers(256, 512, 2))
            path = Path(folder, "files", f"{number:06}.jpg")
            path.write_bytes(to_jpeg(noise_picture(rng, width, height)))
            path.with_suffix(".txt").write_text(f"picture {number}")
            for part in (path, path.with_suffix(".txt")):
                shards[number * len(shards) // pairs].add(part, part.name)
        stack.close()
        processor = SiglipProcessor.from_pretrained(default_checkpoint())
        source = training_pairs(str(Path(folder, "files")))
        streamed = StreamedPairs(open_stream(str(Path(folder, "*.tar"))))

        def from_files() -> None:
            collate, order = PairCollator(processor, source), list(PairSampler(pairs, batch, 0, lambda: 0))
            for start in range(0, pairs, batch):
                collate([Draw(source[place], number) for place, number in order[start : start + batch]])

        def from_shards() -> None:
            collate, draws = PairCollator(processor, streamed), StreamDraws(streamed, 0, 2000, 1, batch)
            for start in range(0, pairs, batch):
                collate([draws[number] for number in range(start, start + batch)])

        spent = in_turn({"files": from_files, "shards": from_shards}, options.rounds, clock=time.process_time)
    rates = {name: pairs / value for name, value in spent.items()}
    print(f"\nReading {pairs:,} JPEG pictures of 256 to 512 pixels a side with captions, {batch} in a batch\n")
    print("| pairs from | pairs per second of CPU time |\n|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")
    print(f"shards / files: {rates['shards'] / rates['files']:.3f}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=2048, help="pairs per process")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--micro-batches", type=int, default=64)
    parser.add_argument("--micro-size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-reading", action="store_true")
    parser.add_argument("--json", help="also write the first table into this file")
    options = parser.parse_args()
    print(machine("cpu"))
    compare_reading(options)
    if options.only_reading:
        return
    rows = compare_processes(options)
    compare_accumulation(options)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
