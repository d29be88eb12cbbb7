"""The log of a run: one CSV row an epoch, and the same values in TensorBoard."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from mgn_deploy.errors import UserError

CSV = "epochs.csv"
FIELDS = ("epoch", "seconds", "lr", "loss", "softmax", "triplet", "images_per_second", "rank-1", "mAP")


class RunLog:
    """`epochs.csv` and `tensorboard` of a run's folder, a row an epoch."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        """Open both; rows of epochs that are going to be run again are dropped.

        Args:
            folder: the run's.
            first_epoch: the run's next epoch, counted from 0.

        Raises:
            UserError: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "training writes TensorBoard logs: pip install 'mgn-deploy[train]' (tensorboard is missing)"
            ) from None
        path = folder / CSV
        rows = []
        if path.is_file():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= first_epoch]
        self._file = open(path, "w", newline="")  # noqa: SIM115
        self._writer = csv.DictWriter(self._file, FIELDS)
        self._writer.writeheader()
        self._writer.writerows(rows)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch + 1)

    def write(self, row: dict[str, float]) -> None:
        """Add a row: values by `FIELDS`, the epoch counted from 1; missing ones stay empty."""
        self._writer.writerow(row)
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in row.items():
            if name != "epoch":
                self._board.add_scalar(name, value, int(row["epoch"]))

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()
