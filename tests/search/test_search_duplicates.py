"""Near-duplicates: groups around their largest picture, and files of equal bytes."""

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("faiss")

from search_data import DIMENSION, ORIGIN, clustered, rows
from siglip_hf.search.build import build_index
from siglip_hf.search.duplicates import find_duplicates
from siglip_hf.search.index import IndexFolder


def turned(vector, cosine, seed):
    """A vector of a certain cosine to another."""
    noise = np.random.default_rng(seed).standard_normal(len(vector))
    noise -= noise @ vector * vector
    noise /= np.linalg.norm(noise)
    return (cosine * vector + np.sqrt(1 - cosine**2) * noise).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Ten rows far apart; 3 and 8 are near 5, 2 has the bytes of 7 but another vector."""
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((DIMENSION, DIMENSION)))[0][:10].astype(np.float32)
    vectors[3] = turned(vectors[5], 0.97, 1)
    vectors[8] = turned(vectors[5], 0.99, 2)
    table = rows(range(10))
    hashes = table["sha256"].to_pylist()
    hashes[2] = hashes[7]
    table = table.set_column(4, "sha256", pa.array(hashes))
    build_index(ORIGIN, [(table, vectors)], tmp_path / "idx")
    return IndexFolder(tmp_path / "idx")


def described(groups):
    return [[int(member.id[-10:-4]) for member in group] for group in groups]


def test_groups_begin_with_the_largest_picture(folder):
    groups = find_duplicates(folder, 0.9)
    # Row 8 is the largest of its group (rows are 10 + number pixels wide).
    assert described(groups) == [[8, 5, 3], [7, 2]]
    first, second, third = groups[0]
    assert (first.cosine, first.same_file, first.width) == (1.0, False, 18)
    assert second.cosine == pytest.approx(0.99, abs=2e-3)
    assert third.cosine == pytest.approx(float(folder.vectors[8].astype(np.float32) @ folder.vectors[3]), abs=2e-3)
    assert [member.same_file for member in groups[1]] == [False, True]


def test_the_threshold_decides_but_not_for_equal_files(folder):
    assert described(find_duplicates(folder, 0.98)) == [[8, 5], [7, 2]]
    assert described(find_duplicates(folder, 1)) == [[7, 2]]


def test_equal_vectors_are_found_at_a_threshold_of_one(tmp_path):
    vectors = clustered(6)
    vectors[4] = vectors[1]
    build_index(ORIGIN, [(rows(range(6)), vectors)], tmp_path / "idx")
    assert described(find_duplicates(IndexFolder(tmp_path / "idx"), 1)) == [[4, 1]]


def test_a_large_group_is_one_group(tmp_path):
    vectors = np.repeat(clustered(1), 700, axis=0)
    build_index(ORIGIN, [(rows(range(700)), vectors)], tmp_path / "idx")
    done = []
    (group,) = find_duplicates(IndexFolder(tmp_path / "idx"), on_progress=done.append)
    assert len(group) == 700
    assert sum(done) == 700


@pytest.mark.parametrize("kind", ["hnsw", "ivf-sq8"])
def test_coarse_indexes_find_what_the_exact_one_does(tmp_path, kind):
    vectors = clustered(600, centres=1, noise=50)  # in all directions
    vectors[300:] = [turned(vector, 0.97, i) for i, vector in enumerate(vectors[:300])]
    for name in ("flat", kind):
        build_index(ORIGIN, [(rows(range(600)), vectors)], tmp_path / name, kind=name)
    exact, coarse = (described(find_duplicates(IndexFolder(tmp_path / name), 0.95)) for name in ("flat", kind))
    assert len(exact) == 300
    assert len({tuple(group) for group in exact} & {tuple(group) for group in coarse}) >= 285


def test_rows_without_a_size_or_hash(tmp_path):
    table = rows(range(3))
    for number, name in ((2, "width"), (3, "height"), (4, "sha256")):
        table = table.set_column(number, name, pa.nulls(3, table[name].type))
    vectors = clustered(3)
    vectors[2] = vectors[0]
    build_index(ORIGIN, [(table, vectors)], tmp_path / "idx")
    (group,) = find_duplicates(IndexFolder(tmp_path / "idx"))
    assert [(member.width, member.same_file) for member in group] == [(None, False), (None, False)]


def test_a_threshold_must_be_one(folder):
    for threshold in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            find_duplicates(folder, threshold)
