"""Vectors in a database instead of a folder, so that search can outgrow one machine: LanceDB and Qdrant.

A table keeps what an index folder keeps: the rows, their vectors of length 1, and the model they come from. Tables are
named as "lancedb:DATABASE/TABLE" and "qdrant:DATABASE/COLLECTION"; DATABASE is a folder, or the address of a server or
of object storage as the client takes it.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from siglip_hf.extras import missing
from siglip_hf.search.backend import Backend, Neighbours, Origin, glob_to_regex, nearest_of

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("id", "path", "width", "height", "sha256", "text")
_METADATA = "siglip_hf"  # the name under which a table keeps its origin
BATCH = 1000  # rows written or removed at a time
#: Rows from which a LanceDB table gets an index of its own; Qdrant makes its graph by itself.
_LANCE_INDEX_ROWS = 100_000


class Table(Backend, Protocol):
    """A table that can be searched and written."""

    def hashes(self) -> dict[str, str | None]:
        """SHA-256 of the content of each row by its id."""
        ...

    def write(self, rows: pa.Table, vectors: np.ndarray) -> None:
        """Adds rows; those of the same id are replaced."""
        ...

    def remove(self, ids: Sequence[str]) -> None: ...
    def finish(self) -> None:
        """Called when all is written."""
        ...

    def close(self) -> None: ...


def open_table(name: str) -> Table:
    """A table that `export_source` filled.

    Args:
        name: "lancedb:DATABASE/TABLE" or "qdrant:DATABASE/COLLECTION".

    Raises:
        FileNotFoundError: if there is no such database or table.
        ImportError: naming the extra to install.
        ValueError: if the name is none, or the table is not of this package.
    """
    to, _, place = name.partition(":")
    kind, database, table = table_of(to, place)
    if "://" not in database and not os.path.isdir(database):
        raise FileNotFoundError(f"{database}: no such database; fill one with `siglip-hf index SOURCE --to {to}`")
    found = kind.open(database, table)
    if found is None:
        raise FileNotFoundError(f"{name}: there is no table {table!r} in {database}")
    return found


def table_of(to: str, place: str) -> tuple[Any, str, str]:
    """The class, the database and the table that "lancedb" or "qdrant" and "DATABASE/TABLE" name.

    Raises:
        ValueError: if they name none.
    """
    kinds = {"lancedb": LanceTable, "qdrant": QdrantTable}
    database, _, table = place.rstrip("/").rpartition("/")
    if to not in kinds:
        raise ValueError(f"{to!r} is no database that is known; choose lancedb or qdrant.")
    if not database or not table or database.endswith(":/"):
        raise ValueError(f"{place!r} does not name a table; write {to}:DATABASE/TABLE, such as {to}:vectors/pictures.")
    return kinds[to], database, table


def _origin(content: Any, name: str) -> Origin:
    try:
        return Origin(**json.loads(content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} was not made by this package; fill a table with `siglip-hf index --to`.") from error


class LanceTable:
    """A table of LanceDB."""

    kind = "lancedb"

    def __init__(self, table: Any, origin: Origin) -> None:
        self.table, self.origin = table, origin

    @staticmethod
    def _connect(database: str) -> Any:
        try:
            import lancedb
        except ImportError as error:
            raise missing("this needs LanceDB", "lancedb") from error
        return lancedb.connect(database)

    @classmethod
    def open(cls, database: str, name: str) -> LanceTable | None:
        connection = cls._connect(database)
        try:
            table = connection.open_table(name)
        except (ValueError, FileNotFoundError):  # both have been what a missing table raises
            return None
        metadata = table.schema.metadata or {}
        return cls(table, _origin(metadata.get(_METADATA.encode()), f"lancedb:{database}/{name}"))

    @classmethod
    def create(cls, database: str, name: str, origin: Origin) -> LanceTable:
        import pyarrow as pa

        kinds = {"width": pa.int32(), "height": pa.int32()}
        columns = [pa.field(column, kinds.get(column, pa.string())) for column in COLUMNS]
        vector = pa.field("vector", pa.list_(pa.float32(), origin.dimension))
        schema = pa.schema([*columns, vector], metadata={_METADATA: json.dumps(asdict(origin))})
        return cls(cls._connect(database).create_table(name, schema=schema, mode="overwrite"), origin)

    def __len__(self) -> int:
        return self.table.count_rows()

    def write(self, rows: pa.Table, vectors: np.ndarray) -> None:
        import pyarrow as pa

        flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
        rows = rows.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
        merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(rows.cast(self.table.schema))

    def remove(self, ids: Sequence[str]) -> None:
        self.table.delete(f"id IN ({', '.join(map(_sql, ids))})")

    def finish(self) -> None:
        if len(self) >= _LANCE_INDEX_ROWS:
            self.table.create_index(metric="dot", vector_column_name="vector")
        self.table.optimize()

    def close(self) -> None:
        pass

    def hashes(self) -> dict[str, str | None]:
        found = self.table.search().select(["id", "sha256"]).limit(max(1, len(self))).to_arrow()
        return dict(zip(found["id"].to_pylist(), found["sha256"].to_pylist(), strict=True))

    def neighbours(self, queries: np.ndarray, k: int, path_filter: str | None) -> list[Neighbours]:
        where = None
        if path_filter is not None:
            pattern = _sql(glob_to_regex(path_filter))
            where = f"regexp_like(path, {pattern}) OR regexp_like(id, {pattern})"
        return [self._nearest(query, k, where) for query in queries]

    def _nearest(self, query: np.ndarray, k: int, where: str | None) -> Neighbours:
        found: list[Neighbours] = []

        def fetch(limit: int) -> tuple[np.ndarray, np.ndarray]:
            search = self.table.search(query, vector_column_name="vector").distance_type("dot").refine_factor(10)
            search = search if where is None else search.where(where, prefilter=True)
            found[:] = [self._neighbours(search.limit(limit).select([*COLUMNS, "vector", "_distance"]).to_arrow())]
            return np.array(found[0].rows["id"].to_pylist()), found[0].vectors

        best = nearest_of(fetch, query, k)
        return Neighbours(found[0].rows.take(best), found[0].vectors[best])

    def sample(self, count: int) -> np.ndarray:
        return self._neighbours(self.table.head(count)).vectors

    def _neighbours(self, found: pa.Table) -> Neighbours:
        vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.origin.dimension)
        return Neighbours(found.select(["id", "path", "text"]), vectors)


def _sql(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


class QdrantTable:
    """A collection of Qdrant: a folder of its local mode, or a server's address."""

    kind = "qdrant"

    def __init__(self, client: Any, name: str, origin: Origin) -> None:
        self.client, self.name, self.origin = client, name, origin

    @staticmethod
    def _connect(database: str) -> Any:
        try:
            import qdrant_client
        except ImportError as error:
            raise missing("this needs the client of Qdrant", "qdrant") from error
        if "://" in database:
            return qdrant_client.QdrantClient(url=database)
        try:
            return qdrant_client.QdrantClient(path=database)
        except RuntimeError as error:  # its local mode has one user at a time
            raise OSError(f"{database} cannot be opened: {error}") from error

    @classmethod
    def open(cls, database: str, name: str) -> QdrantTable | None:
        client = cls._connect(database)
        try:
            if not client.collection_exists(name):
                client.close()
                return None
            metadata = client.get_collection(name).config.metadata or {}
            return cls(client, name, _origin(metadata.get(_METADATA), f"qdrant:{database}/{name}"))
        except BaseException:
            client.close()
            raise

    @classmethod
    def create(cls, database: str, name: str, origin: Origin) -> QdrantTable:
        client = cls._connect(database)
        from qdrant_client import models

        if client.collection_exists(name):
            client.delete_collection(name)
        client.create_collection(
            name,
            vectors_config=models.VectorParams(size=origin.dimension, distance=models.Distance.COSINE),
            metadata={_METADATA: json.dumps(asdict(origin))},
        )
        return cls(client, name, origin)

    def __len__(self) -> int:
        return self.client.count(self.name).count

    def write(self, rows: pa.Table, vectors: np.ndarray) -> None:
        from qdrant_client import models

        payloads = rows.to_pylist()
        points = models.Batch(
            ids=_point_ids(row["id"] for row in payloads), vectors=vectors.tolist(), payloads=payloads
        )
        self.client.upsert(self.name, points=points)

    def remove(self, ids: Sequence[str]) -> None:
        from qdrant_client import models

        self.client.delete(self.name, points_selector=models.PointIdsList(points=_point_ids(ids)))

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self.client.close()

    def hashes(self) -> dict[str, str | None]:
        return {payload["id"]: payload.get("sha256") for payload in self._payloads()}

    def _payloads(self) -> Iterator[dict[str, Any]]:
        offset = None
        while True:
            points, offset = self.client.scroll(
                self.name, limit=BATCH, offset=offset, with_payload=["id", "sha256"], with_vectors=False
            )
            yield from (point.payload for point in points)
            if offset is None:
                return

    def neighbours(self, queries: np.ndarray, k: int, path_filter: str | None) -> list[Neighbours]:
        pattern = None if path_filter is None else re.compile(glob_to_regex(path_filter))
        return [self._nearest(query, k, pattern) for query in queries]

    def _nearest(self, query: np.ndarray, k: int, pattern: re.Pattern[str] | None) -> Neighbours:
        found: list[Any] = []

        def fetch(limit: int) -> tuple[np.ndarray, np.ndarray]:
            # Qdrant has no patterns: more and more are asked for until enough of them match.
            asked, count = limit, len(self)
            while True:
                points = self.client.query_points(
                    self.name, query=query.tolist(), limit=asked, with_vectors=True
                ).points
                found[:] = [
                    point
                    for point in points
                    if pattern is None or any(pattern.match(point.payload[name] or "") for name in ("path", "id"))
                ][:limit]
                if len(found) >= limit or asked >= count:
                    break
                asked = min(4 * asked + 100, count)
            vectors = np.array([point.vector for point in found], np.float32).reshape(-1, self.origin.dimension)
            return np.array([point.payload["id"] for point in found]), vectors

        return self._neighbours([found[place] for place in nearest_of(fetch, query, k)])

    def sample(self, count: int) -> np.ndarray:
        points, _ = self.client.scroll(self.name, limit=count, with_vectors=True)
        return self._neighbours(points).vectors

    def _neighbours(self, points: Sequence[Any]) -> Neighbours:
        import pyarrow as pa

        rows = {name: [point.payload[name] for point in points] for name in ("id", "path", "text")}
        table = pa.table({name: pa.array(values, pa.string()) for name, values in rows.items()})
        vectors = np.array([point.vector for point in points], np.float32).reshape(-1, self.origin.dimension)
        return Neighbours(table, vectors)


def _point_ids(ids: Iterable[str]) -> list[Any]:
    """Qdrant names points by numbers or UUIDs only."""
    return [str(uuid.uuid5(uuid.NAMESPACE_URL, id_)) for id_ in ids]
