"""Every command, by walking the app: help that fits 80 columns, examples that parse, `--json`, one `--bundle`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from conftest import mgn_deploy
from trials.environments import LINES
from typer.testing import CliRunner

from mgn_deploy import choices
from mgn_deploy.backends.registry import ENGINES, EXPORT_ENGINES
from mgn_deploy.cli.app import app
from mgn_deploy.train import recipe

HEAVY = {"torch", "torchvision", "numpy", "PIL", "pandas", "pyarrow", "pydantic", "jinja2", "onnx"} | {
    row.package for row in ENGINES.values()
}


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command that does something, by the words that call it."""
    if not hasattr(command, "commands"):
        yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*words, name))


COMMANDS = dict(walk(typer.main.get_command(app)))
commands = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


def help_at_80_columns(*words: str) -> list[str]:
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})
    done = runner.invoke(app, [*words, "--help"], prog_name="mgn-deploy")
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def options_of(command: Any) -> dict[str, Any]:
    return {name: parameter for parameter in command.params for name in parameter.opts if name.startswith("--")}


def cpu_seconds_of(*arguments: str) -> float:
    """The least of five runs of Python: a busy machine shall not count."""
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    return min(seconds)


def test_help_is_quick():
    """Beside what the command line is made of, which takes about a third of it."""
    assert (
        0 < cpu_seconds_of("-m", "mgn_deploy", "--help") < 5 * cpu_seconds_of("-c", "import typer.main, rich.console")
    )


def test_help_imports_nothing_heavy():
    script = (
        "import atexit, sys; sys.argv = ['mgn-deploy', '--help']\n"
        "atexit.register(lambda: print(*{name.split('.')[0] for name in sys.modules}))\n"
        "from mgn_deploy.__main__ import main; main()"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    loaded = set(printed.splitlines()[-1].split())
    assert {"mgn_deploy", "typer", "rich"} <= loaded
    assert HEAVY.isdisjoint(loaded)


@commands
def test_a_command_has_a_summary_that_is_not_cut_off_in_its_groups_help(words):
    summary = COMMANDS[words].help.split("\n\n")[0]
    assert summary.endswith(".")
    (line,) = [line for line in help_at_80_columns(*words[:-1]) if line[2:].startswith(f"{words[-1]} ")]
    assert line.strip("│ ").removeprefix(words[-1]).strip() == summary


@commands
def test_its_own_help_is_not_cut_off_either(words):
    lines = help_at_80_columns(*words)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    for name in options_of(COMMANDS[words]):
        assert any(name in line.split() for line in lines), name


@commands
def test_its_help_ends_with_an_example_that_it_takes(words):
    title, example = COMMANDS[words].epilog.split("\n\n")
    assert title == "Example:"
    assert example in map(str.strip, help_at_80_columns(*words))
    assert shlex.split(example)[: len(words) + 1] == ["mgn-deploy", *words]
    COMMANDS[words].make_context(words[-1], shlex.split(example)[len(words) + 1 :])


@commands
def test_every_option_and_argument_says_what_it_is(words):
    for parameter in COMMANDS[words].params:
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.help


@commands
def test_its_result_can_be_had_as_json(words):
    assert "--json" in options_of(COMMANDS[words])


@commands
def test_the_bundle_that_it_reads_is_given_by_bundle(words):
    """But for `bench`, which compares several and takes nothing else."""
    options = options_of(COMMANDS[words])
    assert [name for name in options if "bundle" in name] in ([], ["--bundle"])
    for parameter in COMMANDS[words].params:
        if parameter.param_type_name == "argument" and words != ("bench", "run"):
            assert "bundle" not in parameter.name
            assert not parameter.help.startswith(("The bundle", "A bundle")), parameter.help


@pytest.mark.parametrize("words", [("prove",), ("embed",), ("validate",), ("search",)], ids=" ".join)
def test_commands_that_read_a_bundle_have_the_option(words):
    assert "--bundle" in options_of(COMMANDS[words])


def test_every_command_has_a_line_in_the_trial_of_environments():
    assert {*LINES} == {" ".join(words) for words in COMMANDS}


def test_exports_options_stand_in_panels():
    options = options_of(COMMANDS[("export",)])
    panels = {name: option.rich_help_panel for name, option in options.items() if name != "--help"}
    assert {name for name, panel in panels.items() if panel is None} == {"--out", "--json"}
    assert len({*panels.values()} - {None}) == 4


def test_shell_completion_can_be_installed():
    assert any("--install-completion" in line for line in help_at_80_columns())


def test_help_names_every_engine_kind_of_data_and_recipe():
    backend, engine = options_of(COMMANDS[("embed",)])["--backend"], options_of(COMMANDS[("export",)])["--engine"]
    assert [name.strip(" .") for name in backend.help.partition(" or ")[2].split(",")] == list(ENGINES)
    assert engine.help.startswith(", ".join(EXPORT_ENGINES))
    data, recipes = options_of(COMMANDS[("train",)])["--data"], options_of(COMMANDS[("train",)])["--recipe"]
    assert all(kind in data.help for kind in choices.DATA_KINDS)
    shipped = {path.stem for path in (Path(recipe.__file__).parent / "recipes").glob("*.toml")}
    assert shipped <= {name.strip() for name in recipes.help.split(",")}


@pytest.mark.parametrize(
    "words, option, values",
    [
        (("embed", ".", "-o", "s", "--bundle", "b"), "--backend", ("auto", *ENGINES)),
        (("embed", ".", "-o", "s", "--bundle", "b"), "--dtype", get_args(choices.Dtype)),
        (("export", "w", "-o", "b"), "--engine", EXPORT_ENGINES),
        (("export", "w", "-o", "b"), "--precision", get_args(choices.Precision)),
        (("distmat", "q", "g", "-o", "d.npy"), "--metric", get_args(choices.Metric)),
        (("distmat", "q", "g", "-o", "d.npy"), "--compute", get_args(choices.Compute)),
        (("evaluate", "q", "g"), "--device", get_args(choices.Device)),
        (("validate", "--data", "d", "--bundle", "b"), "--multi-query", get_args(choices.QueryPooling)),
        (("train", "--data", "d", "-o", "r"), "--device", get_args(choices.Device)),
        (("import", "c", "-o", "w"), "--from", get_args(choices.SourceName)),
        (("import", "c", "-o", "w"), "--pool", get_args(choices.Pooling)),
        (("import", "c", "-o", "w"), "--stem-pool", get_args(choices.StemPool)),
        (("import", "c", "-o", "w"), "--global-stride", get_args(choices.GlobalStride)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_value_outside_a_closed_choice_exits_2_and_is_told_the_choices(words, option, values):
    done = mgn_deploy(*words, option, "abacus")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"Invalid value for '{option}'" in done.stderr
    assert "'abacus' is not one of" in done.stderr
    for value in values:
        assert f"'{value}'" in done.stderr or f" {value}" in done.stderr
