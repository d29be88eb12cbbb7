"""Options that several commands have, and the closed choices that options take.

A choice's values are the library's own, its Literal or the table of engines: nothing is listed a second time. Typer
refuses any other value with exit code 2 and a sentence that names the choices.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from mgn_deploy.backends.registry import ENGINES, EXPORT_ENGINES
from mgn_deploy.choices import DATA_KINDS, MAX_BATCH, MAX_SEED, Device

_BACKEND_NAMES = ("auto", *ENGINES)
if TYPE_CHECKING:  # a type checker does not know what the table holds
    BackendName: TypeAlias = str
    EngineName: TypeAlias = str
else:
    BackendName = Literal[_BACKEND_NAMES]
    EngineName = Literal[EXPORT_ENGINES]

_BACKENDS = ", ".join(ENGINES)
_boxes = partial(typer.Option, rich_help_panel="Boxes")
_proof = partial(typer.Option, rich_help_panel="Proof")


def out(help: str) -> Any:
    """The option `-o`, `--out`: what a command writes."""
    return typer.Option("-o", "--out", help=help)


AllowUnproven = Annotated[
    bool, typer.Option("--allow-unproven", help="Also run an engine that the bundle has no passed proof for.")
]
Backend = Annotated[
    BackendName,
    typer.Option("--backend", metavar="ENGINE", help=f"auto (the first that is installed and proven) or {_BACKENDS}."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, max=MAX_BATCH, help="Images a call of the engine.")]
BoxClass = Annotated[list[str], _boxes("--box-class", help="Name or number of a class that is taken, or all.")]
BoxesFile = Annotated[
    Path | None,
    _boxes(
        "--boxes",
        help="A row for each box in the images: MOTChallenge's text, YOLO's folder, COCO's JSON, or a table of path, "
        "left, top, width and height.",
    ),
]
Bundle = Annotated[Path, typer.Option("--bundle", help="The bundle: a folder that `export` wrote.")]
Data = Annotated[str, typer.Option("--data", help=f"Labelled people as KIND:DIR; KIND is {', '.join(DATA_KINDS)}.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
MinScore = Annotated[float, _boxes("--min-score", help="Of boxes that have a score.")]
ProofData = Annotated[
    str | None,
    _proof("--data", help="Labelled people as KIND:DIR (see validate): the proof also ranks them beside PyTorch."),
]
ProofImages = Annotated[
    Path | None, _proof("--proof-images", help="Folder of images to prove the engines on; drawn people without it.")
]
QueryBundle = Annotated[
    Path | None,
    typer.Option("--bundle", help="The bundle that embeds queries that are images; without it the gallery's."),
]
RankDevice = Annotated[
    Device, typer.Option("--device", help="Where distances are computed; auto: on a CUDA device if there is one.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Of all random numbers.")]
Video = Annotated[Path | None, _boxes("--video", help="A video, in place of images, that --boxes is about.")]
