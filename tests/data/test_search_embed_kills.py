"""A short form of `scripts/checks/kills.py`: processes that are really killed."""

from pathlib import Path

import pytest

from tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("pyarrow")


def test_killed_embedding_ends_like_an_unbroken_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts" / "checks")
    import kills

    model = write_tiny_checkpoint(tmp_path / "model")
    photos = kills.write_pictures(tmp_path / "photos", 60)
    result = kills.check_embed(tmp_path, photos, kills=3, model=str(model))
    assert result["kills"] == 3
