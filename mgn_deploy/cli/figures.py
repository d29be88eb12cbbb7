"""`mgn-deploy figures`: curves, attention and ranks."""

from __future__ import annotations

from pathlib import Path

import typer

from mgn_deploy.console import BACKENDS
from mgn_deploy.errors import UserError
from mgn_deploy.packages import require_training

app = typer.Typer(help="Draw training curves, attention maps or rank lists as PNG.", no_args_is_help=True)


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


@app.command()
def ranks(
    query: Path = typer.Argument(help="An embedding store, or with --bundle an image or a folder of images."),
    gallery: Path = typer.Argument(help="Embedding store of the gallery."),
    out: Path = typer.Option(Path("ranks.png"), "-o", "--out", help="The PNG to write."),
    k: int = typer.Option(10, "-k", min=1, max=50, help="Neighbours a query."),
    limit: int = typer.Option(4, min=1, max=64, help="Most queries to draw."),
    bundle: Path | None = typer.Option(None, help="The bundle to embed image queries with."),
    backend: str = typer.Option("auto", help=f"Of image queries: {BACKENDS}"),
) -> None:
    """Queries beside their nearest (the paper's Figure 4)."""
    from mgn_deploy.cli.search import open_queries
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.report.figures import draw_rank_lists
    from mgn_deploy.retrieval.search import search

    images = Store.open(gallery)
    draw_rank_lists(search(open_queries(query, bundle, backend), images, k)[:limit], out)
    print(out)


def _files(given: list[Path]) -> list[Path]:
    from mgn_deploy.images.listing import list_images

    files = []
    for path in given:
        files += [file.path for file in list_images(path)] if path.is_dir() else [path]
    return files
