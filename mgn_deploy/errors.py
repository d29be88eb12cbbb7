"""The errors that a user may meet. The CLI prints their sentence and exits with `exit_code`; it shows no traceback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """Input that cannot be used. The message is one sentence: what is wrong, where, how to fix it."""

    exit_code = 2


class CannotRun(UserError):
    """A backend that is not installed, not proven for a bundle, or lacks what it needs in it: another one may do."""


class GateFailed(Exception):
    """The work was done, but a measured figure is below its floor (a proof, a tolerance)."""

    exit_code = 1


class UnreadableImage(Exception):
    """One image that cannot be turned into pixels. The message is the reason, without the path: the caller has it."""


def first_problem(error: ValidationError) -> str:
    """The first value that a pydantic model refused, and why: "optim.lr: Input should be greater than 0"."""
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"])) or "the file"
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}"


def first_names(names: Sequence[str], most: int = 5) -> str:
    """The first of many names in a sentence, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
