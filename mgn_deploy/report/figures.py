"""Figures as PNG files: training curves, a calibration, and attention maps (the paper's Figure 5)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mgn_deploy.datasets.tables import read_table
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file, cache_folder
from mgn_deploy.packages import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mgn_deploy.identity.calibration import Calibration

DPI = 120


def draw_curves(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Draw a training run's losses, learning rate and, where it was evaluated, rank-1 and mAP, by epoch.

    Args:
        run: the run's folder.
        out: the PNG.

    Raises:
        CannotRun: matplotlib is not installed.
        UserError: `run` holds no `epochs.csv` of a training run, one of something else, or one without a finished
            epoch.
    """
    table = Path(run) / "epochs.csv"
    if not table.is_file():
        raise UserError(f"{run} is no training run: it has no {table.name}, as `mgn-deploy train -o {run}` writes it")
    rows = [line.cells for line in read_table(table, ("epoch", "lr", "loss", "softmax", "triplet"))]
    if not rows:
        raise UserError(f"{table} has no finished epoch yet: draw it later")

    def column(name: str) -> tuple[list[int], list[float]]:
        there = [row for row in rows if row.get(name.lower())]
        try:
            return [int(row["epoch"]) for row in there], [float(row[name.lower()]) for row in there]
        except ValueError as error:
            raise UserError(f"{table} is not as `mgn-deploy train` writes it: {error}") from None

    figure = _new_figure(12, 3.6)
    losses, rate, accuracy = figure.subplots(1, 3)
    for name in ("loss", "softmax", "triplet"):
        losses.plot(*column(name), label=name)
    losses.set(title="loss, mean of the epoch", xlabel="epoch", ylim=(0, None))
    losses.legend()
    rate.plot(*column("lr"))
    rate.set(title="learning rate", xlabel="epoch", yscale="log")
    for name in ("rank-1", "mAP"):
        epochs, values = column(name)
        accuracy.plot(epochs, [100 * value for value in values], marker="o", label=name)
    accuracy.set(title="held-out people, %", xlabel="epoch", ylim=(0, 100))
    accuracy.legend()
    for axes in (losses, rate, accuracy):
        axes.grid(alpha=0.3)
    _save(figure, out)


def draw_calibration(made: Calibration, out: str | os.PathLike[str]) -> None:
    """Draw how reliable a calibration's probabilities are on held-out people, and its threshold of each rate.

    Args:
        made: a bundle's calibration.
        out: the PNG.

    Raises:
        CannotRun: matplotlib is not installed.
    """
    figure = _new_figure(10, 4)
    reliability, thresholds = figure.subplots(1, 2)
    means = [row.mean_probability for row in made.reliability]
    reliability.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    reliability.plot(means, [row.genuine_share for row in made.reliability], marker="o")
    for row in made.reliability:
        where = (row.mean_probability, row.genuine_share)
        reliability.annotate(f"{row.pairs:,}", where, (6, -9), textcoords="offset points", fontsize=7)
    brier = made.cross_validation[made.method].brier
    reliability.set(
        title=f"held-out people, {made.method}: Brier {brier:.4f}",
        xlabel=f"mean probability where {made.prior:.0%} of pairs are one person",
        ylabel="share of one person (numbers: pairs)",
    )
    of_images = {1: made.tail, **{one.images: one.tail for one in made.pooled}}
    for images, tail in of_images.items():
        label = "two images" if images == 1 else f"mean over {images} images"
        thresholds.plot([threshold for _, threshold in tail], [rate for rate, _ in tail], label=label)
    for rate in made.rates:
        thresholds.plot([rate.threshold.low, rate.threshold.high], [rate.far] * 2, color="C0", linewidth=5, alpha=0.4)
    thresholds.set(title="false-accept rate; bars: 95% of draws of people", xlabel="threshold", yscale="log")
    thresholds.legend()
    for axes in (reliability, thresholds):
        axes.grid(alpha=0.3)
    _save(figure, out)


def draw_attention(
    crops: np.ndarray, maps: np.ndarray, names: Sequence[str], columns: Sequence[str], out: str | os.PathLike[str]
) -> None:
    """Draw a row for each image: the crop, then each branch's map over it.

    Args:
        crops: uint8 RGB `[n, height, width, 3]`.
        maps: 0 to 1, `[n, branches, height, width]`.
        names: of the images.
        columns: names of the branches.
        out: the PNG.

    Raises:
        CannotRun: matplotlib is not installed.
    """
    count, branches = maps.shape[:2]
    height, width = crops.shape[1:3]
    side = 2.6
    figure = _new_figure((branches + 1) * side * width / height + 0.6, count * side + 0.4)
    grid = figure.subplots(count, branches + 1, squeeze=False)
    for row, (crop, name) in enumerate(zip(crops, names, strict=True)):
        _picture(grid[row][0], crop, _short(name))
        for column in range(branches):
            axes = grid[row][column + 1]
            _picture(axes, crop, columns[column] if row == 0 else "")
            axes.imshow(maps[row, column], cmap="jet", alpha=0.5, vmin=0, vmax=1)
    _save(figure, out)


def _picture(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels)
    axes.set_title(title, fontsize=7, parse_math=False)
    axes.set_axis_off()


def _short(name: str) -> str:
    """A name that can be drawn: bytes that are no UTF-8 and line breaks spelled out, cut if long."""
    name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return name if len(name) <= 16 else name[:13] + "..."


def _new_figure(width: float, height: float) -> Figure:
    with suppress(UserError):  # this user has no cache folder: matplotlib takes a temporary one
        os.environ.setdefault("MPLCONFIGDIR", str(cache_folder("matplotlib")))  # not folders of its own in the home
    require("matplotlib", "figures", "figures are drawn by matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, out: str | os.PathLike[str]) -> None:
    with atomic_file(Path(out)) as file:
        figure.savefig(file, format="png", dpi=DPI)
