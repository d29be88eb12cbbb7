"""The site's generated pages: run by mkdocs-gen-files while the site is built (`make docs`).

index.md, architecture.md and changelog.md are README.md, ARCHITECTURE.md and CHANGELOG.md with the site's links. Tables
are filled in wherever a page marks one (`tables.py`). The command line's reference is what `--help` prints.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from tables import fill  # noqa: E402

COPIES = {"README.md": "index.md", "ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changelog.md"}
HELP_COLUMNS = "110"
INTRODUCTION = """\
# Command line

What `mgn-deploy COMMAND --help` prints. Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 a
gate failed (a proof, a tolerance, `--max-failures`), 2 input that cannot be used, 130, 143 or 129 stopped by
Ctrl-C, SIGTERM or SIGHUP. What `--json` prints is described in [JSON output](json.md).
"""


def write_all() -> None:
    """Write every generated page into the site."""
    for source, page in COPIES.items():
        _write(page, _with_links_of_the_site((ROOT / source).read_text()))
    for path in sorted((ROOT / "docs").rglob("*.md")):
        text = path.read_text()
        if fill(text) != text:
            _write(str(path.relative_to(ROOT / "docs")), fill(text))
    _write("reference/cli.md", "\n".join(_command_line()))


def _write(page: str, text: str) -> None:
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


def _with_links_of_the_site(text: str) -> str:
    for source, page in COPIES.items():
        text = text.replace(f"]({source}", f"]({page}")
    text = re.sub(r"\]\(LICENSE\)", "](https://www.apache.org/licenses/LICENSE-2.0)", text)
    return re.sub(r"(\]\(|src=\")docs/", r"\1", text)


def _command_line() -> Iterator[str]:
    """One heading a command, and its help as a terminal shows it."""
    import typer.main

    from mgn_deploy.cli.app import app

    yield INTRODUCTION
    for words in _commands(typer.main.get_command(app)):
        yield f"## {' '.join(['mgn-deploy', *words])}\n"
        yield f"```text\n{_help(words)}\n```\n"


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*words, name))


def _help(words: tuple[str, ...]) -> str:
    from typer.testing import CliRunner

    from mgn_deploy.cli.app import app

    # GitHub's and pytest's settings would colour the boxes.
    environment = {"COLUMNS": HELP_COLUMNS, "TERMINAL_WIDTH": HELP_COLUMNS, "NO_COLOR": "1", "TERM": "dumb"}
    environment |= dict.fromkeys({"FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"} & os.environ.keys(), "")
    result = CliRunner().invoke(app, [*words, "--help"], env=environment, prog_name="mgn-deploy")
    if result.exit_code:
        raise RuntimeError(f"mgn-deploy {' '.join(words)} --help ended with {result.exit_code}: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


write_all()
