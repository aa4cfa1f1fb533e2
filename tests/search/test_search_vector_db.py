"""Vectors in LanceDB and Qdrant, in their embedded modes: filled, updated, searched like an index folder."""

import numpy as np
import pytest

pytest.importorskip("faiss")
pytest.importorskip("pyarrow")

from search_data import DIMENSION, clustered
from siglip_hf.data.store import EmbeddingStore, EmbeddingWriter, Manifest
from siglip_hf.search.query import SearchIndex
from siglip_hf.search.sources_to_index import export_source, index_embeddings
from siglip_hf.search.vector_db import open_table

VECTORS = clustered(60, centres=60)
PACKAGES = {"lancedb": "lancedb", "qdrant": "qdrant_client"}


class Pictures:
    """Stands for a model: pictures are vectors already."""

    def embed_images(self, pictures):
        return np.stack(pictures)


def write_embeddings(folder, numbers, *, changed=(), model_sha256="0" * 64, vectors=VECTORS):
    """A folder of embeddings with a row for each number."""
    manifest = Manifest("image", "a model", model_sha256, {}, DIMENSION, "float32", "float32")
    with EmbeddingWriter(folder, manifest) as writer:
        rows = [
            {
                "id": f"it's {n}.png",
                "path": f"/{'odd' if n % 2 else 'even'}/it's {n}.png",
                "sha256": f"{n} {n in changed}",
                "width": 1,
                "height": 1,
            }
            for n in numbers
        ]
        writer.append(rows, np.stack([vectors[n] for n in numbers]))
        writer.finish()
    return str(folder)


def opened(name):
    index = SearchIndex.open(name)
    index._embedder = Pictures()
    return index


@pytest.fixture(params=PACKAGES)
def database(request):
    pytest.importorskip(PACKAGES[request.param])
    return request.param


def test_a_table_answers_as_an_index_does(database, tmp_path):
    embeddings = write_embeddings(tmp_path / "emb", range(60))
    done = export_source([embeddings], database, f"{tmp_path}/db/pictures")
    assert (done.count, done.added, done.removed) == (60, 60, 0)
    index_embeddings(EmbeddingStore.open(embeddings), tmp_path / "idx")
    table, folder = opened(f"{database}:{tmp_path}/db/pictures"), opened(tmp_path / "idx")
    assert len(table) == 60
    assert repr(table) == repr(folder).replace("flat", database)
    assert table.origin == folder.origin
    for options in ({}, {"path_filter": "*/odd/*"}, {"path_filter": "it's 1?.png"}, {"path_filter": "nothing"}):
        ours = folder.search(image=VECTORS[7], k=5, **options)
        theirs = table.search(image=VECTORS[7], k=5, **options)
        assert [hit.id for hit in theirs] == [hit.id for hit in ours]
        np.testing.assert_allclose([hit.cosine for hit in theirs], [hit.cosine for hit in ours], atol=1e-3)
    assert len(ours) == 0
    assert table.backend.sample(10).shape == (10, DIMENSION)
    table.backend.close()


def test_a_table_is_updated_or_replaced_but_not_by_accident(database, tmp_path):
    place = f"{tmp_path}/db/pictures"
    export_source([write_embeddings(tmp_path / "a", range(10))], database, place)
    later = write_embeddings(tmp_path / "b", range(3, 15), changed=[5])
    with pytest.raises(ValueError, match=r"is there; update it \(--update\)"):
        export_source([later], database, place)
    done = export_source([later], database, place, update=True)
    assert (done.count, done.added, done.removed) == (12, 6, 3)
    done = export_source([write_embeddings(tmp_path / "c", range(2))], database, place, overwrite=True)
    assert done.count == 2
    other = write_embeddings(tmp_path / "d", range(2), model_sha256="1" * 64)
    with pytest.raises(ValueError, match="vectors of different weights cannot be compared"):
        export_source([other], database, place, update=True)
    table = opened(f"{database}:{place}")
    assert {hit.id for hit in table.search(image=VECTORS[0])} == {"it's 0.png", "it's 1.png"}
    table.backend.close()


def test_copies_keep_their_order_whatever_k(database, tmp_path):
    folder = write_embeddings(tmp_path / "a", range(60), vectors=np.repeat(clustered(12, seed=5), 5, axis=0))
    export_source([folder], database, f"{tmp_path}/db/pictures")
    table = open_table(f"{database}:{tmp_path}/db/pictures")
    for query in clustered(3, seed=6):
        (longest,) = table.neighbours(query[None], 60, None)
        names = longest.rows["id"].to_pylist()
        assert all(names[i : i + 5] == sorted(names[i : i + 5]) for i in range(0, 60, 5))
        for k in range(1, 60, 7):
            (found,) = table.neighbours(query[None], k, None)
            assert found.rows["id"].to_pylist() == names[:k], k
    table.close()


def test_tables_that_are_not_there(database, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such database"):
        open_table(f"{database}:{tmp_path}/nowhere/pictures")
    (tmp_path / "db").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no table 'pictures'"):
        open_table(f"{database}:{tmp_path}/db/pictures")
    with pytest.raises(ValueError, match="does not name a table"):
        open_table(f"{database}:pictures")


def test_a_table_of_others_is_refused(tmp_path):
    lancedb = pytest.importorskip("lancedb")
    lancedb.connect(tmp_path / "db").create_table("theirs", [{"id": 1, "vector": [0.0, 1.0]}])
    with pytest.raises(ValueError, match="was not made by this package"):
        open_table(f"lancedb:{tmp_path}/db/theirs")


def test_other_databases_are_not_known(tmp_path):
    with pytest.raises(ValueError, match="'milvus' is no database that is known"):
        export_source(["x"], "milvus", "a/b")
    with pytest.raises(ValueError, match="either refilled or updated"):
        export_source(["x"], "lancedb", "a/b", overwrite=True, update=True)
