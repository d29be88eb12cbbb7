"""`mgn-deploy demo`."""

from __future__ import annotations

from pathlib import Path

import typer

from mgn_deploy.cli.console import print_json, print_table, progress, say


def demo(
    out: Path = typer.Option(Path("mgn-demo"), "-o", "--out", help="Folder for everything that the demo makes; replaced if it is a demo's."),
    seconds: int = typer.Option(150, min=5, help="Seconds of training."),
    seed: int = typer.Option(0, help="Of the drawn people and of the training."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
) -> None:
    """Draw people, train a small MGN on them, export, prove, embed, validate: the whole way in under five minutes."""
    raise SystemExit
