"""Index folders: kinds, recall, updates, what is refused, and what a killed run leaves."""

import itertools
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("faiss")
pytest.importorskip("pyarrow")

from filelock import FileLock

from search_data import DIMENSION, ORIGIN, blocks, clustered, rows
from siglip_hf.files import write_sealed_json
from siglip_hf.search import build as index_build
from siglip_hf.search import kinds as faiss_kinds
from siglip_hf.search.backend import Origin
from siglip_hf.search.build import build_index
from siglip_hf.search.index import IndexFolder
from siglip_hf.search.kinds import KINDS, choose_kind, memory_of, parse_bytes

GB = 10**9
COUNT = 3000
VECTORS = clustered(COUNT)


def ids(folder, found):
    return folder.rows["id"].take(found).to_pylist()


def name(number):
    return f"{'odd' if number % 2 else 'even'}/{number:06d}.png"


def exact(query, numbers, k):
    """Numbers of the k nearest among some rows, from the sixteen-bit vectors that an index keeps."""
    cosines = VECTORS[numbers].astype(np.float16).astype(np.float32) @ query
    return [numbers[i] for i in np.argsort(-cosines, kind="stable")[:k]]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An index of each kind with the first 2000 rows, and its report; to be copied before it is changed."""
    place = tmp_path_factory.mktemp("built")
    return {
        kind: (place / kind, build_index(ORIGIN, blocks(range(2000), VECTORS), place / kind, kind=kind))
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_finds_the_nearest_with_exact_cosines(built, kind):
    path, report = built[kind]
    folder = IndexFolder(path)
    assert (report.kind, report.action, report.count, report.added, report.removed) == (kind, "built", 2000, 2000, 0)
    assert report.recall >= 0.95
    assert len(folder) == 2000
    query = VECTORS[2500]
    ((found, cosines),) = folder.nearest(query[None], 5)
    assert np.all(np.diff(cosines) <= 0)
    np.testing.assert_allclose(cosines, VECTORS[found] @ query, atol=2e-3)
    if kind == "flat":
        assert found.tolist() == exact(query, list(range(2000)), 5)
    ((found, _),) = folder.nearest(VECTORS[7:8], 1)
    assert ids(folder, found) == [name(7)]


def test_the_recall_that_is_told_is_the_share_of_true_neighbours(built):
    path, report = built["ivf-sq8"]
    folder = IndexFolder(path)
    sample = np.sort(np.random.default_rng(1).choice(2000, 256, replace=False))
    hits = 0
    for row in sample:
        ((found, _),) = folder.nearest(folder.vectors[row : row + 1].astype(np.float32), 11)
        truth = [other for other in exact(VECTORS[row], list(range(2000)), 11) if other != row][:10]
        hits += len({*found.tolist()} - {row} & {*truth})
        assert row in found
    assert hits / 2560 >= report.recall - 0.01


def test_typical_queries_raise_the_effort_until_they_are_answered_well(tmp_path):
    queries = clustered(64, centres=64, noise=5.0, seed=9)  # far from all centres
    report = build_index(ORIGIN, blocks(range(COUNT), VECTORS), tmp_path / "a", kind="ivf-sq8")
    asked = build_index(
        ORIGIN, blocks(range(COUNT), VECTORS), tmp_path / "b", kind="ivf-sq8", make_queries=lambda: queries
    )
    assert report.recall_queries is None
    assert asked.recall_queries >= 0.98
    assert asked.effort > report.effort
    assert IndexFolder(tmp_path / "b").manifest["recall_at_10_queries"] == asked.recall_queries


@pytest.mark.parametrize("kind", KINDS)
def test_update_adds_removes_and_changes_without_a_rebuild(built, tmp_path, kind):
    shutil.copytree(built[kind][0], tmp_path / "idx")
    vectors = VECTORS.copy()
    vectors[300] = -VECTORS[300]
    numbers = [n for n in range(2400) if not 100 <= n < 200]
    report = build_index(ORIGIN, blocks(numbers, vectors), tmp_path / "idx", update=True)
    assert (report.action, report.added, report.removed, report.count) == ("updated", 401, 101, 2300)
    folder = IndexFolder(tmp_path / "idx")
    assert folder.index.ntotal == (2401 if kind == "hnsw" else 2300)
    assert any("cannot forget" in note for note in report.notes) == (kind == "hnsw")
    for number in (150, 300, 2350):  # removed, changed, new
        ((found, cosines),) = folder.nearest(vectors[number][None], 1)
        assert (ids(folder, found) == [name(number)]) == (number != 150)
        assert (cosines[0] > 0.999) == (number != 150)
    ((found, _),) = folder.nearest(VECTORS[300][None], 2000)
    assert len(set(found.tolist())) == len(found)
    if kind in ("flat", "hnsw"):
        assert len(found) == 2000


def test_updates_one_after_another_keep_keys_apart(built, tmp_path):
    for kind in ("flat", "hnsw"):
        shutil.copytree(built[kind][0], tmp_path / kind)
        for numbers in (range(1950), range(100, 2100), range(2000)):
            build_index(ORIGIN, blocks(numbers, VECTORS), tmp_path / kind, update=True)
        folder = IndexFolder(tmp_path / kind)
        assert len(set(folder.keys.tolist())) == len(folder) == 2000
        ((found, _),) = folder.nearest(VECTORS[50][None], 3)
        assert ids(folder, found) == [name(n) for n in exact(VECTORS[50], list(range(2000)), 3)]


def test_a_graph_of_mostly_removed_rows_is_built_anew(built, tmp_path):
    shutil.copytree(built["hnsw"][0], tmp_path / "idx")
    report = build_index(ORIGIN, blocks(range(1000), VECTORS), tmp_path / "idx", update=True)
    assert (report.action, report.removed) == ("rebuilt", 1000)
    assert "1,000 of 2,000 vectors in the graph" in report.notes[0]
    assert IndexFolder(tmp_path / "idx").index.ntotal == 1000


def test_an_index_that_outgrows_its_kind_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(faiss_kinds, "FLAT_LIMIT", 1000)
    assert build_index(ORIGIN, blocks(range(900), VECTORS), tmp_path / "idx").kind == "flat"
    report = build_index(ORIGIN, blocks(range(1100), VECTORS), tmp_path / "idx", update=True)
    assert (report.action, report.kind) == ("rebuilt", "hnsw")


def test_the_groups_of_an_index_are_learned_anew_when_it_has_doubled(built, tmp_path):
    shutil.copytree(built["ivf-sq8"][0], tmp_path / "idx")
    report = build_index(ORIGIN, blocks(range(800), VECTORS), tmp_path / "idx", update=True)
    assert report.action == "rebuilt"
    assert "2,000" in report.notes[0]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-sq8"])
def test_only_allowed_rows_are_found(built, kind, monkeypatch):
    folder = IndexFolder(built[kind][0])
    among = np.arange(1, 2000, 2)
    expected = exact(VECTORS[0], among.tolist(), 4)
    ((found, _),) = folder.nearest(VECTORS[0][None], 4, among)  # few: compared one by one
    assert found.tolist() == expected
    monkeypatch.setattr(faiss_kinds, "FLAT_LIMIT", 10)  # many: by the index itself
    ((found, _),) = folder.nearest(VECTORS[0][None], 4, among, effort=None if kind == "flat" else 256)
    assert found.tolist() == expected


def test_more_answers_than_rows(tmp_path):
    build_index(ORIGIN, blocks(range(3), VECTORS), tmp_path / "idx")
    ((found, _),) = IndexFolder(tmp_path / "idx").nearest(VECTORS[0][None], 10)
    assert sorted(found.tolist()) == [0, 1, 2]


def test_vectors_are_scaled_and_unusable_ones_left_out(tmp_path):
    vectors = VECTORS[:4] * 7
    vectors[1] = 0
    vectors[2, 0] = np.nan
    report = build_index(ORIGIN, [(rows(range(4)), vectors)], tmp_path / "idx")
    assert (report.count, report.skipped) == (2, 2)
    folder = IndexFolder(tmp_path / "idx")
    assert ids(folder, [0, 1]) == [name(0), name(3)]
    np.testing.assert_allclose(np.linalg.norm(folder.vectors.astype(np.float32), axis=1), 1, atol=1e-3)


def test_two_builds_are_equal_byte_for_byte(built, tmp_path):
    build_index(ORIGIN, blocks(range(2000), VECTORS), tmp_path / "idx", kind="flat")
    for file in built["flat"][0].iterdir():
        assert file.read_bytes() == (tmp_path / "idx" / file.name).read_bytes(), file.name


# --- the choice of a kind


@pytest.mark.parametrize(
    ("count", "memory", "kind"),
    [
        (1000, 4 * GB, "flat"),
        (100_000, 4 * GB, "flat"),
        (100_001, 4 * GB, "hnsw"),
        (1_000_000, 4 * GB, "ivf-sq8"),
        (100_000, GB // 10, "ivf-sq8"),
        (100_000, GB // 40, "ivf-pq"),
        (10_000_000, 2 * GB, "ivf-pq"),
    ],
)
def test_the_kind_follows_from_size_and_memory(count, memory, kind):
    choice = choose_kind(count, 768, memory)
    assert choice.kind == kind
    assert choice.memory == memory_of(kind, count, 768) <= memory


def test_the_reason_names_what_ruled_the_others_out():
    reason = choose_kind(1_000_000, 768, 4 * GB).reason
    assert "more than 100,000 vectors, the limit of flat" in reason
    assert "more than 300,000 vectors, the limit of hnsw" in reason
    assert "flat would need 0.31 GB of 100.0" not in choose_kind(1000, 768, GB).reason
    assert "flat would need" in choose_kind(100_000, 768, GB // 10).reason


def test_a_forced_kind_is_taken_or_refused():
    assert choose_kind(10, 768, GB, "hnsw").kind == "hnsw"
    with pytest.raises(ValueError, match=r"flat needs 3\.08 GB .* 1\.00 GB are allowed"):
        choose_kind(1_000_000, 768, GB, "flat")
    with pytest.raises(ValueError, match="'ivf' is no kind of index; choose one of flat, hnsw"):
        choose_kind(10, 768, GB, "ivf")
    with pytest.raises(ValueError, match="no index of 1,000,000,000 vectors"):
        choose_kind(1_000_000_000, 768, GB)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_kind_is_about_that_of_its_file(built, kind):
    _, report = built[kind]
    fixed = 256 * 1024  # codebooks and tables that do not grow with the vectors
    assert abs(report.bytes - memory_of(kind, 2000, DIMENSION)) < 0.1 * report.bytes + fixed


def test_amounts_of_memory():
    assert [parse_bytes(text) for text in ("4GB", "500 mb", "1.5 kB", "70", "2B")] == [4 * GB, 5 * 10**8, 1500, 70, 2]
    for text in ("", "much", "4XB", "-1GB", "0", "nan", "inf"):
        with pytest.raises(ValueError, match="no amount of memory"):
            parse_bytes(text)


# --- equal rows


@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_their_order_whatever_k(tmp_path, kind):
    vectors = np.repeat(clustered(400, seed=5), 5, axis=0)  # five copies of each
    numbers = np.arange(2000)
    np.random.default_rng(0).shuffle(numbers)
    table = [(rows(numbers.tolist()), vectors)]
    build_index(ORIGIN, table, tmp_path / "idx", kind=kind)
    folder = IndexFolder(tmp_path / "idx")
    for query in clustered(20, seed=6):
        ((longest, cosines),) = folder.nearest(query[None], 40, effort=512)
        assert all(a >= b for a, b in itertools.pairwise(cosines))
        for start in range(0, 40, 5):
            group = longest[start : start + 5].tolist()
            assert group == list(range(group[0], group[0] + 5)), "copies are neighbours, in the order of the rows"
        for k in range(1, 40):
            ((found, some),) = folder.nearest(query[None], k, effort=512)
            assert found.tolist() == [row for _, row in sorted(zip(-some, found.tolist(), strict=True))], k
            if kind != "ivf-pq":  # its codes are so coarse that it misses some rows, others for another k
                assert found.tolist() == longest[:k].tolist(), k
                assert some.tolist() == cosines[:k].tolist(), k


def test_many_copies_at_the_end_of_the_answer(tmp_path):
    vectors = np.concatenate([np.repeat(clustered(1, seed=3), 700, axis=0), clustered(300, seed=4)])
    build_index(ORIGIN, blocks(range(1000), vectors), tmp_path / "idx", kind="flat")
    folder = IndexFolder(tmp_path / "idx")
    for k in (1, 2, 10, 699, 700, 701, 1000, 2000):
        ((found, _),) = folder.nearest(vectors[:1], k)
        assert found[:700].tolist() == list(range(min(k, 700))), k
        assert len(set(found.tolist())) == min(k, 1000)


# --- what is refused


def test_any_flipped_bit_of_an_index_is_found(built, tmp_path):
    shutil.copytree(built["ivf-sq8"][0], tmp_path / "idx")
    for file in sorted((tmp_path / "idx").iterdir()):
        content = file.read_bytes()
        for place in range(0, 8 * len(content), 17 if file.name == "manifest.json" else 8 * len(content) // 5):
            damaged = bytearray(content)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match="is damaged"):
                IndexFolder(tmp_path / "idx")
        file.write_bytes(content)
    assert len(IndexFolder(tmp_path / "idx")) == 2000


@pytest.mark.parametrize(
    "change",
    [
        {"files": None},
        {"files": {"rows.parquet": {}}},
        {"files": {"rows.parquet": 7}},
        {"origin": None},
        {"origin": {"model": "m"}},
        {"kind": "tree"},
        {"effort": "much"},
        {"files": ...},
        {"origin": ...},
        {"kind": ...},
        {"effort": ...},
        {"trained": ...},
    ],
)
def test_a_manifest_without_a_checksum_is_read_and_its_damage_is_one_error(built, tmp_path, change):
    shutil.copytree(built["flat"][0], tmp_path / "idx")
    manifest = json.loads((tmp_path / "idx" / "manifest.json").read_text())
    del manifest["checksum"]
    (tmp_path / "idx" / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    assert len(IndexFolder(tmp_path / "idx")) == 2000
    changed = {name: value for name, value in (manifest | {"version": 1} | change).items() if value is not ...}
    (tmp_path / "idx" / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="is damaged"):
        IndexFolder(tmp_path / "idx")
    (tmp_path / "idx" / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"is damaged.*nested too deeply"):
        IndexFolder(tmp_path / "idx")


def test_nothing_to_index(tmp_path):
    with pytest.raises(ValueError, match="nothing to index"):
        build_index(ORIGIN, [], tmp_path / "idx")
    with pytest.raises(ValueError, match="no row has an embedding"):
        build_index(ORIGIN, [(rows([0]), np.zeros((1, DIMENSION), np.float32))], tmp_path / "idx")
    assert not (tmp_path / "idx").exists()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_an_index_is_not_replaced_unasked(built, tmp_path):
    shutil.copytree(built["flat"][0], tmp_path / "idx")
    with pytest.raises(ValueError, match=r"holds an index; update it \(--update\) or replace it"):
        build_index(ORIGIN, blocks(range(10), VECTORS), tmp_path / "idx")
    assert len(IndexFolder(tmp_path / "idx")) == 2000
    build_index(ORIGIN, blocks(range(10), VECTORS), tmp_path / "idx", overwrite=True)
    assert len(IndexFolder(tmp_path / "idx")) == 10


def test_a_foreign_folder_is_neither_read_nor_replaced(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("you")
    with pytest.raises(ValueError, match="is no index of this package"):
        IndexFolder(tmp_path / "letters")
    for options in ({"overwrite": True}, {"update": True}):
        with pytest.raises(ValueError, match="letters"):
            build_index(ORIGIN, blocks(range(10), VECTORS), tmp_path / "letters", **options)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "you"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        IndexFolder(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["index.faiss", "rows.parquet", "vectors.f16"])
def test_a_damaged_file_is_noticed(built, tmp_path, file):
    path = tmp_path / "idx"
    shutil.copytree(built["flat"][0], path)
    content = bytearray((path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged: the checksum of {file}"):
        IndexFolder(path)
    (path / file).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"damaged: {file} has"):
        IndexFolder(path, verify=False)
    (path / file).unlink()
    with pytest.raises(ValueError, match=f"damaged: {file} is missing"):
        IndexFolder(path, verify=False)


def test_a_damaged_manifest_and_a_later_version(built, tmp_path):
    path = tmp_path / "idx"
    shutil.copytree(built["flat"][0], path)
    manifest = json.loads((path / "manifest.json").read_text())
    write_sealed_json(path / "manifest.json", manifest | {"version": 99})
    with pytest.raises(ValueError, match="version 99"):
        IndexFolder(path)
    (path / "manifest.json").write_text(json.dumps(manifest)[:-5])
    with pytest.raises(ValueError, match=r"damaged: its manifest\.json cannot be read"):
        IndexFolder(path)


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (Origin("a model", "0" * 64, 16, "image"), "vectors of 32 numbers and the embeddings of 16"),
        (Origin("b model", "1" * 64, 32, "image"), r"made with a model \(000000000000\) and the embeddings with b"),
        (Origin("a model", "0" * 64, 32, "text"), "holds images and the embeddings texts"),
    ],
)
def test_vectors_of_another_model_do_not_mix(built, tmp_path, origin, message):
    shutil.copytree(built["flat"][0], tmp_path / "idx")
    with pytest.raises(ValueError, match=message):
        build_index(origin, blocks(range(10), VECTORS[:, : origin.dimension]), tmp_path / "idx", update=True)
    with pytest.raises(ValueError, match=r"vectors of shape \(10, 32\)"):
        build_index(Origin("a", "0", 16, "image"), blocks(range(10), VECTORS), tmp_path / "other")


def test_one_run_at_a_time(tmp_path):
    with FileLock(tmp_path / ".idx.lock"), pytest.raises(OSError, match="another run is writing"):
        build_index(ORIGIN, blocks(range(10), VECTORS), tmp_path / "idx")
    build_index(ORIGIN, blocks(range(10), VECTORS), tmp_path / "idx")


# --- a run that was killed


def test_what_a_killed_run_leaves_is_cleared(built, tmp_path):
    (tmp_path / ".idx.partial-123").mkdir()
    (tmp_path / ".idx.partial-123" / "vectors.f16").write_bytes(b"half")
    build_index(ORIGIN, blocks(range(10), VECTORS), tmp_path / "idx")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["idx"]


def test_an_index_that_a_killed_run_moved_away_comes_back(built, tmp_path):
    shutil.copytree(built["flat"][0], tmp_path / ".idx.replaced-123")
    report = build_index(ORIGIN, blocks(range(2001), VECTORS), tmp_path / "idx", update=True)
    assert (report.action, report.added) == ("updated", 1)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["idx"]


@pytest.mark.parametrize("stage", ["reading the embeddings", "updating", "measuring recall"])
def test_an_error_leaves_the_old_index(built, tmp_path, stage):
    shutil.copytree(built["flat"][0], tmp_path / "idx")

    def stop(now):
        if now == stage:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        build_index(ORIGIN, blocks(range(10), VECTORS), tmp_path / "idx", update=True, on_progress=stop)
    assert len(IndexFolder(tmp_path / "idx")) == 2000
    assert not list(tmp_path.glob(".idx.partial*"))


def test_a_full_disk_is_named_and_leaves_the_old_index(built, tmp_path, monkeypatch):
    shutil.copytree(built["flat"][0], tmp_path / "idx")

    def full(index, path):
        raise RuntimeError("Error in faiss::write_index\nwrite error: No space left on device")

    monkeypatch.setattr("faiss.write_index", full)
    with pytest.raises(OSError, match=r"write error: No space left on device; is the disk full\?"):
        build_index(ORIGIN, blocks(range(10), VECTORS), tmp_path / "idx", overwrite=True)
    assert len(IndexFolder(tmp_path / "idx")) == 2000
    assert not list(tmp_path.glob(".idx.partial*"))


def test_half_of_the_memory_is_the_default(monkeypatch):
    import psutil

    assert index_build.default_memory() == psutil.virtual_memory().total // 2
