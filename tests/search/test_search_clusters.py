"""Clusters and their names."""

import numpy as np
import pytest

pytest.importorskip("faiss")
pytest.importorskip("pyarrow")

from search_data import DIMENSION, ORIGIN, rows
from siglip_hf.search.build import build_index
from siglip_hf.search.clusters import find_clusters
from siglip_hf.search.index import IndexFolder
from siglip_hf.search.words import WORDS

AXES = np.eye(DIMENSION, dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 rows around axis 0, 40 around axis 1, 20 around axis 2, all leaning to axis 9."""
    rng = np.random.default_rng(0)
    centres = np.repeat(AXES[[0, 1, 2]], [60, 40, 20], axis=0) + AXES[9]
    vectors = centres + 0.1 * rng.standard_normal((120, DIMENSION)).astype(np.float32)
    path = tmp_path_factory.mktemp("clusters") / "idx"
    build_index(ORIGIN, [(rows(range(120)), vectors)], path)
    return IndexFolder(path)


def test_clusters_are_found_and_named_by_what_sets_them_apart(folder):
    # "thing" has the highest cosine to every row, and so it names none.
    words, vectors = ["thing", "cat", "dog", "car", "sea"], AXES[[9, 0, 1, 2, 3]]
    found = find_clusters(folder, words, vectors, 3)
    assert [(cluster.label, cluster.size) for cluster in found] == [("cat", 60), ("dog", 40), ("car", 20)]
    assert sorted(found[2].ids) == sorted(folder.rows["id"].to_pylist()[100:])
    assert found[0].words[0][1] == pytest.approx(2**-0.5, abs=0.05)
    for cluster in found:
        assert cluster.cosines == sorted(cluster.cosines, reverse=True)
        assert len(cluster.ids) == len(cluster.paths) == len(cluster.cosines) == cluster.size


def test_the_same_clusters_each_time(folder):
    assert find_clusters(folder, ["a"], AXES[:1], 5) == find_clusters(folder, ["a"], AXES[:1], 5)


def test_every_row_is_in_one_cluster(folder):
    found = find_clusters(folder, ["a", "b"], AXES[:2])
    assert sorted(id_ for cluster in found for id_ in cluster.ids) == sorted(folder.rows["id"].to_pylist())
    assert len(found) <= 8  # the root of 120 / 2


def test_what_cannot_be(folder):
    with pytest.raises(ValueError, match="121 clusters of 120 rows"):
        find_clusters(folder, ["a"], AXES[:1], 121)
    with pytest.raises(ValueError, match="0 words"):
        find_clusters(folder, [], AXES[:0])
    assert find_clusters(folder, ["a"], AXES[:1], 120)


def test_the_built_in_words():
    assert len(WORDS) == len(set(WORDS)) >= 400
    assert all(word == word.strip().lower() and word for word in WORDS)
