"""The log of a run: one CSV row an epoch, and the same values in TensorBoard where that is installed."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path
from typing import Any

from mgn_deploy.files import write_text

_log = logging.getLogger("mgn_deploy")

CSV = "epochs.csv"
FIELDS = ("epoch", "seconds", "lr", "loss", "softmax", "triplet", "images_per_second", "rank-1", "mAP")


class RunLog:
    """`epochs.csv` and `tensorboard` of a run's folder, a row an epoch."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        """Read the rows that are there; those of epochs that are going to be run again are dropped.

        Args:
            folder: the run's.
            first_epoch: the next epoch that is logged, counted from 0.
        """
        self._path = folder / CSV
        self._rows: list[dict[str, Any]] = []
        if self._path.is_file():
            with open(self._path, newline="", encoding="utf-8", errors="replace") as file:
                rows = [{field: row.get(field) for field in FIELDS} for row in csv.DictReader(file)]
            kept = {str(epoch) for epoch in range(1, first_epoch + 1)}
            self._rows = [row for row in rows if row["epoch"] in kept]
        self._board = _board(folder, first_epoch + 1)

    def write(self, row: dict[str, float]) -> None:
        """Add a row, values by `FIELDS`, the epoch counted from 1; missing ones stay empty.

        The file is written anew and takes its name at once: a run that is killed keeps every earlier row.

        Raises:
            UserError: the folder is not writable or the disk is full.
        """
        self._rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS)
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self._path, text.getvalue())
        for name, value in row.items():
            if self._board and name != "epoch":
                self._board.add_scalar(name, value, int(row["epoch"]))

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board:
            self._board.close()


def _board(folder: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning(f"no TensorBoard files beside {CSV}: pip install 'mgn-deploy[train]' (tensorboard is missing)")
        return None
    try:
        return SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)
    except UnicodeEncodeError:
        _log.warning(f"no TensorBoard files beside {CSV}: TensorBoard writes to no path that is not UTF-8")
        return None
