"""Tables that people bring: CSV, TSV or Parquet with named columns, as rows of text."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mgn_deploy.errors import UserError

PARQUET_MAGIC = b"PAR1"


class TableRow(NamedTuple):
    """A row: the line that it ends at (of Parquet its number), and its cells by column, stripped; "" where empty."""

    line: int
    cells: Mapping[str, str]

    @property
    def path(self) -> str:
        """The column path, with slashes and without a `./` in front."""
        return self.cells["path"].replace("\\", "/").removeprefix("./")


def read_table(path: str | os.PathLike[str], columns: Sequence[str] = ("path",)) -> list[TableRow]:
    """The rows of a CSV, TSV or Parquet file; a Parquet file is known by its content.

    Args:
        path: text is UTF-8, its columns divided by commas, semicolons or tabs and named in any case by its first line.
        columns: that have to be there once each; others are kept, too. The column path may not be empty.

    Raises:
        UserError: the file cannot be read, is no table, or lacks a column.
    """
    return parse_table(read_content(path), str(path), columns)


def parse_table(content: bytes, title: str, columns: Sequence[str] = ("path",)) -> list[TableRow]:
    """`read_table` of what was read already; `title` names it in messages."""
    rows = (
        _parquet_rows(content, title, columns)
        if content.startswith(PARQUET_MAGIC)
        else _text_rows(decode_text(content, title), title, columns)
    )
    if "path" in columns:
        for row in rows:
            if not row.path:
                raise UserError(f"{title}, line {row.line}: the path is empty")
    return rows


def read_content(path: str | os.PathLike[str]) -> bytes:
    """A table's bytes; UserError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def decode_text(content: bytes, title: str) -> str:
    """UTF-8 text without its byte order mark; UserError where it is something else."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{title} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def columns_of(header: str) -> list[str]:
    """The columns that a first line names, in lower case."""
    return [column.strip().lower() for column in next(csv.reader([header], delimiter=_delimiter(header)), [])]


def _delimiter(header: str) -> str:
    return max("\t;,", key=header.count)


def _text_rows(text: str, title: str, columns: Sequence[str]) -> list[TableRow]:
    lines = io.StringIO(text, newline=None)
    header = lines.readline().rstrip("\n")
    lines.seek(0)
    reader = csv.reader(lines, delimiter=_delimiter(header), strict=True)
    try:
        names = [column.strip().lower() for column in next(reader, [])]
        _check_columns(names, title, columns, header)
        rows = []
        for cells in reader:
            if any(map(str.strip, cells)):
                if len(cells) > len(names):
                    raise UserError(
                        f"{title}, line {reader.line_num}: {len(cells)} cells under {len(names)} columns; quote cells "
                        "with commas"
                    )
                cells += [""] * (len(names) - len(cells))
                rows.append(TableRow(reader.line_num, dict(zip(names, map(str.strip, cells), strict=True))))
        return rows
    except csv.Error as error:
        raise UserError(f"{title}, line {reader.line_num}: not a table ({error})") from None


def _parquet_rows(content: bytes, title: str, columns: Sequence[str]) -> list[TableRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(io.BytesIO(content)).read(use_threads=False)
        names = [column.strip().lower() for column in table.column_names]
        _check_columns(names, title, columns, ",".join(table.column_names))
        cells = [[_cell(value) for value in column.to_pylist()] for column in table.columns]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{title} is no Parquet file that can be read ({error})") from None
    return [
        TableRow(line, dict(zip(names, row, strict=True))) for line, row in enumerate(zip(*cells, strict=True), start=1)
    ]


def _cell(value: object) -> str:
    if value is None or value != value:  # NaN, as pandas writes a missing number
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _check_columns(names: Sequence[str], title: str, columns: Sequence[str], header: str) -> None:
    twice = any(name and names.count(name) > 1 for name in names)
    if twice or not set(columns) <= set(names):
        wanted = f"the columns {', '.join(columns)}, each once" if len(columns) > 1 else f"the column {columns[0]} once"
        raise UserError(f"{title}: the first line has to name {wanted}; it is {header[:80]!r}")
