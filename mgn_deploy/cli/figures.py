"""`mgn-deploy figures`: curves, calibration and attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgn_deploy.cli.options import Bundle, Json, out
from mgn_deploy.console import print_result
from mgn_deploy.packages import require_training

app = typer.Typer(help="Draw training curves, a calibration or attention maps as PNG.", no_args_is_help=True)


@app.command(epilog="Example:\n\nmgn-deploy figures curves run -o curves.png")
def curves(
    run: Annotated[
        Path, typer.Argument(help="The folder of a training run, as `train -o` made it; it may still be going on.")
    ],
    figure: Annotated[Path, out("The PNG to write.")] = Path("curves.png"),
    json: Json = False,
) -> None:
    """Draw losses, learning rate, rank-1 and mAP by epoch."""
    from mgn_deploy.report.figures import draw_curves

    draw_curves(run, figure)
    print_result(json, {"figure": str(figure), "run": str(run)}, figure)


@app.command(epilog="Example:\n\nmgn-deploy figures calibration --bundle bundle -o calibration.png")
def calibration(
    bundle: Bundle, figure: Annotated[Path, out("The PNG to write.")] = Path("calibration.png"), json: Json = False
) -> None:
    """Draw reliability and thresholds of a bundle's calibration."""
    from mgn_deploy.bundle.bundle import Bundle as Opened
    from mgn_deploy.identity.calibration import Calibration
    from mgn_deploy.report.figures import draw_calibration

    draw_calibration(Calibration.open(Opened.open(bundle)), figure)
    print_result(json, {"figure": str(figure), "bundle": str(bundle)}, figure)


@app.command(epilog="Example:\n\nmgn-deploy figures attention weights photos -o attention.png")
def attention(
    weights: Annotated[Path, typer.Argument(help="A weights folder.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    figure: Annotated[Path, out("The PNG to write.")] = Path("attention.png"),
    limit: Annotated[int, typer.Option(help="Most images to draw, 1 to 64.")] = 8,
    json: Json = False,
) -> None:
    """Draw where each branch looks on images (the paper's Figure 5)."""
    require_training()
    from mgn_deploy.train.attention import draw_attention_on

    drawn = draw_attention_on(weights, images, figure, limit)
    print_result(json, {"figure": str(figure), "images": drawn}, figure)
