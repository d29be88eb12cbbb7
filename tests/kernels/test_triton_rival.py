"""The rival in Triton's language, by Triton's interpreter on the CPU, against the definition."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgn_deploy import bench

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

RUN = """
import numpy as np
import torch
from mgn_deploy.bench.kernel.triton_rival import triton_heads
from mgn_deploy.config import features_of
from emulator.reference import embed, stripe_pool_reduce

torch.manual_seed(0)
PAPER = ((1, 2, 3), ((6, 2), (12, 4), (12, 4)))
CASES = [(PAPER, 2, 72, 48, dtype, mirror) for dtype in (torch.float32, torch.float16) for mirror in (False, True)]
CASES += [(((8,), ((15, 2),)), 18, 72, 16, torch.float32, True)]  # stripes that share rows, more images than a tile
for (branches, sizes), n, channels, reduced, dtype, mirror in CASES:
    features = sum(map(features_of, branches))
    maps = [torch.randn(n, channels, *size).to(dtype).to(memory_format=torch.channels_last) for size in sizes]
    weight, bias = torch.randn(features, reduced, channels).to(dtype), torch.randn(features, reduced)
    found = triton_heads(maps, branches, weight, bias, mirror).numpy()
    exact = stripe_pool_reduce(
        [map_.double().numpy() for map_ in maps], branches, weight.double().numpy().transpose(0, 2, 1),
        bias.double().numpy()[:, None],
    )
    assert np.abs(found - embed(exact, mirror)).max() < 1e-5, (branches, dtype, mirror)
for arguments in (([maps[0].contiguous()], [8]), ([maps[0]], [9])):
    try:
        triton_heads(*arguments, weight, bias)
    except ValueError:
        continue
    raise AssertionError(arguments)
print("right")
"""


@pytest.mark.slow
def test_it_computes_the_definition():
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout == "right\n", done.stderr[-3000:]


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mgn_deploy.bench.kernel import triton_rival as rival

borders = {f"{side}{index}": "i32" for index in range(8) for side in "be"}
half = dict.fromkeys(("map_", "pooled", "weight"), "*fp16")
single = dict.fromkeys(("bias", "output", "reduced_rows", "embeddings"), "*fp32")
CONSTANTS = {
    "pool": {"STRIPES": 3, "PIXELS": rival.PIXELS, "CHANNELS": rival.CHANNELS},
    "reduce": {"IMAGES": rival.IMAGES, "OUTPUTS": rival.OUTPUTS, "DEPTH": rival.DEPTH},
    "finish": {"MIRROR": True, "COLUMNS": 2048},
}
for name, constants in CONSTANTS.items():
    function = getattr(rival, name)
    types = {**half, **single, **dict.fromkeys(constants, "constexpr")}
    signature = {argument: types.get(argument, "i32") for argument in function.arg_names}
    built = compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", int(sys.argv[1]), 32))
    print(name, bool(built.asm["cubin"]), "mma" in built.asm["ptx"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_it_compiles_without_a_gpu_and_multiplies_on_tensor_cores(arch, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, arch],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout == "pool True False\nreduce True True\nfinish True False\n", done.stderr[-3000:]


def test_it_is_as_short_as_a_rival_has_to_be():
    [folder] = bench.__path__
    assert len((Path(folder) / "kernel/triton_rival.py").read_text().splitlines()) <= 150
