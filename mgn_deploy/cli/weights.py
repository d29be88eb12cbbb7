"""`mgn-deploy init` and `import`: the two ways to a weights folder besides `train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgn_deploy.choices import GlobalStride, Pooling, SourceName, StemPool
from mgn_deploy.cli.options import Json, Seed, out
from mgn_deploy.console import print_result, say
from mgn_deploy.packages import require_training

if TYPE_CHECKING:
    from mgn_deploy.train.importers.importing import Report


def init(
    folder: Annotated[Path, out("The weights folder to write.")],
    backbone: Annotated[str, typer.Option(help="A torchvision ResNet.")] = "resnet50",
    size: Annotated[str, typer.Option(help="Input HEIGHTxWIDTH in pixels.")] = "384x128",
    branches: Annotated[str, typer.Option(help="Stripes of each branch; 1 is the global branch.")] = "1,2,3",
    start: Annotated[
        str,
        typer.Option(
            "--init",
            help="imagenet (downloaded by torchvision), random (no branch a copy of another), or the file of a "
            "ResNet's state dict.",
        ),
    ] = "imagenet",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write the weights of an untrained MGN."""
    from mgn_deploy.config import ModelConfig, parse_branches, parse_size

    height, width = parse_size(size)
    config = ModelConfig.checked(backbone=backbone, height=height, width=width, branches=parse_branches(branches))
    require_training()
    from mgn_deploy.train.weights import weights_hash, write_untrained_weights

    write_untrained_weights(folder, config, start, seed)
    made = {"weights": str(folder), "sha256": weights_hash(folder), "model": config.model_dump(mode="json")}
    print_result(json, made, folder)


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A public MGN's .pth, .pt or .safetensors.")],
    folder: Annotated[Path, out("The weights folder to write.")],
    source: Annotated[SourceName, typer.Option("--from", help="Whose code wrote it.")] = "auto",
    pool: Annotated[Pooling | None, typer.Option(help="Pooling, where the checkpoint does not tell.")] = None,
    global_stride: Annotated[GlobalStride | None, typer.Option(help="Of the global branch's layer4.")] = None,
    stem_pool: Annotated[StemPool | None, typer.Option(help="Alignment of the stem's max pooling.")] = None,
    size: Annotated[str | None, typer.Option(help="Input HEIGHTxWIDTH in pixels; 384x128 without it.")] = None,
    json: Json = False,
) -> None:
    """Turn a public MGN checkpoint into a weights folder.

    What its tensors do not tell is assumed, and said with the option that changes it.
    """
    from mgn_deploy.config import parse_size

    pixels = parse_size(size) if size else None
    require_training()
    from mgn_deploy.train.importers.importing import import_checkpoint as run

    report = run(
        checkpoint, folder, source, pooling=pool, global_stride=global_stride, stem_pool=stem_pool, size=pixels
    )
    _tell(report)
    print_result(json, {"weights": str(folder), **asdict(report)}, folder)


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
