"""What a server may be asked for, and how it works; every figure that bounds its time and memory stands here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take. Whatever exceeds a limit is refused with its number.

    Attributes:
        body_bytes: bytes of one request.
        held_bytes: bytes of all requests that are being answered.
        pixels: pixels of a picture.
        inputs: pictures and texts of one request.
        characters: characters of a text; models read the first few dozen words.
        labels: labels of one request.
        templates: templates of one request.
        results: labels in the reply to one request, of all its pictures together.
        queued: pictures, and texts, that wait for their tower, before further requests are told to come again.
        seconds: time for a request, from its last byte to its answer.
        slow_seconds: time in which a request must have arrived.
    """

    body_bytes: int = 32 * 2**20
    held_bytes: int = 512 * 2**20
    pixels: int = 50_000_000
    inputs: int = 2048
    characters: int = 10_000
    labels: int = 10_000
    templates: int = 100
    results: int = 100_000
    queued: int = 2048
    seconds: float = 60.0
    slow_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"the limit {name}={value} must be above 0.")


@dataclass(frozen=True)
class Settings:
    """How a server works.

    Attributes:
        model: name or folder of the checkpoint; None stands for that of the indexes, or else the embedded one.
        name: what the model is called in requests and replies; by default the last part of its name.
        device: where the towers compute; the first accelerator by default.
        dtype: what they compute in; bfloat16 by default where the processor has it.
        fast: use `siglip_hf.optimize` on a CPU.
        batch_size: pictures or texts in one forward; by default 32 on a CPU, 64 elsewhere.
        wait: seconds that the first of a batch waits for others.
        threads: threads of torch, and as many that decode; one per core by default.
        indexes: folder by name, for `/v1/search`.
        label_bank: a folder in which embeddings of labels are kept.
        api_keys: who has one of them is answered; empty means everyone.
        allow_urls: fetch pictures from public addresses.
        limits: what may be asked for.
    """

    model: str | None = None
    name: str | None = None
    device: str | None = None
    dtype: str | None = None
    fast: bool = True
    batch_size: int | None = None
    wait: float = 0.002
    threads: int | None = None
    indexes: Mapping[str, str] = field(default_factory=dict)
    label_bank: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_urls: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")
        if not 0 <= self.wait <= 1:
            raise ValueError(f"wait={self.wait} must be from 0 to 1 second.")
