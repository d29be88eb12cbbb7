"""A list of images: a path a line, or a table with a column path, from a file or from stdin."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from mgn_deploy.datasets.labels import table_labels
from mgn_deploy.datasets.tables import PARQUET_MAGIC, TableRow, columns_of, decode_text, parse_table, read_content
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.sources import Source, common_folder, files_source, name_below

LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv", ".parquet")
STDIN = "-"
_log = logging.getLogger("mgn_deploy")


def is_list(place: str) -> bool:
    """Whether `embed` takes a path as a list of images: stdin, or a file that is named as one."""
    return place == STDIN or (place.lower().endswith(LIST_SUFFIXES) and not os.path.isdir(place))


def list_source(place: str, root: str | os.PathLike[str] | None = None) -> Source:
    """The images that a list names; one that is missing has its `problem`, and one that is named twice counts once.

    Args:
        place: a text file with a path a line; a CSV, TSV or Parquet table with a column path, and perhaps identity and
            camera, which become the source's labels; `-`: one of these from stdin.
        root: what relative paths are below; by default the list's folder, of stdin the current one. Names are below it,
            or, without it and with absolute paths elsewhere, below the folder that holds all images.

    Raises:
        UserError: the list cannot be read, is no UTF-8, lacks a column or names nothing, or a path is outside `root`.
    """
    title = "stdin" if place == STDIN else place
    content = sys.stdin.buffer.read() if place == STDIN else read_content(place)
    table: list[TableRow] = []
    is_table = content.startswith(PARQUET_MAGIC) or place.lower().endswith((".csv", ".tsv", ".parquet"))
    if is_table or "path" in columns_of(decode_text(content, title).partition("\n")[0]):
        table = parse_table(content, title)
        names = [row.path for row in table]
    else:
        names = _lines(decode_text(content, title))
    _check(names, title)
    base = os.path.abspath(root if root else os.path.curdir if place == STDIN else os.path.dirname(place))
    paths = [os.path.abspath(os.path.join(base, name)) for name in names]
    if not root and any(name_below(path, base) is None for path in paths):
        base = common_folder(paths)
    skipped = Counter[str]()
    twice = len(paths) - len(set(paths))
    if twice:
        _log.warning(f"{title} names {twice} images again that it named before: each counts once")
        skipped["named twice"] = twice
    source = replace(files_source(paths, base, skipped), title=f"list {title!r}")
    if table and "identity" in table[0].cells:
        named = [
            row._replace(cells={**row.cells, "path": name_below(path, base) or ""})
            for row, path in zip(table, paths, strict=True)
        ]
        source.labels = table_labels(title, named)
        _log.info(f"{title} gives the labels, of its column identity (`embed --labels` takes others)")
    return source


def _lines(text: str) -> list[str]:
    """The lines that are not blank; what NUL divides, as `find -print0` does, where there is one."""
    parts = text.split("\0") if "\0" in text else [line.removesuffix("\r") for line in text.split("\n")]
    return [part for part in parts if part.strip()]


def _check(names: Sequence[str], title: str) -> None:
    if not names:
        raise UserError(f"{title} names no image: write a path a line, or a table with a column path")
    remote = next((name for name in names if "://" in name), None)
    if remote:
        raise UserError(
            f"{title} names {remote!r}: a list holds paths of this machine; give URLs themselves to `embed`"
        )
    nul = next((name for name in names if "\0" in name), None)
    if nul:
        raise UserError(f"{title}: {nul!r} has a NUL character, which no path has")
