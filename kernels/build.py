"""Compile `stripe_pool_reduce.cu` for every architecture by nvcc and report registers; a spilled register is a failure.

`make kernels`, or `python -m mgn_deploy.kernels.build [--arch 90] [--out FOLDER]`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mgn_deploy.errors import UserError
from mgn_deploy.kernels.plan import LAYOUTS, POOLINGS

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
SOURCE = Path(__file__).parent / "stripe_pool_reduce.cu"


@dataclass(frozen=True)
class Use:
    """What ptxas reports of one kernel."""

    kernel: str
    registers: int
    spilled: int  # bytes of stack, spill stores and spill loads


def find_nvcc() -> str | None:
    """On PATH, or where CUDA is usually installed."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("nvcc") or shutil.which("nvcc", path=home / "bin")


def compile_for(arch: str, folder: Path, nvcc: str) -> list[Use]:
    """`folder`/stripe_pool_reduce_sm_ARCH.cubin, and what each kernel in it uses.

    Raises:
        UserError: nvcc fails, or warns.
    """
    cubin = folder / f"stripe_pool_reduce_sm_{arch}.cubin"
    flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin"]
    result = subprocess.run([nvcc, *flags, "-o", str(cubin), str(SOURCE)], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"nvcc does not compile {SOURCE} for {arch}: {result.stderr.strip()}")
    return read_report(result.stdout + result.stderr)


def read_report(report: str) -> list[Use]:
    """The lines of `-Xptxas -v`."""
    uses = []
    for part in report.split("Compiling entry function")[1:]:
        symbol = re.search(r"'(\w+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if symbol and registers and memory:
            uses.append(Use(kernel_name(symbol[1]), int(registers[1]), sum(map(int, memory.groups()))))
    return sorted(uses, key=lambda use: use.kernel)


def kernel_name(symbol: str) -> str:
    """`pool<Half, nhwc, max>` of a mangled name; the name itself where it is none of ours."""
    found = re.search(r"\d(pool|rows|mma|fma|epilogue|fused)_kernelI(.*)EEvN", symbol)
    if found is None:
        return symbol
    types: list[str] = []
    numbers: list[int] = []
    for token in re.finditer(r"NS_4(Half)E|NS_6(Bfloat)E|(f)|(S\d*_)|Li(\d)E", found[2]):
        half, bfloat, single, again, number = token.groups()
        if number is not None:
            numbers.append(int(number))
        else:
            types.append(types[-1] if again else half or bfloat or single.replace("f", "float"))
    choices = [names[number] for names, number in zip((LAYOUTS, POOLINGS), numbers, strict=False)]
    return f"{found[1]}<{', '.join([*types, *choices])}>"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mgn_deploy.kernels.build", description=__doc__)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="one architecture; again for more (all)")
    parser.add_argument("--out", type=Path, help="where the .cubin files are kept (nowhere)")
    chosen = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to where it is", file=sys.stderr)
        return 2
    table = Table(title="registers a thread; spilled bytes, where there are any")
    table.add_column("kernel", no_wrap=True)
    uses: dict[str, dict[str, Use]] = {}
    spilled = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for arch in chosen.arch or ARCHITECTURES:
            print(f"compiling for sm_{arch}", file=sys.stderr)
            try:
                uses[arch] = {use.kernel: use for use in compile_for(arch, folder, nvcc)}
            except UserError as error:
                print(error, file=sys.stderr)
                return 1
            table.add_column(f"sm_{arch}", justify="right")
            spilled += sum(use.spilled for use in uses[arch].values())
    for kernel in sorted(set().union(*uses.values())):
        cells = [of_arch.get(kernel) for of_arch in uses.values()]
        table.add_row(kernel, *("" if use is None else _cell(use) for use in cells))
    Console().print(table)
    if spilled:
        print(f"{spilled} bytes are spilled", file=sys.stderr)
    return 1 if spilled else 0


def _cell(use: Use) -> str:
    return f"{use.registers}" + (f" +{use.spilled}" if use.spilled else "")


if __name__ == "__main__":
    sys.exit(main())
