"""The embedding job on Ray: the same folder as without it, and the same behaviour after a kill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_hf.data.embed import Item, embed_items, embed_source
from siglip_hf.data.embedder import SiglipEmbedder
from siglip_hf.data.sources import open_source
from siglip_hf.data.store import EmbeddingWriter
from tiny_checkpoint import write_tiny_checkpoint

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Thirty pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(30):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "11.png").write_bytes(b"broken")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def test_an_actor_gives_the_batches_of_one_process(checkpoint, photos, monkeypatch):
    import pickle

    from siglip_hf.data.ray_engine import _Actor

    monkeypatch.setattr(ray, "get", lambda reference: reference)
    items = [Item(record.id, record) for record in open_source(photos)]
    options = {"model": str(checkpoint), "dtype": torch.float32, "batch_size": 4, "fast": False, "device": "cpu"}
    threads = torch.get_num_threads()
    try:
        done = _Actor([items], options, 1)({"start": np.array([0, 16]), "stop": np.array([16, 30])})
        batches = [batch for part in done["batches"] for batch in pickle.loads(part)]
        expected = list(embed_items(SiglipEmbedder(**options), items))
    finally:
        torch.set_num_threads(threads)
    assert done["start"] == [0, 16]
    assert [rows for rows, _ in batches] == [rows for rows, _ in expected]
    for (_, got), (_, wanted) in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_without_ray_the_extra_is_named(checkpoint, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "ray\[data\]"'):
        embed_source(photos, tmp_path / "emb", model=checkpoint, engine="ray")


@pytest.mark.slow
def test_two_nodes_give_the_same_folder(checkpoint, photos, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    options = {"model": checkpoint, "batch_size": 1, "dtype": "float32"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the actors have
    try:
        embed_source(photos, tmp_path / "one", **options)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        with pytest.raises(ValueError, match="3 workers do not fit in a cluster of 2 CPUs"):
            embed_source(photos, tmp_path / "many", engine="ray", address=cluster.address, workers=3, **options)
        append = EmbeddingWriter.append

        def append_ten(writer, rows, embeddings):
            if len(writer.known) == 10:
                raise KeyboardInterrupt
            append(writer, rows, embeddings)

        with monkeypatch.context() as patch:
            patch.setattr(EmbeddingWriter, "append", append_ten)
            with pytest.raises(KeyboardInterrupt):
                embed_source(photos, tmp_path / "two", engine="ray", address=cluster.address, **options)
        result = embed_source(photos, tmp_path / "two", engine="ray", address=cluster.address, **options)
    finally:
        cluster.shutdown()
    assert (result.kept, result.done) == (10, 20)
    assert [id_ for id_, _ in result.errors] == ["11.png"]
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.slow
def test_the_command_starts_a_cluster_of_its_own(checkpoint, photos, tmp_path):
    command = ["embed", photos, "--out", tmp_path / "emb", "--model", checkpoint, "--engine", "ray"]
    start = "import sys; from siglip_hf.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", start, *map(str, command)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.stdout.startswith(f"{tmp_path / 'emb'}: 29 pictures of 32 numbers; 30 done"), done.stderr
    assert done.returncode == 1
    # The core of Ray writes to stderr past Python, about something that Ray Data does.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert lines == ["skipped 11.png: not a picture in a format that Pillow can read", "1 of 30 skipped"]
