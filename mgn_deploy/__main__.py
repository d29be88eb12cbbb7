"""`python -m mgn_deploy` and the console script `mgn-deploy`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line (`cli/app.py`)."""
    # PyTorch's OpenMP threads burn their core while they wait, unless told before it is loaded. Where another process
    # wants the core too, a training step took 8 s instead of 1 (measured: 2 cores, one of them busy); alone it makes no
    # difference.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_closed_streams()
    # A path that is no UTF-8 is printed as its bytes; a letter that the terminal does not have is spelled out.
    utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
    sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")  # type: ignore[union-attr]
    try:
        from mgn_deploy.cli.app import app

        app(prog_name="mgn-deploy")
    except KeyboardInterrupt:  # while it was imported
        raise SystemExit(130) from None


def _open_closed_streams() -> None:
    """Give a closed stdin, stdout or stderr to nobody: the next file that is opened would get its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        name = ("stdin", "stdout", "stderr")[descriptor]
        setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))  # noqa: SIM115
    os.close(descriptor)


if __name__ == "__main__":
    main()
