"""A row of an embedding store, and rows as Parquet."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mgn_deploy.files import is_utf8, printable

ROWS = pa.schema(
    [
        ("path", pa.string()),  # below the source; bytes that are not UTF-8 as \\xNN
        ("path_bytes", pa.binary()),  # the name itself, only where it is not UTF-8
        ("size", pa.int64()),  # bytes
        ("mtime_ns", pa.int64()),
        ("sha256", pa.binary(32)),  # of the file's content
        ("status", pa.string()),  # ok, failed
        ("error", pa.string()),
        ("identity", pa.int32()),
        ("camera", pa.int32()),
        ("frame", pa.int64()),  # of a video, from 1
        ("time_s", pa.float64()),  # of that frame, from the video's start
        ("track", pa.int64()),
        ("box", pa.list_(pa.float32(), 4)),  # left, top, width, height in pixels of the frame or photo
    ]
)
_SINCE_2 = {"sha256", "frame", "time_s", "track", "box"}


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a store.

    Attributes:
        name: its path below the store's source.
        size: of the file, in bytes; None where even that could not be read.
        mtime_ns: the file's modification time, in ns since 1970; None as `size`.
        error: None where it was embedded, else the reason, in valid UTF-8.
        identity: the person's number, where the user said how to know it.
        camera: the camera's number, as `identity`.
        sha256: of the file's content; None where it could not be read, and in stores of schema 1.
        frame: the number of a video's frame, from 1.
        time_s: of that frame, in seconds from the video's start.
        track: the tracker's number of the person in the video.
        box: left, top, width and height of the crop in pixels of the frame or photo.
    """

    name: str
    size: int | None
    mtime_ns: int | None
    error: str | None
    identity: int | None
    camera: int | None
    sha256: bytes | None = None
    frame: int | None = None
    time_s: float | None = None
    track: int | None = None
    box: tuple[float, float, float, float] | None = None

    @property
    def path(self) -> str:
        """The name as UTF-8 text."""
        return printable(self.name)

    @property
    def path_bytes(self) -> bytes | None:
        """The name itself, where it is not UTF-8."""
        return None if is_utf8(self.name) else os.fsencode(self.name)

    @property
    def status(self) -> str:
        """`ok` or `failed`."""
        return "ok" if self.error is None else "failed"

    @property
    def file(self) -> str:
        """The name below the source of the image or, where the row is a box, of the photo or video that it is in."""
        return self.name if self.box is None else self.name.rpartition("#")[0]


def rows_table(rows: Sequence[Row], names: Sequence[str] = ROWS.names) -> pa.Table:
    """Some columns of `ROWS`, by their names."""
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    return pa.table(columns, schema=pa.schema([ROWS.field(name) for name in names]))


def rows_bytes(rows: Sequence[Row]) -> bytes:
    """The Parquet file of rows."""
    buffer = io.BytesIO()
    pq.write_table(rows_table(rows), buffer, compression="zstd")
    return buffer.getvalue()


def rows_of(table: pa.Table) -> list[Row]:
    """The rows of a Parquet file's table, of schema 1 too; ValueError, KeyError or TypeError where it is another's."""
    for field in ROWS:
        if field.name not in table.column_names and field.name in _SINCE_2:
            table = table.append_column(field, pa.nulls(len(table), field.type))
        elif table.schema.field(field.name).type != field.type:
            raise ValueError(f"column {field.name} is {table.schema.field(field.name).type}, not {field.type}")
    columns: dict[str, list[Any]] = table.select(ROWS.names).to_pydict()
    if None in columns["path"]:
        raise ValueError("a row without a path")
    columns["box"] = [box and tuple(box) for box in columns["box"]]
    del columns["status"]
    raw, names = columns.pop("path_bytes"), columns.pop("path")
    columns["name"] = [name if raw is None else os.fsdecode(raw) for name, raw in zip(names, raw, strict=True)]
    return [Row(*values) for values in zip(*(columns[key] for key in Row.__dataclass_fields__), strict=True)]
