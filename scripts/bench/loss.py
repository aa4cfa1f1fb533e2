"""Time and peak memory of the sigmoid loss, forward and backward, against the dense formulas.

    python scripts/bench/loss.py                              # B = 8,192, D = 768, fp32 on the CPU
    python scripts/bench/loss.py --batch 32768                # forms that do not fit in memory are left out
    python scripts/bench/loss.py --processes 1 2 4 --batch 2048   # memory of the ring per process (batch per process)
    python scripts/bench/loss.py --device cuda --dtype bfloat16 --batch 65536 --repeats 20   # and siglip-kernel
    python scripts/bench/loss.py --device cuda --dtype bfloat16 --batch 1048576               # the paper's extreme

Each run is a process of its own, the forms in turn. Peak memory is the most that was resident (on a GPU: allocated)
during forward and backward, above what it was with the inputs alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from common import machine, resident
from siglip_hf.losses.sigmoid import sigmoid_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def transformers_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """What SiglipModel of transformers computes with return_loss=True."""
    logits = texts @ images.t()
    logits = logits * logit_scale.exp() + logit_bias
    eye = torch.eye(logits.size(0), device=logits.device)
    return -F.logsigmoid((2 * eye - torch.ones_like(logits)) * logits).sum(dim=-1).mean()


def open_clip_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """What SigLipLoss of open_clip computes on one process."""
    # Numbers without a dimension, as its model holds them: they leave the dtype of the embeddings alone.
    logits = logit_scale.reshape(()).exp() * images @ texts.t() + logit_bias.reshape(())
    labels = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - torch.ones_like(logits)
    return -F.logsigmoid(labels * logits).sum() / len(logits)


def siglip_kernel_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """The Triton kernels of the package siglip-kernel, on a GPU only: pip install siglip-kernel."""
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(images, texts, logit_scale.reshape(()), logit_bias.reshape(()))


FORMS: dict[str, Loss] = {"ours": sigmoid_loss, "transformers": transformers_loss, "open_clip": open_clip_loss}
if torch.cuda.is_available() and importlib.util.find_spec("siglip_kernel"):
    FORMS["siglip_kernel"] = siglip_kernel_loss
_DENSE = ("transformers", "open_clip")
# Matrices of B x B elements that are alive at once in the dense forms, for the guess whether one fits.
_DENSE_MATRICES = 7


def measure(form: Loss, batch: int, width: int, device: str, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median seconds of forward and backward, and the peak of memory above the inputs in bytes."""
    torch.manual_seed(0)
    inputs = [torch.randn(batch, width, device=device).to(dtype) for _ in range(2)]
    for value in inputs:
        value.div_(value.float().norm(dim=-1, keepdim=True))
    inputs += [torch.tensor([10.0], device=device).log(), torch.tensor([-10.0], device=device)]
    for value in inputs:
        value.requires_grad_()
    # With the shapes that are timed: this starts threads and libraries, and compiles all that these shapes need.
    form(*inputs).backward()
    for value in inputs:
        value.grad = None

    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark of the most resident memory
        before = resident()[0]
    seconds = []
    for _ in range(repeats):
        for value in inputs:
            value.grad = None
        start = time.perf_counter()
        form(*inputs).backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() if on_gpu else resident()[1]) - before
    return {"seconds": statistics.median(seconds), "bytes": peak}


def ring_worker(rank: int, world: int, folder: str, options: argparse.Namespace) -> None:
    """One process of the ring; writes what it measured."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    backend = "gloo" if options.device == "cpu" else "nccl"
    device = options.device if options.device == "cpu" else f"cuda:{rank}"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    group = dist.group.WORLD

    def form(*inputs: Tensor) -> Tensor:
        return sigmoid_loss(*inputs, group=group)

    result = measure(form, options.batch, options.dim, device, getattr(torch, options.dtype), options.repeats)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def fits(batch: int, device: str, dtype: torch.dtype) -> bool:
    """Whether a dense form has a chance in the memory that is free."""
    if device != "cpu":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _DENSE_MATRICES * batch**2 * dtype.itemsize < free


def in_own_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run this script for one form."""
    command = [sys.executable, __file__, "--measure", name, "--repeats", str(options.repeats)]
    command += ["--batch", str(options.batch), "--dim", str(options.dim)]
    command += ["--device", options.device, "--dtype", options.dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(options: argparse.Namespace) -> None:
    """The forms in turn, then the ratios."""
    dense = fits(options.batch, options.device, getattr(torch, options.dtype))
    names = [name for name in FORMS if dense or name not in _DENSE]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            results[name].append(in_own_process(name, options))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "bytes")}
        for name, runs in results.items()
    }
    print(f"B = {options.batch:,}, D = {options.dim}, {options.dtype}: median of {options.rounds} rounds")
    for name, median in medians.items():
        print(f"{name:13} {median['seconds']:8.2f} s  {median['bytes'] / 1e6:9.0f} MB above the inputs")
    if not dense:
        print("The dense forms were left out: they do not fit in the free memory.")
    for name in names[1:]:
        ratios = {key: medians["ours"][key] / medians[name][key] for key in ("seconds", "bytes")}
        print(f"ours / {name}: time {ratios['seconds']:.3f}, peak memory {ratios['bytes']:.3f}")


def compare_worlds(options: argparse.Namespace) -> None:
    """The ring with several numbers of processes and the same batch in each."""
    print(f"Ring, {options.batch:,} pairs per process, D = {options.dim}, {options.dtype}")
    peaks = []
    for world in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(ring_worker, (world, folder, options), nprocs=world)
            runs = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
        peaks.append(max(run["bytes"] for run in runs))
        seconds = max(run["seconds"] for run in runs)
        print(f"{world:3} processes {seconds:8.2f} s  {peaks[-1] / 1e6:9.0f} MB above the inputs, per process")
    if len(peaks) > 1:
        print(f"memory with {options.processes[-1]} / {options.processes[0]} processes: {peaks[-1] / peaks[0]:.3f}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8192, help="pairs (with --processes: in each process)")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=3, help="times that each form is run in a process of its own")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps in such a process, after one that is not")
    parser.add_argument("--processes", type=int, nargs="+", help="compare the ring with these numbers of processes")
    parser.add_argument("--measure", choices=list(FORMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        form = FORMS[options.measure]
        dtype = getattr(torch, options.dtype)
        print(json.dumps(measure(form, options.batch, options.dim, options.device, dtype, options.repeats)))
        return
    print(machine(options.device))
    if options.processes:
        compare_worlds(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
