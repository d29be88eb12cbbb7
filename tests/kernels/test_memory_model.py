"""Launches whose blocks read what others wrote, under the memory model of `emulator/memory_model.cpp`; and that it sees
what it is there for: faults that a copy of the source has, each switched on in turn."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulator.host import build_host

from mgn_deploy.kernels.nvrtc import SOURCE

COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs GCC, whose hooks the model uses"),
]

KERNELS = (
    *("fused_kernel<Half, kNhwc, kMax>", "fused_kernel<Half, kNchw, kMax>", "fused_kernel<float, kNhwc, kGem>"),
    *("pool_kernel<Half, kNhwc, kMax>", "mma_kernel<Half>", "rows_kernel<Half, Half>", "epilogue_kernel<Half>"),
)
ROWS = "octet[image].load_written(pooled + image * p.channels + first + i * 256)"
TILES = "next_image[i].load_written(pooled + image * row_size + c)"
READ_ONLY = "memory model: a read-only load of what the same launch wrote"  # or one that overlaps it
WRONG = "AssertionError"
# By a name: an expression of the source, which of its occurrences, the faulty one; a path that shows it, and how.
FAULTS = {
    "what a block wrote does not go out": ("__threadfence()", 0, "void()", "fused", WRONG),
    "what a block has cached stays": ("__threadfence()", 1, "void()", "fused", WRONG),
    "the barrier is read from the cache": (
        "*static_cast<volatile unsigned*>(barrier)", 0, "plain(barrier)", "fused", "threads spin for ever",
    ),
    "pooled vectors are read as what nobody writes": (ROWS, 0, ROWS.replace("written", "input"), "fused", READ_ONLY),
    "and by the next launch": (ROWS, 0, ROWS.replace("written", "input"), "rows", READ_ONLY),
    "and on tensor cores": (TILES, 0, TILES.replace("written", "input"), "tiles", READ_ONLY),
    "the reduction of few images does not wait": ("wait_for_launch_before()", 0, "void()", "rows", WRONG),
    "the reduction on tensor cores does not wait": ("wait_for_launch_before()", 1, "void()", "tiles", WRONG),
    "the epilogue does not wait": ("wait_for_launch_before()", 3, "void()", "tiles", WRONG),
}  # fmt: skip

RUN = """
import ctypes, sys
sys.path[:0] = sys.argv[4:]
from pathlib import Path
from emulator.host import HostKernel
from kernel_cases import check_features, random_case
kernel = HostKernel(Path(sys.argv[1]), multiprocessors=6)  # 6 blocks at a time
ctypes.c_int.in_dll(kernel.library, "fault").value = int(sys.argv[2])
CASES = {
    "fused": [("float16", "nhwc", "max", 3), ("float16", "nchw", "max", 3), ("float32", "nhwc", "gem", 3)],
    "rows": [("float16", "nhwc", "max", 3)],
    "tiles": [("float16", "nhwc", "max", 12)],
}
for path in sys.argv[3].split(","):
    for dtype, layout, pooling, n in CASES[path]:
        for order in range(3):
            case = random_case((2, 3), ((5, 3), (7, 5)), n=n, channels=136, dtype=dtype, pooling=pooling)
            check_features(kernel, case, dtype, layout=layout, path=path, order=order)
print("right")
"""


def with_faults(source: str) -> str:
    """The kernels with a variable `fault`: the number of the one of FAULTS that is on."""
    device, end, kernels = source.partition("}  // namespace\n#endif\n")
    for number, (right, which, faulty, *_) in enumerate(FAULTS.values()):
        parts = kernels.split(right)
        assert len(parts) > which + 1
        either = f"(fault == {number} ? {faulty} : {right})"
        kernels = right.join(parts[: which + 1]) + either + right.join(parts[which + 1 :])
    plain = "[[gnu::noinline]] unsigned plain(const unsigned* at) { return *at; }"
    return f'extern "C" {{ int fault = -1; }}\n{plain}\n{device}{end}{kernels}'


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memory-model")
    copy = folder / SOURCE.name
    copy.write_text(with_faults(SOURCE.read_text()))
    return build_host(folder, COMPILER, source=copy, memory_model=True, kernels=KERNELS)


def run(library: Path, fault: int, paths: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which the model may abort."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", RUN, str(library), str(fault), paths, *folders]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_blocks_that_see_no_more_than_fences_and_waits_show_them_compute_the_definition(library):
    done = run(library, -1, "fused,rows,tiles")
    assert done.stdout == "right\n", done.stderr[-2000:]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(library, name):
    *_, path, said = FAULTS[name]
    done = run(library, list(FAULTS).index(name), path)
    assert done.returncode
    assert said in done.stderr
