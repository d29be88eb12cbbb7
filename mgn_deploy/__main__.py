"""`python -m mgn_deploy` and the console script `mgn-deploy`."""

from __future__ import annotations

import os
import sys

from mgn_deploy.errors import GateFailed, UserError


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a gate failed, 2 unusable input, 130 interrupted."""
    # PyTorch's OpenMP threads burn their core while they wait, unless told before it is loaded. Where another process
    # wants the core too, a training step took 8 s instead of 1 (measured: 2 cores, one of them busy); alone it makes no
    # difference.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from mgn_deploy.cli.app import app

        try:
            app(prog_name="mgn-deploy")
        finally:
            print(end="", flush=True)  # here, not at exit, where nobody could be told that the disk is full
    except (UserError, GateFailed) as error:
        print(f"mgn-deploy: {_printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as in `mgn-deploy search ... | head`
        _close_stdout()
        sys.exit(141)
    except OSError as error:  # a path that cannot be reached, or stdout on a full disk
        print(f"mgn-deploy: {_printable(str(error))}", file=sys.stderr)
        _close_stdout()
        sys.exit(2)


def _close_stdout() -> None:
    """Send what is still buffered nowhere: the interpreter would fail on it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _printable(sentence: str) -> str:
    return " ".join(sentence.encode("utf-8", "backslashreplace").decode().split())


if __name__ == "__main__":
    main()
