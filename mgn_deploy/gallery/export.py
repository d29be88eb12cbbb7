"""A store's embeddings in files that other tools read: Parquet, .npy or CSV."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file
from mgn_deploy.gallery.row import ROWS, rows_table
from mgn_deploy.gallery.store import Store

SUFFIXES = (".parquet", ".npy", ".csv")
_COLUMNS = [name for name in ROWS.names if name not in ("path_bytes", "status", "error", "sha256")]


def export_store(store: Store, out: str | os.PathLike[str]) -> Path:
    """Write the embedded images of a store to one file, a shard at a time.

    Args:
        store: its failures are left out.
        out: .parquet: the columns of the rows and `embedding`, a FixedSizeList; .npy: the embeddings alone, in the
            order of `store.rows`; .csv: path, identity, camera and so on, then one column a dimension.

    Raises:
        UserError: another suffix, a damaged store, or the file cannot be written.
    """
    path = Path(out)
    writers = {".parquet": _parquet, ".npy": _npy, ".csv": _csv}
    if path.suffix not in writers:
        raise UserError(f"{path}: the file's name has to end with {', '.join(SUFFIXES)}")
    with atomic_file(path) as file:
        writers[path.suffix](store, file)  # type: ignore[arg-type]
    return path


def _parquet(store: Store, file: io.BufferedWriter) -> None:
    element = pa.float16() if store.manifest.dtype == "float16" else pa.float32()
    embedding = pa.field("embedding", pa.list_(element, store.manifest.dim))
    schema = pa.schema([*(ROWS.field(name) for name in _COLUMNS), embedding])
    schema = schema.with_metadata({"mgn_deploy.bundle_id": store.manifest.bundle_id, "source": store.manifest.source})
    # Of embeddings a dictionary and the least and largest values help nobody, and take five sixths of the time.
    told = {"use_dictionary": _COLUMNS, "write_statistics": _COLUMNS}
    with pq.ParquetWriter(file, schema, compression="zstd", **told) as writer:
        for rows, embeddings in store.blocks():
            values = pa.array(np.ascontiguousarray(embeddings).reshape(-1), element)
            column = pa.FixedSizeListArray.from_arrays(values, store.manifest.dim)
            writer.write_table(rows_table(store.rows[rows], _COLUMNS).append_column(embedding, column))


def _npy(store: Store, file: io.BufferedWriter) -> None:
    shape = (len(store), store.manifest.dim)
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.dtype(store.manifest.dtype).str, "fortran_order": False, "shape": shape}
    )
    for _, embeddings in store.blocks():
        file.write(np.ascontiguousarray(embeddings).data)


def _csv(store: Store, file: io.BufferedWriter) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    names = [name for name in _COLUMNS if name != "box"]
    writer.writerow([*names, *(f"e{number}" for number in range(store.manifest.dim))])
    for rows, embeddings in store.blocks():
        for row, embedding in zip(store.rows[rows], embeddings, strict=True):
            cells = ["" if (value := getattr(row, name)) is None else value for name in names]
            writer.writerow([*cells, *(f"{value:.9g}" for value in embedding.tolist())])
    text.detach()  # which flushes, and leaves the file open
