"""`mgn-deploy bench`: `bench BUNDLE...` runs, `bench compare OLD NEW` compares two results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mgn_deploy.choices import MAX_BATCH
from mgn_deploy.cli.options import AllowUnproven, Json, Seed
from mgn_deploy.console import print_json, print_table, progress


class RunByDefault(TyperGroup):
    """`bench BUNDLE...` is `bench run BUNDLE...`: what is neither a command's name nor an option of the group's own is
    an argument of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=RunByDefault, help="Measure speed beside PyTorch's: bench BUNDLE...", no_args_is_help=True)


@app.command(epilog="Example:\n\nmgn-deploy bench run bundle bundle-int8 --images photos --out result")
def run(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Folders that `export` wrote.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images; drawn people without it.")] = None,
    data: Annotated[str | None, typer.Option(help="Labelled people as KIND:DIR: also rank them.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="ENGINE", help="Once for each; all that are installed and proven without it."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX_BATCH, help="Images a call, once for each; 1 and 8 without it.")
    ] = None,
    count: Annotated[int, typer.Option(help="Images of the folder that are used.")] = 64,
    p99: Annotated[
        float | None, typer.Option(metavar="MS", help="Find the rate of requests that 99% of are answered in time.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Of the whole run.")] = 5.0,
    reference: Annotated[bool, typer.Option(help="Also measure the PyTorch reference.")] = True,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for bench.json and bench.html.")] = None,
    seed: Seed = 0,
    allow_unproven: AllowUnproven = False,
    json: Json = False,
) -> None:
    """Measure latency, throughput and `embed` beside PyTorch.

    Engines, bundles and batches take turns in random order. `bench BUNDLE...` is short for it.
    """
    from mgn_deploy.bench.page import remarks, table, write_result
    from mgn_deploy.bench.speed import measure

    if out:  # refused now, not after minutes of work
        out.mkdir(parents=True, exist_ok=True)
    with progress("s") as update:
        result = measure(
            bundles,
            engines=backend or (),
            batches=batch or (1, 8),
            images=images,
            count=count,
            data=data,
            p99=p99,
            minutes=minutes,
            reference=reference,
            allow_unproven=allow_unproven,
            seed=seed,
            progress=update,
        )
    if out:
        write_result(result, out)
    if json:
        print_json(result.model_dump(mode="json"))
        return
    columns, rows = table(result, bounds=False)
    print_table(columns, rows, title=f"{result.models}; images: {result.images}")
    for sentence in remarks(result):
        print(sentence)


@app.command(epilog="Example:\n\nmgn-deploy bench compare old new")
def compare(
    old: Annotated[Path, typer.Argument(help="The earlier result: a folder of --out, or its JSON.")],
    new: Annotated[Path, typer.Argument(help="The later result.")],
    json: Json = False,
) -> None:
    """Say what became faster or slower; exit 1 if any.

    SAME, FASTER, SLOWER or UNSURE for each figure that both have, by the intervals of their medians. Exit 1 where one
    is SLOWER.
    """
    from mgn_deploy.bench.compare import compare as run_compare
    from mgn_deploy.bench.compare import require_no_slower
    from mgn_deploy.bench.result import read_result

    compared = run_compare(read_result(old), read_result(new))
    if json:
        print_json([one._asdict() for one in compared])
    else:
        cells = [
            [one.row, one.figure, f"{one.old:.2f}", f"{one.new:.2f}", f"{one.speed:.3f}", one.verdict, one.remark]
            for one in compared
        ]
        print_table(["row", "figure", "old", "new", "speed", "verdict", "remark"], cells)
    require_no_slower(compared)
