"""A short form of `scripts/checks/damage.py`: everything that is damaged is found, or costs nothing."""

import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("faiss")
pytest.importorskip("pyarrow")

sys.path.append(str(Path(__file__).parents[3] / "scripts" / "checks"))
import damage

INPUTS = {"store": 60, "store, embedded again": 10, "index": 40, "tables": 15, "tar": 30, "pictures": 20, "hostile": 40}
INPUTS |= {"files of options": 60, "label bank": 20, "HTTP requests": 15}


@pytest.mark.parametrize("name", INPUTS)
def test_nothing_passes_in_silence_or_as_a_fault(name, tmp_path):
    results = list(damage.judge(name, tmp_path, range(INPUTS[name]), seed=1))[1:]
    assert len(results) == INPUTS[name]
    assert [result for result in results if result[0] not in ("right", "named")] == []
    assert ("named" in dict(results)) == (name != "label bank")  # which mends itself


def test_the_campaign_sees_what_passes_in_silence_and_what_fails(tmp_path, monkeypatch):
    def make(folder):
        (folder / "a").write_bytes(b"00000000")
        return [folder / "a"]

    monkeypatch.setitem(damage.KINDS, "blind", damage.Kind(1, make, lambda folder: (folder / "a").read_bytes(), True))
    monkeypatch.setitem(
        damage.KINDS, "faulty", damage.Kind(1, make, lambda folder: int((folder / "a").read_bytes(), 2))
    )
    monkeypatch.setitem(
        damage.KINDS, "wrong", damage.Kind(1, make, lambda folder: {b"00000000": 1}[(folder / "a").read_bytes()])
    )
    found = {}
    for name in ("blind", "faulty", "wrong"):
        (tmp_path / name).mkdir()
        found[name] = [verdict for verdict, _ in damage.judge(name, tmp_path / name, range(20), seed=0)][1:]
    assert set(found["blind"]) == {"silent"}
    assert "named" in found["faulty"]  # a ValueError
    assert set(found["wrong"]) == {"traceback"}
    table = damage.table({name: Counter(verdicts) for name, verdicts in found.items()}).split("\n")
    assert table[2] == "| blind | 20 | 0 | 0 | 20 | 0 | 0 |"
