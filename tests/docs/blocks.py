"""The fenced blocks of README.md and of the site's pages, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages whose sh and python blocks are run, but for those that are marked.
RUN = [ROOT / "README.md", *TUTORIALS, ROOT / "docs/how-to/other-tools.md", ROOT / "docs/reference/json.md"]

_FENCE = re.compile(r"^```(\S*).*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_REASON = re.compile(r"<!-- not run: (.+?) -->\n$", re.DOTALL)
_INLINE = re.compile(r"`(mgn-deploy [a-z][^`]*)`")
_ENDS_A_COMMAND = {"&&", "||", ";", "|", "&"}


class Block(NamedTuple):
    """`reason` says why it is not run; None where it is."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        reason = _REASON.search(before)
        found.append(Block(page, before.count("\n") + 1, match[1], match[2], reason and reason[1]))
    return found


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell block: without comments, redirections and what a pipe goes to."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in _ENDS_A_COMMAND:
                words.append(word)
                continue
            if words:
                yield words[: words.index(">")] if ">" in words else words
            words = []


def arguments_of_mgn_deploy(words: list[str]) -> list[str] | None:
    """What follows `mgn-deploy` or `-m mgn_deploy`; None of another command."""
    if words[0] == "mgn-deploy":
        return words[1:]
    if "mgn_deploy" in words and words[words.index("mgn_deploy") - 1] == "-m":
        return words[words.index("mgn_deploy") + 1 :]
    return None


def inline_commands(page: Path) -> list[list[str]]:
    """The arguments of every `mgn-deploy ...` in the text."""
    spans = [" ".join(match[1].split()) for match in _INLINE.finditer(_FENCE.sub("", page.read_text()))]
    every = [arguments_of_mgn_deploy(words) for span in spans for words in commands(span)]
    return [arguments for arguments in every if arguments is not None]
