"""A lint of the machine code: what the source says of fences, caches and tensor cores must still be there once NVRTC
and ptxas have had their way; and that the lint sees it where it is not."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from mgn_deploy.kernels import nvrtc


def disassembler() -> str | None:
    """NVIDIA's nvdisasm: from a CUDA toolkit, or as the Triton that comes with PyTorch brings it."""
    found = importlib.util.find_spec("triton")
    bundled = (
        [Path(folder) / "backends/nvidia/bin" for folder in (found.submodule_search_locations or [])] if found else []
    )
    return shutil.which("nvdisasm") or next(
        filter(None, (shutil.which("nvdisasm", path=place) for place in bundled)), None
    )


NVDISASM = disassembler()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvrtc.nvrtc_problem() is not None, reason="needs NVRTC"),
    pytest.mark.skipif(NVDISASM is None, reason="needs nvdisasm, of a CUDA toolkit or of Triton"),
]

STEPS = {  # of a fused kernel: the kernels whose phases it has
    f"fused_kernel<{kind}, {layout}, kMax>": (
        f"pool_kernel<{kind}, {layout}, kMax>",
        f"rows_kernel<{kind}, {kind}>",
        f"epilogue_kernel<{kind}>",
    )
    for kind, layout in (("Half", "kNhwc"), ("float", "kNchw"))
}
MMA = ("mma_kernel<Half>", "mma_kernel<Bfloat>")
ONE = "fused_kernel<Half, kNhwc, kMax>"
# A barrier, in order: what the block wrote goes out, it says that it has come, looks whether all have, and drops what
# it has cached of theirs. A fence on these architectures drops the cache, too.
FENCE = ["MEMBAR", "CCTL.IVALL"]
BARRIER = [*FENCE, "ATOMG.ADD", "LDG.STRONG", *FENCE]
# From 9.0: whether a launch lets the next one start, and whether it waits for the one before.
OVERLAP = {"pool": (True, False), "rows": (True, True), "mma": (True, True), "epilogue": (False, True)}
BEFORE_THE_WAIT = 3 * 8  # of the epilogue's loads: bias, scale and shift of 8 columns


def instructions(cubin: bytes, symbols: dict[str, str], folder: Path) -> dict[str, list[str]]:
    """The instructions of each kernel in the order of their addresses, predicates and operands left out."""
    file = folder / "kernels.cubin"
    file.write_bytes(cubin)
    assert NVDISASM is not None
    text = subprocess.run([NVDISASM, "-c", str(file)], capture_output=True, text=True, check=True).stdout
    names = {symbol: name for name, symbol in symbols.items()}
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section:
            code = found.setdefault(names[section[1]], [])
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if instruction:
            code.append(instruction[1])
    return found


def compiled(folder: Path, kernels: tuple[str, ...], arch: str = "sm_90") -> dict[str, list[str]]:
    code = nvrtc.compile_uncached(kernels, arch)
    return instructions(code.cubin, code.symbols, folder)


def synchronisation(code: list[str]) -> list[str]:
    """What of a kernel bears on what other blocks see: fences, atomics, and loads past the cache."""
    kinds = {"MEMBAR": "MEMBAR", "CCTL.IVALL": "CCTL.IVALL", "ATOMG": "ATOMG.ADD", "ATOM.": "ATOMG.ADD"}
    kept = []
    for instruction in code:
        if instruction.startswith("LD") and "STRONG" in instruction:
            kept.append("LDG.STRONG")
        kept += [kind for start, kind in kinds.items() if instruction.startswith(start)][:1]
    return kept


def read_only_loads(code: list[str]) -> int:
    return sum(one.startswith("LDG") and "CONSTANT" in one for one in code)


def loads_before_the_wait(code: list[str]) -> int:
    """Loads that may see what other launches write."""
    before = code[: code.index("ACQBULK")] if "ACQBULK" in code else []
    return sum(one.startswith("LDG") and "CONSTANT" not in one for one in before)


def faults(code: dict[str, list[str]], arch: str = "sm_90") -> list[str]:
    """What is wrong, a sentence each."""
    said = []
    for kernel, own in code.items():
        overlaps = OVERLAP.get(kernel.partition("_")[0], (False, False)) if int(arch[3:]) >= 90 else ()
        found = (own.count("PREEXIT"), own.count("ACQBULK"))
        if found != tuple(map(int, overlaps or (False, False))):
            said.append(f"{kernel} lets the next launch start and waits for the one before {found} times")
        early = loads_before_the_wait(own)
        if early != (BEFORE_THE_WAIT if overlaps and kernel.startswith("epilogue") else 0):
            said.append(f"{kernel} loads {early} times before it waits")
        spills = Counter(one.partition(".")[0] for one in own)
        if spills["STL"] or spills["LDL"]:
            said.append(f"{kernel} spills: {spills['STL']} stores, {spills['LDL']} loads")
        if kernel in STEPS:
            if synchronisation(own) != 2 * BARRIER:
                said.append(f"{kernel} does not have two whole barriers: {synchronisation(own)}")
            apart = sum(read_only_loads(code[step]) for step in STEPS[kernel])
            if read_only_loads(own) != apart:
                said.append(f"{kernel} has {read_only_loads(own)} read-only loads, its phases apart have {apart}")
        elif synchronisation(own) != (2 * FENCE if overlaps and kernel.startswith("epilogue") else []):  # of clusters
            said.append(f"{kernel} synchronises with nobody and has {synchronisation(own)}")
        if kernel.startswith("epilogue") and read_only_loads(own):
            said.append(f"{kernel} has {read_only_loads(own)} read-only loads: all that it reads was just written")
    return said


@pytest.mark.parametrize(
    ("arch", "kernels"),
    [
        ("sm_80", (ONE, *STEPS[ONE], *MMA)),
        ("sm_90", (*STEPS, *(step for steps in STEPS.values() for step in steps), *MMA)),
        ("sm_120", (ONE, *STEPS[ONE], *MMA)),
    ],
)
def test_the_machine_code_keeps_what_the_source_says(arch, kernels, tmp_path):
    code = compiled(tmp_path, kernels, arch)
    assert set(code) == set(kernels)
    assert faults(code, arch) == []
    for kernel in MMA:  # a step of 64 channels: 4 of 16, each 2 by 4 tiles
        assert Counter(one for one in code[kernel] if one.startswith("HMMA"))[hmma(kernel)] == 32
        assert len([one for one in code[kernel] if one.startswith("HMMA")]) == 32


def hmma(kernel: str) -> str:
    return "HMMA.16816.F32" + (".BF16" if "Bfloat" in kernel else "")


def changed(monkeypatch, folder: Path, old: str, new: str, which: int = 0, of: int = 1) -> None:
    """Compile from a copy of the source with the `which`-th of `of` occurrences of a text replaced."""
    parts = nvrtc.SOURCE.read_text().split(old)
    assert len(parts) == of + 1
    copy = folder / "changed.cu"
    copy.write_text(old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :]))
    monkeypatch.setattr(nvrtc, "SOURCE", copy)


@pytest.fixture(scope="module")
def phases(tmp_path_factory) -> dict[str, list[str]]:
    return compiled(tmp_path_factory.mktemp("phases"), STEPS[ONE])


@pytest.mark.parametrize(
    ("kernel", "old", "new", "which", "of", "fault"),
    [
        (ONE, "__threadfence();", "", 0, 2, "does not have two whole barriers"),
        (ONE, "__threadfence();", "", 1, 2, "does not have two whole barriers"),
        (ONE, "static_cast<volatile unsigned*>", "static_cast<unsigned*>", 0, 1, "does not have two whole barriers"),
        # In the fused kernel alone: a load of the epilogue as of what nobody writes.
        (ONE, "if (there) ahead[i][k][c] = partial[c * kThreads];",
         "if (there) ahead[i][k][c] = APART ? partial[c * kThreads] : __ldg(partial + c * kThreads);",
         0, 1, "read-only loads, its phases apart have"),
        (MMA[0], "wait_for_launch_before();", "", 1, 4, "waits for the one before (1, 0) times"),
    ],
)  # fmt: skip
def test_a_fault_in_the_source_is_seen_in_the_machine_code(
    kernel, old, new, which, of, fault, phases, tmp_path, monkeypatch
):
    changed(monkeypatch, tmp_path, old, new, which, of)
    [said] = faults(phases | compiled(tmp_path, (kernel,)))
    assert kernel in said
    assert fault in said


def test_spilled_registers_are_seen(tmp_path, monkeypatch):
    changed(monkeypatch, tmp_path, "__launch_bounds__(kMmaThreads)", "__launch_bounds__(kMmaThreads, 16)")
    [said] = faults(compiled(tmp_path, ("mma_kernel<Half>",)))
    assert said.startswith("mma_kernel<Half> spills: ")
