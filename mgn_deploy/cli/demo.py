"""`mgn-deploy demo`."""

from __future__ import annotations

from pathlib import Path

import typer

from mgn_deploy.cli.console import percent, print_json, print_table, require_training, say
from mgn_deploy.errors import GateFailed


def demo(
    out: Path = typer.Option(
        Path("mgn-demo"),
        "-o",
        "--out",
        help="Folder for everything that the demo makes; an earlier demo there is replaced.",
    ),
    seconds: int = typer.Option(150, min=1, help="Most seconds of training."),
    seed: int = typer.Option(0, help="Of the drawn people and of the training."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
) -> None:
    """Draw people, train a small MGN on them, export, prove, embed, validate: the whole way in under five minutes."""
    require_training()
    from mgn_deploy.demo import run_demo
    from mgn_deploy.validate import KEYS

    made = run_demo(out, train_seconds=seconds, seed=seed, say=say)
    reference = made.validation.reference
    assert reference is not None
    measured = made.validation.measured.to_dict()
    if json:
        print_json(
            {
                **made.validation.to_dict(),
                "untrained": made.untrained.to_dict(),
                "chance": made.chance,
                "seconds": round(made.seconds, 1),
                "page": str(made.page),
                "bundle": str(made.bundle),
            }
        )
    else:
        rows = [
            [key, percent(made.untrained.to_dict()[key]), percent(reference.to_dict()[key]), percent(measured[key])]
            for key in KEYS
        ]
        print_table(
            ["", "before training", "trained, PyTorch", f"trained, {made.validation.backend}"],
            rows,
            title=f"{measured['queries']} queries of people never trained on, percent (chance: rank-1 {percent(made.chance)})",
        )
        print(f"Done in {made.seconds:.0f} s. Look at the rank lists in a browser: {made.page}")
        print("Next:")
        print(f"  mgn-deploy search {made.query_store} {made.gallery_store} -k 5")
        print(f"  mgn-deploy embed YOUR_IMAGES -o your-store --bundle {made.bundle}")
        print(f"  mgn-deploy bench --bundle {made.bundle}")
        print(
            "  mgn-deploy init -o weights-r50 --init random && mgn-deploy export weights-r50 -o bundle-r50   # the paper's size"
        )
    if made.validation.worst() > 0.005:
        raise GateFailed(
            f"the engine's rank-1 or mAP differs by {100 * made.validation.worst():.2f} points from PyTorch's"
        )
