"""A tiny model to serve."""

from __future__ import annotations

import pytest
import torch

from siglip_hf.data.embedder import SiglipEmbedder
from tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("served") / "tiny-siglip")


@pytest.fixture(scope="session")
def embedder(checkpoint):
    return SiglipEmbedder(checkpoint, device="cpu", dtype="float32", batch_size=8, workers=2)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """A model this small only waits when its work is shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
