"""An index by FAISS (Douze et al., "The Faiss library", 2024) in a folder.

INDEX/index.faiss     FAISS's own file; row i is that of the store's row i
INDEX/rows.parquet    path, identity and camera of each row
INDEX/manifest.json   `IndexManifest`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from mgn_deploy.bundle.kinds import refuse_other_kind
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.files import atomic_folder, sha256_file
from mgn_deploy.gallery.row import rows_table
from mgn_deploy.gallery.store import Store
from mgn_deploy.index.manifest import IndexManifest
from mgn_deploy.index.recall import RecallSample
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.rows import check_finite

FILES = ("index.faiss", "rows.parquet", "manifest.json")
LINKS = 32  # of a node in an HNSW graph (M of Malkov and Yashunin 2018)
CONSTRUCTION = 128  # efConstruction
EFFORTS = {"flat": (0,), "hnsw": (64, 128, 256, 512, 1024), "ivf-pq": (8, 16, 32, 64, 128, 256)}
CODE_DIMS = 8  # dimensions that one byte of a product quantizer's code stands for (Jégou et al. 2011)
TRAINING_ROWS = 65_536
LEAST_IVF_ROWS = 39 * 256  # FAISS wants 39 training rows for each of a code's 256 centroids


@dataclass(frozen=True)
class FaissIndex:
    """A FAISS index that is in memory, and how hard it searches: efSearch of hnsw, nprobe of ivf-pq."""

    index: Any
    effort: int

    @classmethod
    def open(cls, folder: Path, store: Store) -> FaissIndex:
        """Read an index folder.

        Raises:
            UserError: it is none, is damaged, or is not of this store as it is now.
        """
        try:
            refuse_other_kind(folder, "a search index")
            manifest = IndexManifest.read((folder / "manifest.json").read_bytes(), str(folder))
            manifest.check_store(store, str(folder))
            if sha256_file(folder / "index.faiss") != manifest.index_sha256:
                raise UserError(f"{folder}/index.faiss is damaged (its SHA-256 is not the manifest's): build it again")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{folder} is not an index: `mgn-deploy index build {store.folder} -o {folder}` makes one"
            ) from None
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}") from None
        with open(folder / "index.faiss", "rb") as file:  # faiss opens no path that is not UTF-8
            index = _faiss().read_index(_faiss().PyCallbackIOReader(file.read))
        return cls(index, manifest.effort)

    def candidates(self, asked: np.ndarray, n: int, only: np.ndarray | None = None) -> np.ndarray:
        """Rows int64 `[q, n]` that may be nearest to float32 `[q, dim]`, -1 where there are fewer.

        Args:
            asked: the queries.
            n: how many.
            only: where given, only these rows are looked at.
        """
        faiss = _faiss()
        chosen = None if only is None else faiss.IDSelectorBatch(only)
        if isinstance(self.index, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(sel=chosen, efSearch=max(self.effort, n))
        elif isinstance(self.index, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(sel=chosen, nprobe=self.effort)
        else:
            parameters = faiss.SearchParameters(sel=chosen)
        return self.index.search(asked, n, params=parameters)[1]


def build_faiss(
    store: Store,
    out: Path,
    kind: Literal["flat", "hnsw", "ivf-pq"],
    *,
    recall: float,
    seed: int,
    progress: Progress | None = None,
) -> IndexManifest:
    """Build an index, one shard of the store in memory beside it, and write its folder.

    The least search effort of a list that reaches the recall is kept in the manifest.

    Raises:
        GateFailed: no effort reaches the recall; nothing is written.
        UserError: too few rows for ivf-pq, embeddings that are not finite, or the folder cannot be written.
    """
    with atomic_folder(out, FILES) as folder:
        index = _empty(store, kind, seed)
        for rows, block in store.blocks():
            check_finite("gallery", block, rows.start)
            index.add(np.ascontiguousarray(block, np.float32))
            if progress:
                progress("indexing", rows.stop, len(store))
        sample = RecallSample(store, seed)
        for effort in EFFORTS[kind]:
            reached = sample.recall(FaissIndex(index, effort).candidates)
            if reached >= recall:
                break
        else:
            raise GateFailed(
                f"recall@10 of {kind} over {sample.size:,} rows is {reached:.4f} at its largest effort ({effort}), "
                f"below --recall {recall:g}: choose another --kind"
            )
        # Files and no paths: faiss and Arrow open none that is not UTF-8.
        with open(folder / "index.faiss", "wb") as file:
            _faiss().write_index(index, _faiss().PyCallbackIOWriter(file.write))
        with open(folder / "rows.parquet", "wb") as file:
            pq.write_table(rows_table(store.rows, ["path", "identity", "camera"]), file, compression="zstd")
        manifest = IndexManifest.of(
            store,
            kind=kind,
            effort=effort,
            recall_at_10=reached,
            recall_queries=sample.size,
            seed=seed,
            index_sha256=sha256_file(folder / "index.faiss"),
        )
        (folder / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _empty(store: Store, kind: str, seed: int) -> Any:
    """An index without rows; ivf-pq is trained on a sample."""
    import faiss

    dim = store.manifest.dim
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = CONSTRUCTION
        return graph
    if len(store) < LEAST_IVF_ROWS or dim % CODE_DIMS:
        raise UserError(
            f"ivf-pq needs {LEAST_IVF_ROWS:,} rows of a multiple of {CODE_DIMS} dimensions, and {store.folder} has "
            f"{len(store):,} of {dim}: choose --kind flat or hnsw"
        )
    rows = np.sort(np.random.default_rng(seed).permutation(len(store))[:TRAINING_ROWS])
    lists = min(int(4 * len(store) ** 0.5), len(rows) // 39)
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists, dim // CODE_DIMS, 8, faiss.METRIC_INNER_PRODUCT)
    training = np.asarray(store.take(rows), np.float32)
    check_finite("gallery", training)
    index.train(training)
    return index


def _faiss() -> Any:
    """The module, untyped: the type stubs of its release lack the search parameters' keywords and the I/O classes."""
    import faiss

    return faiss
