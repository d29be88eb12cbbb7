"""An index in Milvus by pymilvus: in a local database (milvus-lite) or on a server, by the same code.

A collection has one entry for each row of the store. Its key is the SHA-256 of the row's path, not the path: pymilvus
pastes keys that are to be deleted into a filter expression without escaping them, and paths may hold quotes. A second
collection, NAME_state, has one entry, the manifest. It is removed before anything changes and written last: without it
the index is unfinished, `search` refuses it, and the next build goes on from what is there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.files import sha256_bytes
from mgn_deploy.gallery.store import Store
from mgn_deploy.index.manifest import IndexManifest
from mgn_deploy.index.milvus_client import connected, retried
from mgn_deploy.index.recall import RecallSample
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.rows import check_finite

_log = logging.getLogger("mgn_deploy")
COLLECTION = "mgn_deploy"  # unless the URL's fragment names another one
BATCH_ROWS = 256  # 2 MiB of 2048 numbers: far below what a gRPC message may hold
SEARCH_ROWS = 64
NO_TIME = -1.0  # of rows that are of no video
MOST_NEIGHBOURS = 16_384  # https://milvus.io/docs/limitations.md
CALL_SECONDS = 30.0


class MilvusIndex:
    """The entries of a store in a collection of Milvus."""

    def __init__(self, client: Any, target: str, store: Store) -> None:
        self._client = client
        self._target = target
        self._store = store
        self._collection = urlsplit(target).fragment or COLLECTION
        self._state = f"{self._collection}_state"
        self._rows = {sha256_bytes(row.path.encode()): number for number, row in enumerate(store)}

    def candidates(
        self,
        asked: np.ndarray,
        n: int,
        camera: int | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> np.ndarray:
        """Rows int64 `[q, n]` that may be nearest to float32 `[q, dim]`, -1 where there are fewer; of a camera, and
        from and up to seconds of a video."""
        wanted = {"camera ==": camera, "time_s >=": since, "time_s <=": until}
        rules = [f"{rule} {value!r}" for rule, value in wanted.items() if value is not None]
        if since is not None or until is not None:
            rules.append(f"time_s > {NO_TIME!r}")
        rows = np.full((len(asked), n), -1, np.int64)
        for start in range(0, len(asked), SEARCH_ROWS):
            found = self._call(
                "search",
                self._collection,
                data=asked[start : start + SEARCH_ROWS],
                anns_field="embedding",
                limit=min(n, MOST_NEIGHBOURS),
                filter=" and ".join(rules),
                search_params={"metric_type": "IP"},
            )
            for query, hits in enumerate(found, start):
                numbers = [self._rows.get(hit["key"], -1) for hit in hits]
                rows[query, : len(numbers)] = numbers
        return rows

    def check(self) -> None:
        """Raise UserError unless the index is finished and of this store as it is now."""
        again = f"run `mgn-deploy index build {self._store.folder} -o {self._target}`"
        entries = []
        if self._has(self._state):
            self._call("load_collection", self._state)
            entries = self._call("get", self._state, ids=["manifest"])
        if not entries:
            if self._has(self._collection):
                raise UserError(f"the index in {self._target} was not finished: {again}, which goes on")
            raise UserError(f"{self._target} holds no index {self._collection}: {again}")
        IndexManifest.read(entries[0]["manifest"], self._target).check_store(self._store, self._target)
        self._call("load_collection", self._collection)

    def build(self, recall: float, seed: int, progress: Progress | None) -> IndexManifest:
        """Bring the collection to what the store holds, measure it and write the manifest."""
        self._open_for_writing()
        there = self._digests()
        upserted = self._upsert(there, progress)
        gone = [key for key in there if key not in self._rows]
        for start in range(0, len(gone), BATCH_ROWS):
            self._call("delete", self._collection, ids=gone[start : start + BATCH_ROWS])
        _log.info(
            f"{self._target}: {upserted:,} rows upserted, {len(gone):,} deleted, "
            f"{len(self._rows) - upserted:,} were there"
        )
        self._call("flush", self._collection)  # what is not flushed is compared exactly, which is no measure of it
        self._call("load_collection", self._collection)
        sample = RecallSample(self._store, seed)
        reached = sample.recall(self.candidates)
        if reached < recall:
            raise GateFailed(
                f"recall@10 of milvus over {sample.size:,} rows is {reached:.4f}, below --recall {recall:g}: the index "
                f"in {self._target} stays unfinished"
            )
        manifest = IndexManifest.of(
            self._store, kind="milvus", effort=0, recall_at_10=reached, recall_queries=sample.size, seed=seed
        )
        entry = {"key": "manifest", "manifest": manifest.model_dump_json(), "unused": [0.0, 1.0]}
        self._call("upsert", self._state, [entry])
        return manifest

    def _open_for_writing(self) -> None:
        """Make the two collections, or remove the manifest of those that are there."""
        from pymilvus import DataType

        dim = self._store.manifest.dim
        if self._has(self._collection):
            described = self._call("describe_collection", self._collection)
            dims = [field["params"].get("dim") for field in described["fields"] if field["name"] == "embedding"]
            named = {field["name"] for field in described["fields"]}
            if dims != [dim] or "time_s" not in named or not self._has(self._state):
                raise UserError(
                    f"{self._target} has a collection {self._collection} that is no index of {dim} dimensions: name "
                    "another database, or another collection of a server as http://HOST:PORT#COLLECTION"
                )
            self._call("load_collection", self._collection)
            self._call("load_collection", self._state)
            self._call("delete", self._state, ids=["manifest"])
            return
        if not self._has(self._state):  # first, so that entries without a state are nobody's
            self._create(self._state, "unused", 2, manifest=(DataType.VARCHAR, 65_535))
        self._create(
            self._collection,
            "embedding",
            dim,
            path=(DataType.VARCHAR, 65_535),
            digest=(DataType.VARCHAR, 64),
            identity=(DataType.INT64, None),
            camera=(DataType.INT64, None),
            time_s=(DataType.DOUBLE, None),
        )

    def _create(self, name: str, vector: str, dim: int, **fields: tuple[Any, int | None]) -> None:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field(vector, DataType.FLOAT_VECTOR, dim=dim)
        for field, (kind, length) in fields.items():
            schema.add_field(field, kind, **({} if length is None else {"max_length": length}))
        index = self._client.prepare_index_params()
        index.add_index(vector, index_type="AUTOINDEX", metric_type="IP")
        self._call("create_collection", name, schema=schema, index_params=index, consistency_level="Strong")

    def _digests(self) -> dict[str, str]:
        """What each entry that is there was made of, by key."""
        there: dict[str, str] = {}
        entries = self._call(
            "query_iterator", self._collection, batch_size=1000, filter="", output_fields=["key", "digest"]
        )
        while batch := retried(entries.next, self._target):
            there.update((entry["key"], entry["digest"]) for entry in batch)
        entries.close()
        return there

    def _upsert(self, there: dict[str, str], progress: Progress | None) -> int:
        """Write the rows that are not there, or differ; how many."""
        keys, identities, cameras = list(self._rows), self._store.identities(), self._store.cameras()
        upserted = 0
        for rows, block in self._store.blocks():
            check_finite("gallery", block, rows.start)
            entries = []
            for number, embedding in enumerate(np.asarray(block, np.float32), rows.start):
                row = self._store.rows[number]
                entry: dict[str, Any] = {
                    "identity": int(identities[number]),
                    "camera": int(cameras[number]),
                    "time_s": NO_TIME if row.time_s is None else row.time_s,
                }
                digest = sha256_bytes(embedding.tobytes() + repr(tuple(entry.values())).encode())
                if there.get(keys[number]) != digest:
                    entry |= {"key": keys[number], "embedding": embedding, "path": row.path, "digest": digest}
                    entries.append(entry)
            for start in range(0, len(entries), BATCH_ROWS):
                self._call("upsert", self._collection, entries[start : start + BATCH_ROWS])
            upserted += len(entries)
            if progress:
                progress("indexing", rows.stop, len(self._store))
        return upserted

    def _has(self, collection: str) -> bool:
        return bool(self._call("has_collection", collection))

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        call = getattr(self._client, method)
        return retried(lambda: call(*arguments, timeout=CALL_SECONDS, **options), self._target)


@contextmanager
def opened(target: str, store: Store, *, create: bool = False) -> Iterator[MilvusIndex]:
    """The index of a store in a database that `connected` opens, and closes after it."""
    with connected(target, create=create) as client:
        yield MilvusIndex(client, target, store)
