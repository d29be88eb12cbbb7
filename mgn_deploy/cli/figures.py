"""`mgn-deploy figures`: curves and attention."""

from __future__ import annotations

from pathlib import Path

import typer

from mgn_deploy.errors import UserError
from mgn_deploy.packages import require_training

app = typer.Typer(help="Draw training curves or attention maps as PNG.", no_args_is_help=True)


@app.command()
def curves(
    run: Path = typer.Argument(help="The folder of a training run, as `train -o` made it; it may still be going on."),
    out: Path = typer.Option(Path("curves.png"), "-o", "--out", help="The PNG to write."),
) -> None:
    """Losses, learning rate, rank-1 and mAP by epoch."""
    from mgn_deploy.report.figures import draw_curves

    draw_curves(run, out)
    print(out)


@app.command()
def attention(
    weights: Path = typer.Argument(help="A weights folder."),
    images: list[Path] = typer.Argument(help="Image files, or folders of them."),
    out: Path = typer.Option(Path("attention.png"), "-o", "--out", help="The PNG to write."),
    limit: int = typer.Option(8, min=1, max=64, help="Most images to draw."),
) -> None:
    """Where each branch looks on given images (the paper's Figure 5)."""
    require_training()
    import numpy as np

    from mgn_deploy.errors import UnreadableImage
    from mgn_deploy.images.decode import read_crop
    from mgn_deploy.report.figures import draw_attention
    from mgn_deploy.train.attention import attention_maps
    from mgn_deploy.train.weights import load_weights

    model = load_weights(weights)
    files = _files(images)[:limit]
    try:
        crops = np.stack([read_crop(file, model.config.height, model.config.width) for file in files])
    except UnreadableImage as error:
        raise UserError(f"an image cannot be drawn: {error}") from error
    columns = ["global" if stripes == 1 else f"part-{stripes}" for stripes in model.config.branches]
    draw_attention(crops, attention_maps(model, crops), [file.name for file in files], columns, out)
    print(out)


def _files(given: list[Path]) -> list[Path]:
    from mgn_deploy.images.listing import list_images

    files = []
    for path in given:
        files += [file.path for file in list_images(path)] if path.is_dir() else [path]
    return files
