"""The CUDA kernels on the CPU, watched by the sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from emulator.host import build_host
from kernel_cases import COMPILER

from mgn_deploy.kernels.plan import LAYOUTS, PATHS, POOLINGS, TYPES, Device, Problem, launches, plan_on

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

PATHS = PATHS[1:]  # but "auto"


# Each type, layout and path once, each path with every pooling.
SANITIZED_CASES = [
    (dtype, layout, path, list(POOLINGS)[(i + j + k) % 3])
    for (i, dtype), (j, layout), (k, path) in product(enumerate(TYPES), enumerate(LAYOUTS), enumerate(PATHS))
]
SANITIZED = """
import sys
from pathlib import Path
import numpy as np
from emulator.host import HostKernel
from kernel_cases import random_case
from test_kernel_sanitizers import SANITIZED_CASES
kernel = HostKernel(Path(sys.argv[1]), multiprocessors=12)
rng = np.random.default_rng(5)
for dtype, layout, path, pooling in SANITIZED_CASES:
    branches = tuple(int(x) for x in rng.integers(1, 9, rng.integers(1, 3)))
    sizes = tuple((int(rng.integers(1, 12)), int(rng.integers(1, 8))) for _ in branches)
    n, channels = int(rng.integers(1, 4)), 8 * int(rng.integers(1, 11))
    case = random_case(branches, sizes, n, channels, 16 * int(rng.integers(1, 3)), dtype, pooling)
    output = "features" if layout == "nchw" else "embeddings"
    kernel.run(**case, dtype=dtype, layout=layout, path=path, output=output)
print("clean")
"""


def run_sanitized(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python itself is not built with the sanitizer, so its runtime is loaded before it."""
    runtime = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1]))),
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    kernels = set()
    for dtype, layout, path, pooling in SANITIZED_CASES:
        problem = Problem(dtype, layout, 1, 8, 16, (1,), ((1, 1),), pooling=pooling, path=path)
        kernels |= {one.kernel for one in launches(problem, plan_on(problem, Device(1, 90, 1)))}
    return build_host(tmp_path_factory.mktemp("sanitized"), COMPILER, sanitize=True, kernels=sorted(kernels))


@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's runtime")
def test_sanitizers_find_nothing(sanitized):
    result = run_sanitized(SANITIZED, str(sanitized))
    assert result.stdout == "clean\n", result.stderr[-4000:]


@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's runtime")
def test_sanitizers_watch_what_kernels_read(sanitized):
    """A map that ends 16 bytes early is noticed: were it not, the test above would prove nothing."""
    script = SANITIZED.split("rng =")[0] + (
        "case = random_case((2,), ((4, 2),), n=1, pooling='avg')\n"
        "copy = kernel._copy\n"
        "short = lambda data: data.reshape(-1)[:-4] if data.shape == (1, 24, 4, 2) else data\n"
        "kernel._copy = lambda stack, data: copy(stack, short(data))\n"
        "kernel.run(**case, path='rows')\n"
    )
    result = run_sanitized(script, str(sanitized))
    assert "heap-buffer-overflow" in result.stderr
