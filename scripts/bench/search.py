"""Build time, memory, latency and recall of an index of synthetic clustered vectors.

    python scripts/bench/search.py                                   # 1,000,000 x 768, the kind that is chosen
    python scripts/bench/search.py --count 100000 --kind hnsw        # another size, a kind of one's own choice

Vectors lie around random centres, as pictures of many kinds do; queries are drawn from the same and are not in the
index. Building and searching are processes of their own; memory is the most that was resident in each, mapped pages of
the vectors' file (which the system may take back) included. Latency is of one query at a time, with the 10 answers'
exact cosines; recall@10 is against all vectors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from siglip_hf.search.backend import Origin
from siglip_hf.search.build import build_index
from siglip_hf.search.index import IndexFolder
from siglip_hf.search.kinds import KINDS, parse_bytes

BLOCK = 16_384


def draw(seed: int, count: int, dimension: int, centres: int, noise: float) -> np.ndarray:
    """Vectors (count, dimension) of length 1 around `centres` directions; noise as a multiple of a centre's length."""
    directions = np.random.default_rng(0).standard_normal((centres, dimension), np.float32)
    rng = np.random.default_rng(seed)
    vectors = directions[rng.integers(0, centres, count)]
    vectors += noise * rng.standard_normal((count, dimension), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def blocks(options: argparse.Namespace) -> Iterator[tuple[pa.Table, np.ndarray]]:
    for start in range(0, options.count, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, options.count))
        ids = pa.array([f"{number:07d}.jpg" for number in numbers])
        sizes = pa.array(np.full(len(numbers), 640, np.int32))
        nothing = pa.nulls(len(numbers), pa.string())
        names = ["id", "path", "width", "height", "sha256", "text"]
        table = pa.Table.from_arrays([ids, ids, sizes, sizes, nothing, nothing], names)
        yield table, draw(1 + start, len(numbers), options.dimension, options.centres, options.noise)


def build(options: argparse.Namespace) -> dict:
    origin = Origin("synthetic", "0" * 64, options.dimension, "image")
    stages: list[tuple[str, float]] = []
    report = build_index(
        origin,
        blocks(options),
        options.folder,
        kind=options.kind,
        memory=parse_bytes(options.memory),
        on_progress=lambda stage: stages.append((stage, time.perf_counter())),
    )
    stages.append(("end", time.perf_counter()))
    seconds = {name: round(end - start, 1) for (name, start), (_, end) in itertools.pairwise(stages)}
    return {
        "kind": report.kind,
        "reason": report.reason,
        "effort": report.effort,
        "recall@10 as printed": round(report.recall, 4),
        "build seconds": seconds,
        "index file GB": round(report.bytes / 1e9, 2),
        "build peak GB": peak_gigabytes(),
    }


def search(options: argparse.Namespace) -> dict:
    start = time.perf_counter()
    folder = IndexFolder(options.folder)
    opened = time.perf_counter() - start
    queries = draw(2**31, options.queries, options.dimension, options.centres, options.noise)
    truth = exact_nearest(folder, queries)
    hits, seconds = 0, []
    for query, best in zip(queries, truth, strict=True):
        start = time.perf_counter()
        ((rows, _),) = folder.nearest(query[None], 10)
        seconds.append(time.perf_counter() - start)
        hits += len(set(rows.tolist()) & set(best.tolist()))
    p50, p95 = np.percentile(np.array(seconds) * 1000, [50, 95])
    return {
        "open, with checksums, seconds": round(opened, 1),
        "p50 ms": round(float(p50), 2),
        "p95 ms": round(float(p95), 2),
        "recall@10": round(hits / (10 * len(queries)), 4),
        "search peak GB": peak_gigabytes(),
    }


def exact_nearest(folder: IndexFolder, queries: np.ndarray) -> np.ndarray:
    """Rows (q, 10) of highest cosine, by comparing all; the file is read, so that it does not count as memory."""
    best_rows = np.zeros((len(queries), 0), np.int64)
    best = np.zeros((len(queries), 0), np.float32)
    with open(folder.path / "vectors.f16", "rb") as file:
        for start in range(0, len(folder), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(folder)))
            vectors = np.fromfile(file, np.float16, len(rows) * queries.shape[1]).reshape(len(rows), -1)
            best = np.concatenate([best, queries @ vectors.astype(np.float32).T], axis=1)
            best_rows = np.concatenate([best_rows, np.broadcast_to(rows, (len(queries), len(rows)))], axis=1)
            top = np.argpartition(-best, 9, axis=1)[:, :10]
            best, best_rows = np.take_along_axis(best, top, 1), np.take_along_axis(best_rows, top, 1)
    return best_rows


def peak_gigabytes() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--centres", type=int, default=5000)
    parser.add_argument("--noise", type=float, default=0.8)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--part", choices=("build", "search"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(build(options) if options.part == "build" else search(options)))
        return
    print(f"{options.count:,} x {options.dimension}, {os.cpu_count()} cores of {platform.processor() or 'a CPU'}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "index"
        for part in ("build", "search"):
            line = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--folder", str(folder)]
            result = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for name, value in result.items():
                print(f"  {name}: {value}", flush=True)


if __name__ == "__main__":
    main()
