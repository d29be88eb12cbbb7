"""`mgn-deploy import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mgn_deploy.console import print_json, say
from mgn_deploy.packages import require_training

if TYPE_CHECKING:
    from mgn_deploy.train.importers.importing import Report


def import_checkpoint(
    checkpoint: Path = typer.Argument(help="A public MGN's .pth, .pt or .safetensors."),
    out: Path = typer.Option(..., "-o", "--out", help="The weights folder to write."),
    source: str = typer.Option(
        "auto", "--from", help="Whose code wrote it: auto, fastreid, seathiefwang, levyfan or gnayuohz."
    ),
    pool: str | None = typer.Option(None, help="max, avg or gem, where the checkpoint does not tell."),
    global_stride: int | None = typer.Option(None, help="Of the global branch's layer4: 1 or 2."),
    stem_pool: str | None = typer.Option(None, help="Alignment of the stem's max pooling: padded or ceil."),
    size: str | None = typer.Option(None, help="Input HEIGHTxWIDTH in pixels; 384x128 without it."),
    json: bool = typer.Option(False, "--json", help="Print what was read, assumed and dropped as JSON."),
) -> None:
    """Turn a public MGN checkpoint into a weights folder; what its tensors do not tell is assumed, and said."""
    from mgn_deploy.config import parse_size

    pixels = parse_size(size) if size else None
    require_training()
    from mgn_deploy.train.importers.importing import import_checkpoint as run

    # The library checks the choices.
    choices: Any = {"pooling": pool, "global_stride": global_stride, "stem_pool": stem_pool, "size": pixels}
    report = run(checkpoint, out, source, **choices)  # type: ignore[arg-type]
    _tell(report)
    if json:
        print_json({"weights": str(out), **report.json()})
    else:
        print(out)


def _tell(report: Report) -> None:
    say(f"{report.checkpoint}: {report.title}")
    shown = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in report.read.items()
    }
    say("read " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items()))
    for one in report.assumed:
        say(f"assumed {one.what} {one.value}, override with {one.option}")
    for group in report.dropped:
        say(f"dropped {len(group.names)} ({group.reason}): {', '.join(group.names)}")
    if report.filled:
        say(f"set {len(report.filled)} missing num_batches_tracked to 0: inference does not use them")
    say(report.evaluation)
