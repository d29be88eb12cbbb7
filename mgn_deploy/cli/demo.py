"""`mgn-deploy demo`: draw people, train, export, prove, embed and validate, and write a page of rank lists."""

from __future__ import annotations

import logging
import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from mgn_deploy.cli.options import Json, Seed, out
from mgn_deploy.console import percent, print_json, print_table
from mgn_deploy.errors import UserError
from mgn_deploy.packages import require_training

if TYPE_CHECKING:
    from mgn_deploy.retrieval.ranking import RankingMetrics
    from mgn_deploy.retrieval.validate import Validation

_log = logging.getLogger("mgn_deploy")
MARKER = "made-by-mgn-deploy-demo"


def demo(
    folder: Annotated[Path, out("Folder for all that the demo makes; an earlier demo there is replaced.")] = Path(
        "mgn-demo"
    ),
    seconds: Annotated[int, typer.Option(min=1, help="Most seconds of training.")] = 150,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Go the whole way on drawn people, in under five minutes.

    Draws them, trains a small MGN, exports, proves, embeds, validates, and writes a page of rank lists.
    """
    require_training()
    made = run_demo(folder, train_seconds=seconds, seed=seed)
    if json:
        paths = {"page": str(made.page), "bundle": str(made.bundle)}
        figures = {"untrained": made.untrained.to_dict(), "chance": made.chance, "seconds": round(made.seconds, 1)}
        print_json({**made.validation.to_dict(), **figures, **paths})
    else:
        _print(made)
    made.validation.require()


def _print(made: Demo) -> None:
    from mgn_deploy.retrieval.ranking import KEYS

    assert made.validation.reference is not None
    measured = made.validation.measured.to_dict()
    columns = [made.untrained.to_dict(), made.validation.reference.to_dict(), measured]
    print_table(
        ["", "before training", "trained, PyTorch", f"trained, {made.validation.backend}"],
        [[key, *(percent(column[key]) for column in columns)] for key in KEYS],
        title=f"{measured['queries']} queries of people never trained on, percent (chance: rank-1 "
        f"{percent(made.chance)})",
    )
    print(f"Done in {made.seconds:.0f} s. Look at the rank lists in a browser: {made.page}")
    print("Next:", *_next_commands(made.query_store, made.gallery_store, made.bundle), sep="\n  ")


def _next_commands(query: Path, gallery: Path, bundle: Path) -> list[str]:
    return [
        shlex.join(["mgn-deploy", "search", str(query), str(gallery), "-k", "5"]),
        shlex.join(["mgn-deploy", "embed", "YOUR_IMAGES", "-o", "your-store", "--bundle", str(bundle)]),
        shlex.join(["mgn-deploy", "bench", str(bundle)]),
        "# a network of the paper's size:",
        "mgn-deploy init -o weights-r50 --init random && mgn-deploy export weights-r50 -o bundle-r50",
    ]


class Demo(NamedTuple):
    """What was made, and the figures. `chance` is rank-1 of guessing an identity."""

    bundle: Path
    query_store: Path
    gallery_store: Path
    page: Path
    chance: float
    untrained: RankingMetrics
    validation: Validation
    seconds: float


def run_demo(out: Path, *, train_seconds: float = 150, seed: int = 0) -> Demo:
    """Make everything below `out`; an earlier demo there is replaced.

    Args:
        out: a new or empty folder, or one of an earlier demo.
        train_seconds: training ends after the recipe's 24 epochs or this time, whichever comes first.
        seed: of the drawings, the first weights and the batches.

    Raises:
        UserError: `out` holds something else, or PyTorch or an engine is not installed.
    """
    # Imported here: `--help` shall not wait for them.
    from mgn_deploy.datasets.drawn import draw_market1501
    from mgn_deploy.datasets.market1501 import open_market1501
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.export.exporter import export_bundle
    from mgn_deploy.export.options import ExportOptions
    from mgn_deploy.gallery.embed import embed_folder
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.report.rank_page import gallery_facts, write_rank_page
    from mgn_deploy.retrieval.queries import Queries
    from mgn_deploy.retrieval.search import search
    from mgn_deploy.retrieval.validate import validate
    from mgn_deploy.train.evaluate import evaluate_model
    from mgn_deploy.train.recipe import load_recipe
    from mgn_deploy.train.run import WEIGHTS
    from mgn_deploy.train.trainer import train
    from mgn_deploy.train.weights import new_model

    start = time.monotonic()
    _make_folder(out)
    people, bundle, page = out / "people", out / "bundle", out / "ranks.html"
    query, gallery = out / "store-query", out / "store-gallery"

    _log.info("1/6 drawing people: 4 cameras, their own light and background, poses, occlusion, junk and distractors")
    drawn = draw_market1501(people, seed=seed)
    _log.info(
        f"    {drawn.train} training images of {drawn.train_identities} people; {drawn.query} queries and "
        f"{drawn.gallery} gallery images of {drawn.test_identities} others, {drawn.junk} junk and {drawn.distractors} "
        "distractors among them"
    )
    data = open_market1501(people)

    recipe = load_recipe("small", [f"loop.seed={seed}", f"schedule.max_seconds={train_seconds}"])
    config = recipe.model.config(drawn.train_identities)
    _log.info(f"2/6 training a small MGN (ResNet-18 of half width, {config.height}x{config.width}) from random weights")
    untrained = evaluate_model(new_model(config, seed=seed), data)

    train(data, recipe, out / "run")

    _log.info("3/6 exporting to ONNX, and proving every engine that is installed against PyTorch")
    export_bundle(out / "run" / WEIGHTS, bundle, ExportOptions(proof_images=people / "query"))

    _log.info("4/6 embedding query and gallery from their files")
    embedder = Embedder.open(bundle)
    for subset, store in (("query", query), ("bounding_box_test", gallery)):
        made = embed_folder(people / subset, store, embedder, labels="market1501")
        _log.info(f"    {made.embedded} images of {subset} with {embedder.backend.name}")

    _log.info("5/6 validating by the Market-1501 protocol, the engine beside PyTorch")
    validation = validate(data, embedder, Embedder.open_reference(bundle))

    _log.info("6/6 writing the page of rank lists")
    opened = Store.open(gallery)
    lists = search(Queries.open(query), opened, exclude_same_camera=True)
    write_rank_page(page, lists, title="Drawn people", facts=gallery_facts(opened))
    chance, seconds = 1 / drawn.test_identities, time.monotonic() - start
    return Demo(bundle, query, gallery, page, chance, untrained, validation, seconds)


def _make_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise UserError(f"{out} exists and is no earlier demo's: choose another folder with -o")
    try:
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        (out / MARKER).touch()
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
