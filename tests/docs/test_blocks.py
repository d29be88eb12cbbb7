"""Every block of README and tutorials is run or says why not, and no page shows a command that is none."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
from blocks import PAGES, ROOT, RUN, arguments_of_mgn_deploy, blocks, commands, inline_commands

from mgn_deploy.cli.app import app

LANGUAGES = {"sh", "python", "text", "toml", "json"}
# Words that mean something to this project's authors alone, and names of what is no longer there.
FORBIDDEN = re.compile(
    r"\b(doors?|flavou?rs?|pieces|taken anew|trial whose script|onnxruntime[-_]tensorrt)\b|--heads\b"
)
_SPAN = re.compile(r"`([^`]+)`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def resolve(arguments: list[str]) -> tuple[Any, str, list[str]]:
    """The command that these arguments are of, its name, and those that are left for it."""
    command, name = typer.main.get_command(app), "mgn-deploy"
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        if name == "bench" and arguments[0] not in command.commands:  # `bench BUNDLE...` is `bench run BUNDLE...`
            arguments = ["run", *arguments]
        name, *arguments = arguments
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    return command, name, arguments


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_of_a_language_that_is_run_or_shown(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: ```{block.language}"


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_a_block_that_is_not_run_says_why(page):
    marked = [block for block in blocks(page) if block.reason is not None]
    for block in marked:
        assert block.language in ("sh", "python"), f"{block}: only code is run"
        assert len(block.reason.split()) >= 3, f"{block}: {block.reason!r} is no reason"
    assert page.read_text().count("<!-- not run") == len(marked), "a mark stands before no block"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_block_is_one_that_the_command_line_takes(page):
    for block in (block for block in blocks(page) if block.language == "sh"):
        for words in commands(block.code):
            arguments = arguments_of_mgn_deploy(words)
            if arguments is None:
                continue
            command, name, rest = resolve(arguments)
            try:
                command.make_context(name, list(rest))
            except Exception as error:
                pytest.fail(f"{block}: {' '.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_in_the_text_is_one_of_its_command(page):
    for arguments in inline_commands(page):
        command, name, rest = resolve(arguments)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in rest if word.startswith("-") and word not in {*known, "--help"}]
        assert not unknown, f"{name} has no {unknown} ({' '.join(arguments)})"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_evidence_that_a_page_names_exists(page):
    tests: list[str] = []
    for span in _SPAN.findall(page.read_text()):
        # `-k` alone is of the pytest before it
        words = shlex.split(span) if span.startswith(("pytest ", "-k ")) else []
        if words[:1] == ["pytest"]:
            tests = names_in(ROOT / words[1])
            assert tests, f"{words[1]} has no tests"
        for wanted in words[words.index("-k") + 1].split(" or ") if "-k" in words else []:
            assert any(wanted in name for name in tests), f"{span}: no such test"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_modules_and_files_that_a_page_names_exist(page):
    for module in re.findall(r"python -m (mgn_deploy\.[\w.]+)", page.read_text()):
        assert find_spec(module), f"no module {module}"
    folders = "mgn_deploy|train|export|kernels|bench|tests"
    for path in re.findall(rf"`((?:{folders})/[\w/.]+)`", page.read_text()):
        assert (ROOT / path).exists(), f"no {path}"


def names_in(path: Path) -> list[str]:
    files = [path] if path.is_file() else path.rglob("test_*.py")
    return [name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_uses_a_word_that_only_its_authors_know(page):
    if page.name == "CHANGELOG.md":  # which names what went
        return
    found = FORBIDDEN.search(page.read_text())
    assert found is None, f"{found[0]!r} in {page}"
