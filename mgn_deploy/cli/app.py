"""The table of commands, and the exit codes of whatever ends one."""

from __future__ import annotations

import inspect
import io
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mgn_deploy import __version__
from mgn_deploy.choices import VERIFY_KEY
from mgn_deploy.cli import (
    bench,
    demo,
    doctor,
    embed,
    evaluate,
    explore,
    export,
    figures,
    identity,
    index,
    search,
    serve,
    store,
    train,
    validate,
    weights,
)
from mgn_deploy.console import show_log
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.interrupt import Stopped, stop_on_signals


class Commands(TyperGroup):
    """Ends with 0 (done), 1 (a gate failed), 2 (bad input), or 130, 143 or 129 (Ctrl-C, SIGTERM or SIGHUP)."""

    def invoke(self, context: Any) -> Any:
        """Run a command; SIGTERM and SIGHUP stop it as Ctrl-C does."""
        try:
            with stop_on_signals():
                return super().invoke(context)
        except Stopped as stop:
            raise typer.Exit(stop.exit_code) from None
        except BrokenPipeError:  # the reader of our output left, as in `mgn-deploy search ... | head`
            _drop_output()
            raise typer.Exit(141) from None

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run a command; what is wrong is one line on stderr, without a traceback."""
        try:
            try:
                code = super().main(*arguments, **{**options, "standalone_mode": False})
            finally:
                print(end="", flush=True)  # here, not at exit, where nobody could be told that the disk is full
        except (UserError, GateFailed) as error:
            _end(str(error), error.exit_code)
        except BrokenPipeError:
            _drop_output()
            sys.exit(141)
        except OSError as error:  # a path that cannot be reached, or stdout on a full disk
            _drop_output()
            _end(str(error), UserError.exit_code)
        except Exception as error:
            _end_usage(error)
        sys.exit(code if isinstance(code, int) else 0)


def _end_usage(error: Exception) -> None:
    """Say what is wrong with a command line; raise again what is no error of that kind.

    Recognised by its methods: releases of Typer take it from Click or bring their own.
    """
    if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):
        raise error
    message = error.format_message().removeprefix("Value error, ")
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)
        sys.exit(error.exit_code)
    command = context.command_path if context else "mgn-deploy"
    _end(f"{message.rstrip('.')}; see `{command} --help`", error.exit_code)


def _end(sentence: str, code: int) -> None:
    line = " ".join(sentence.encode("utf-8", "backslashreplace").decode().split())
    print(f"mgn-deploy: {line}", file=sys.stderr)
    sys.exit(code)


def _drop_output() -> None:
    """Send what is still buffered nowhere: the interpreter would fail on it again."""
    with suppress(io.UnsupportedOperation):  # a test's stdout is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="mgn-deploy",
    cls=Commands,
    help="Person re-identification with the Multiple Granularity Network: from PyTorch weights to a verified engine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",  # which has help panels
)
for name, command, example in (
    ("demo", demo.demo, "mgn-deploy demo -o mgn-demo"),
    ("doctor", doctor.doctor, "mgn-deploy doctor --json"),
    ("init", weights.init, "mgn-deploy init -o weights --init random --backbone resnet18"),
    ("import", weights.import_checkpoint, "mgn-deploy import market_mgn_R50-ibn.pth -o weights"),
    ("train", train.train, "mgn-deploy train --data market1501:DIR -o run --recipe strong"),
    ("export", export.export, "mgn-deploy export weights -o bundle --proof-images photos"),
    ("prove", export.prove, "mgn-deploy prove --bundle bundle --proof-images photos"),
    ("embed", embed.embed, "mgn-deploy embed photos -o store --bundle bundle"),
    ("search", search.search, "mgn-deploy search photo.jpg store --bundle bundle --html page.html"),
    ("serve", serve.serve, "mgn-deploy serve --bundle bundle --store store"),
    ("distmat", search.distmat, "mgn-deploy distmat query-store gallery-store -o distances.npy"),
    ("validate", validate.validate, "mgn-deploy validate --data market1501:DIR --bundle bundle"),
    ("evaluate", evaluate.evaluate, "mgn-deploy evaluate query-store gallery-store --ci --rerank"),
    ("cluster", explore.cluster, "mgn-deploy cluster store -o groups.parquet --html groups.html"),
    ("map", explore.map_embeddings, "mgn-deploy map store -o map.html --groups groups.parquet"),
    ("calibrate", identity.calibrate, "mgn-deploy calibrate --data market1501:DIR --bundle bundle"),
    ("compare", identity.compare, "mgn-deploy compare a.jpg b.jpg --bundle bundle --far 1e-3"),
    ("enrol", identity.enrol, "mgn-deploy enrol Anna anna1.jpg anna2.jpg --people people --bundle bundle"),
    ("identify", identity.identify, "mgn-deploy identify photos --people people --bundle bundle"),
):
    app.command(name, epilog=f"Example:\n\n{example}")(command)
app.add_typer(bench.app, name="bench")
app.add_typer(identity.people, name="people")
app.add_typer(index.app, name="index")
app.add_typer(store.app, name="store")
app.add_typer(figures.app, name="figures")


def _join_lines(commands: typer.Typer) -> None:
    """Let terminals wrap the paragraphs of help texts: Typer would keep the line breaks of the docstrings."""
    for command in commands.registered_commands:
        command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command.callback) or "")
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            _join_lines(group.typer_instance)


_join_lines(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verify_key: Annotated[
        Path | None,
        typer.Option(envvar=VERIFY_KEY, help="Refuse bundles that this Ed25519 public key (PEM) did not sign."),
    ] = None,
) -> None:
    show_log()
    if verify_key is not None:
        os.environ[VERIFY_KEY] = str(verify_key)
