"""The table of commands."""

from __future__ import annotations

import typer

from mgn_deploy import __version__
from mgn_deploy.cli import demo, doctor, embed, export, figures, import_, measure, search, train
from mgn_deploy.console import show_log

app = typer.Typer(
    name="mgn-deploy",
    help="Person re-identification with the Multiple Granularity Network: from PyTorch weights to a verified engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(demo.demo)
app.command()(doctor.doctor)
app.command()(export.init)
app.command("import")(import_.import_checkpoint)
app.command()(train.train)
app.command()(export.export)
app.command()(export.prove)
app.command()(embed.embed)
app.command()(search.distmat)
app.command()(search.search)
app.command()(measure.validate)
app.command()(measure.bench)
app.add_typer(figures.app, name="figures")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    show_log()
