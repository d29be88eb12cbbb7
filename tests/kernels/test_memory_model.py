"""The one launch whose blocks read what others wrote, under the memory model of `emulator/memory_model.cpp`; and that
it sees what it is there for, each fault put into a copy of the source."""

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

FUSED = ("fused_kernel<Half, kNhwc, kMax>", "fused_kernel<Half, kNchw, kMax>", "fused_kernel<float, kNhwc, kGem>")
THREE = ("pool_kernel<Half, kNhwc, kMax>", "mma_kernel<Half>", "rows_kernel<Half, Half>", "epilogue_kernel<Half>")

RUN = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from emulator.host import HostKernel
from test_kernels import check_features, random_case
kernel = HostKernel(Path(sys.argv[1]), multiprocessors=6)  # 6 blocks at a time
for dtype, layout, pooling in (("float16", "nhwc", "max"), ("float16", "nchw", "max"), ("float32", "nhwc", "gem")):
    for order in range(3):
        case = random_case((2, 3), ((5, 3), (7, 5)), n=3, channels=136, dtype=dtype, pooling=pooling)
        check_features(kernel, case, dtype, layout=layout, path="fused", order=order)
print("fused is right")
if len(sys.argv) > 4:
    for path, n in (("rows", 3), ("tiles", 12)):
        case = random_case((2, 3), ((5, 3), (7, 5)), n=n, channels=136, dtype="float16")
        check_features(kernel, case, "float16", layout="nhwc", path=path)
    print("three launches are right")
"""


def run(folder: Path, source: Path = SOURCE, *, three: bool = False) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which the model may abort."""
    library = build_host(
        folder, COMPILER, source=source, memory_model=True, kernels=[*FUSED, *(THREE if three else ())]
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    return subprocess.run(
        [sys.executable, "-c", RUN, str(library), *paths, *(["three"] if three else [])],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_blocks_that_see_no_more_than_fences_show_them_compute_the_definition(tmp_path):
    done = run(tmp_path, three=True)
    assert done.stdout == "fused is right\nthree launches are right\n", done.stderr[-2000:]


def changed(folder: Path, old: str, new: str, which: int = 0, of: int = 1) -> Path:
    """A copy of the source with the `which`-th of `of` occurrences of a text replaced."""
    parts = SOURCE.read_text().split(old)
    assert len(parts) == of + 1
    copy = folder / SOURCE.name
    copy.write_text(old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :]))
    return copy


@pytest.mark.parametrize("which", [0, 1], ids=["of what this block wrote", "of what the others wrote"])
def test_a_fence_that_is_missing_shows_as_a_wrong_result(tmp_path, which):
    done = run(tmp_path, changed(tmp_path, "__threadfence();", "", which, of=2))
    assert done.returncode == 1
    assert "AssertionError" in done.stderr


def test_a_barrier_that_is_read_from_the_cache_never_opens(tmp_path):
    done = run(tmp_path, changed(tmp_path, "static_cast<volatile unsigned*>", "static_cast<unsigned*>"))
    assert "threads spin for ever" in done.stderr


@pytest.mark.parametrize(
    "load", ["octet[image].load_written(pooled", "raw[i] = load_written16(from"], ids=["at one place", "at all"]
)
def test_a_read_only_load_of_what_another_block_wrote_is_named(tmp_path, load):
    done = run(tmp_path, changed(tmp_path, load, load.replace("load_written", "load_input")))
    assert "memory model: a read-only load of what the same launch wrote" in done.stderr
