"""Compile all kernels for every architecture and report their registers; a spilled register is a failure.

`make kernels`, or `python -m mgn_deploy.kernels.build [--arch 90]`. It compiles by NVRTC, as users' machines do: nvcc
of the same version gives other code (13.0's `mma_kernel<Half>` for sm_90 takes 91 registers, NVRTC 13.0's takes 162).
"""

from __future__ import annotations

import argparse
import io
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mgn_deploy.console import print_table, show_log
from mgn_deploy.errors import UserError
from mgn_deploy.kernels.nvrtc import compile_uncached
from mgn_deploy.kernels.plan import all_kernels

_log = logging.getLogger("mgn_deploy")

# 8.7 is Jetson Orin (JetPack 6 and 7), 11.0 Jetson Thor, which CUDA 12 called 10.1.
ARCHITECTURES = ("75", "80", "86", "87", "89", "90", "100", "110", "120")
_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Use:
    """What ptxas reports of one kernel: registers a thread, and bytes of stack, spill stores and spill loads."""

    registers: int
    spilled: int


def compile_for(arch: str, kernels: Sequence[str]) -> dict[str, Use]:
    """Compile kernels, by their names, for an architecture, such as "90", and say what each uses.

    Raises:
        CannotRun: NVRTC is not installed.
        UserError: it fails, or warns.
    """
    log = io.StringIO()
    code = compile_uncached(tuple(kernels), f"sm_{arch}", log)
    warning = next((line for line in log.getvalue().splitlines() if "warning" in line), None)
    if warning:
        raise UserError(f"NVRTC warns of the kernels for sm_{arch}: {warning.strip()}")
    uses = read_report(log.getvalue())
    return {name: uses[symbol] for name, symbol in code.symbols.items()}


def read_report(report: str) -> dict[str, Use]:
    """What the lines of ptxas's -v say, by the kernels' symbols."""
    found = _ENTRY.findall(report)
    return {symbol: Use(int(registers), sum(map(int, memory))) for symbol, *memory, registers in found}


def main(arguments: list[str] | None = None) -> int:
    """0 where no kernel spills, 1 where one does or does not compile, 2 where NVRTC is missing."""
    parser = argparse.ArgumentParser(prog="python -m mgn_deploy.kernels.build", description=__doc__)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="one architecture; again for more (all)")
    chosen = parser.parse_args(arguments)
    show_log()
    uses: dict[str, dict[str, Use]] = {}
    for arch in chosen.arch or ARCHITECTURES:
        _log.info("compiling for sm_%s", arch)
        try:
            uses[arch] = compile_for(arch, all_kernels())
        except UserError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    rows = [[kernel, *(_cell(of_arch[kernel]) for of_arch in uses.values())] for kernel in all_kernels()]
    columns = ["kernel", *(f"sm_{arch}" for arch in uses)]
    print_table(columns, rows, "registers a thread; spilled bytes, where there are any")
    spilled = sum(use.spilled for of_arch in uses.values() for use in of_arch.values())
    if spilled:
        print(f"{spilled} bytes are spilled", file=sys.stderr)
    return 1 if spilled else 0


def _cell(use: Use) -> str:
    return f"{use.registers}" + (f" +{use.spilled}" if use.spilled else "")


if __name__ == "__main__":
    sys.exit(main())
