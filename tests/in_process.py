"""The command line without a process of its own: PyTorch and the engines need not be imported anew."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest.mock import patch

from mgn_deploy.__main__ import main


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def mgn_deploy(*arguments: object) -> Done:
    """What `mgn-deploy ARGUMENTS` prints and exits with."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["mgn-deploy", *map(str, arguments)]),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, stdout.getvalue(), stderr.getvalue())
