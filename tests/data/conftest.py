"""A tiny checkpoint, pictures, and `embed_source` with both."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siglip_hf.data import embedder as embedder_module
from siglip_hf.data import store as store_module
from siglip_hf.data.embed import embed_source
from siglip_hf.data.embedder import SiglipEmbedder
from tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten JPEGs in two folders; the third is cut off."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(10):
        file = folder / ("b" if number % 2 else "a") / f"{number}.jpg"
        file.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40 + number, 30), Image.Resampling.BICUBIC).save(file)
    cut = folder / "a" / "2.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    return folder


@pytest.fixture
def photos(pictures, tmp_path):
    return Path(shutil.copytree(pictures, tmp_path / "photos"))


@functools.cache
def loaded(*arguments, **options):
    return SiglipEmbedder(*arguments, **options)


@pytest.fixture
def embed(checkpoint, monkeypatch):
    """`embed_source` with the tiny checkpoint, loaded once, small batches, and parts that close after 6 rows."""
    monkeypatch.setattr(store_module, "PART_ROWS", 6)
    monkeypatch.setattr(embedder_module, "SiglipEmbedder", loaded)

    def run(source, out, **options):
        return embed_source(source, out, **{"model": checkpoint, "batch_size": 3, "device": "cpu"} | options)

    return run
