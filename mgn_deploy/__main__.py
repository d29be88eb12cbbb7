"""`python -m mgn_deploy` and the console script `mgn-deploy`."""

from __future__ import annotations

import os
import sys

from mgn_deploy.errors import GateFailed, UserError


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a gate failed, 2 unusable input, 130 interrupted."""
    from mgn_deploy.cli.app import app

    try:
        app(prog_name="mgn-deploy")
    except (UserError, GateFailed) as error:
        print(f"mgn-deploy: {_printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as in `mgn-deploy search ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _printable(sentence: str) -> str:
    return " ".join(sentence.encode("utf-8", "backslashreplace").decode().split())


if __name__ == "__main__":
    main()
