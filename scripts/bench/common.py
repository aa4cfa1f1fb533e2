"""What the benchmarks share: the machine in words, contenders that take turns, memory, pictures, a base checkpoint."""

from __future__ import annotations

import importlib.metadata
import io
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

SPIECE = Path(__file__).parents[2] / "tests" / "fixtures" / "spiece.model"


def cpu_name() -> str:
    """The CPU's model as Linux knows it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str = "cpu", packages: tuple[str, ...] = ("torch", "transformers")) -> str:
    """Device, threads and versions in words."""
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    name = f"{torch.cuda.get_device_name()}, {cpu_name()}" if device.startswith("cuda") else cpu_name()
    return f"{name}, {torch.get_num_threads()} threads, {', '.join(versions)}"


def seconds(run: Callable[[], Any], device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call; on a GPU until its work is done."""
    start = clock()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - start


def in_turn(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each. All take turns, so that a slow moment of the machine hits all alike."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warm_up + rounds):
        for name, run in contenders.items():
            value = seconds(run, device, clock)
            if number >= warm_up:
                spent[name].append(value)
    return {name: statistics.median(values) for name, values in spent.items()}


def resident() -> tuple[int, int]:
    """Resident memory of this process now, and the most since the last reset, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def noise_picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Blurred noise: as detailed as a photograph, so that decoding and resizing have their usual work."""
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.5))


def to_jpeg(image: Image.Image) -> bytes:
    """The picture as a JPEG file of quality 90."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
