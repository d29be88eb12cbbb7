"""The kernels for PyCUDA: what they are told, on the emulator; on a GPU the whole of it."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import numpy as np
import pytest
from emulator.host import HostKernel, bits, host_library, rounded
from emulator.reference import embed, stripe_pool_reduce

from mgn_deploy.cuda.device import gpu_problem
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.kernels import nvrtc
from mgn_deploy.kernels.plan import BARRIER_BYTES, LAYOUTS, TYPES, Device, Problem, launches, plan_on
from mgn_deploy.kernels.pycuda_ import PycudaKernel, pointers_to

BRANCHES, SIZES, FEATURES = (1, 2, 3), ((3, 2), (4, 3), (7, 3)), 8
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class Shown:
    """An array as `GPUArray` shows its own: by the CUDA array interface."""

    def __init__(self, array):
        self.array = array

    @property
    def __cuda_array_interface__(self):
        array = self.array
        facts = {"shape": array.shape, "strides": array.strides, "typestr": array.dtype.str, "version": 3}
        return {**facts, "data": (array.ctypes.data, False)}


def numbers_of(array):
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array.astype(np.float64)


def shown(arrays):
    on_gpu = {name: Shown(array) for name, array in arrays.items() if name != "maps"}
    return {**on_gpu, "maps": [Shown(map_) for map_ in arrays["maps"]]}


def a_case(dtype, layout, n, pooling, neck, output, channels=40, reduced=16, seed=0):
    """The problem, its arrays as the kernels read them, the output's place full of NaN, and what should be in it."""
    rng = np.random.default_rng(seed)
    maps = [rounded(rng.normal(size=(n, channels, *size)) + (1.5 if pooling == "gem" else 0), dtype) for size in SIZES]
    weight = rounded(rng.normal(size=(FEATURES, reduced, channels)), dtype)
    bias, scale, shift = (rng.normal(size=(FEATURES, reduced)).astype(np.float32) for _ in range(3))
    powers = rng.uniform(1.5, 4.5, FEATURES).astype(np.float32)
    columns = [vector[:, None] for vector in (bias, scale, shift)]
    choices = {"pooling": pooling, "neck": neck}
    expected = stripe_pool_reduce(
        maps,
        BRANCHES,
        weight.transpose(0, 2, 1),
        columns[0],
        powers=powers,
        scale=columns[1],
        shift=columns[2],
        **choices,
    )
    if output != "features":
        expected = embed(expected, output == "mirror_embeddings")
    problem = Problem(dtype, layout, n, channels, reduced, BRANCHES, SIZES, output=output, **choices)
    in_layout = [map_.transpose(0, 2, 3, 1) if layout == "nhwc" else map_ for map_ in maps]
    arrays = {
        "maps": [bits(map_, dtype) for map_ in in_layout],
        "weight": bits(weight, dtype),
        "bias": bias,
        "output": bits(np.full(expected.shape, np.nan), dtype if output == "features" else "float32"),
        "scale": scale,
        "shift": shift,
        "powers": powers,
    }
    return problem, arrays, expected


def check(found, expected, dtype):
    error = np.linalg.norm(numbers_of(found) - expected) / np.linalg.norm(expected)
    assert error < 1e-5 + (ROUNDING[dtype] if found.dtype != np.float32 else 0)


@pytest.fixture(scope="module")
def emulated():
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return HostKernel(host_library(), cooperative=False)


CASES = [
    (2, "max", "relu", "mirror_embeddings"),
    (10, "max", "linear", "features"),
    (3, "avg", "relu", "features"),
    (9, "gem", "relu_norm", "embeddings"),
]


@pytest.mark.parametrize(("n", "pooling", "neck", "output"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_what_the_kernels_are_told_gives_the_definitions_result(emulated, dtype, layout, n, pooling, neck, output):
    problem, arrays, expected = a_case(dtype, layout, n, pooling, neck, output)
    plan = emulated.plan(problem)
    assert plan.path != "fused"
    workspace = np.full(plan.workspace_bytes + 16, 0xFF, np.uint8)
    workspace = workspace[-workspace.ctypes.data % 16 :][: plan.workspace_bytes]
    workspace[:BARRIER_BYTES] = 0
    pointers = pointers_to(problem, workspace.ctypes.data, **shown(arrays))
    emulated.launch(problem, plan, pointers)
    check(arrays["output"], expected, dtype)


@pytest.mark.parametrize("n", [8, 16])
def test_its_kernels_are_in_the_machine_code_of_a_jetson(n, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = Problem("float16", "nhwc", n, 2048, 256, BRANCHES, ((12, 4), (24, 8), (24, 8)))
    kernels = tuple(one.kernel for one in launches(problem, plan_on(problem, Device(16, 87, resident_blocks=0))))
    assert len(kernels) == 3
    code = nvrtc.compile_kernels(kernels, "sm_87")
    for kernel in kernels:
        assert code.symbols[kernel].encode() + b"\0" in code.cubin


def off_by_one_number(array):
    larger = np.zeros(array.size + 1, array.dtype)
    return larger[1:].reshape(array.shape) if larger.ctypes.data % 16 == 0 else larger[:-1].reshape(array.shape)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bias", lambda array: array.astype(np.float16), r"bias is <f2 \[8, 16\], needs float32 \(<f4\) \[8, 16\]"),
        ("weight", lambda array: array.transpose(0, 2, 1), r"weight is <f2 \[8, 40, 16\], needs float16"),
        ("bias", np.asfortranarray, "bias is not dense in C order: its strides"),
        ("weight", off_by_one_number, "weight begins at 0x.* not at a multiple of 16 bytes"),
        ("output", lambda array: array[:1], r"output is <f4 \[1, 128\], needs float32 \(<f4\) \[2, 128\]"),
    ],
)
def test_an_array_that_does_not_fit_is_named(name, change, message):
    problem, arrays, _ = a_case("float16", "nhwc", 2, "max", "relu", "embeddings")
    arrays[name] = change(arrays[name])
    with pytest.raises(ValueError, match=message):
        pointers_to(problem, 256, **shown(arrays))


def test_an_array_in_host_memory_is_refused():
    problem, arrays, _ = a_case("float16", "nhwc", 2, "max", "relu", "embeddings")
    with pytest.raises(ValueError, match="map 0 is ndarray and no array on the GPU"):
        pointers_to(problem, 256, **arrays)


def test_one_map_too_few_is_refused():
    problem, arrays, _ = a_case("float16", "nhwc", 2, "max", "relu", "embeddings")
    with pytest.raises(ValueError, match="2 maps are not the 3 of the problem"):
        pointers_to(problem, 256, arrays.pop("maps")[:2], **arrays)


def test_without_pycuda_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    problem = Problem("float16", "nhwc", 2, 40, 16, BRANCHES, SIZES)
    with pytest.raises(CannotRun, match=r"PyCUDA cannot be imported .*: pip install pycuda, which compiles it"):
        PycudaKernel(problem)


def test_the_path_that_pycuda_cannot_launch_is_refused():
    problem = Problem("float16", "nhwc", 2, 40, 16, BRANCHES, SIZES, path="fused")
    with pytest.raises(UserError, match="PyCUDA has no cooperative launch"):
        PycudaKernel(problem)


@pytest.fixture(params=["own", "primary"])
def context(request):
    """PyCUDA's own context, as pycuda.autoinit makes one, or the device's primary one, as PyTorch and TensorRT use."""
    from pycuda import driver

    driver.init()
    device = driver.Device(0)
    if request.param == "own":
        made = device.make_context()
    else:
        made = device.retain_primary_context()
        made.push()
    yield
    made.pop()


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("pycuda") is None, reason="needs PyCUDA")
@pytest.mark.skipif(gpu_problem() is not None, reason="needs a CUDA device")
@pytest.mark.parametrize(("n", "pooling", "neck", "output"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_gpu_arrays_give_the_definitions_result_twice_the_same(context, dtype, layout, n, pooling, neck, output):
    from pycuda import driver, gpuarray

    problem, arrays, expected = a_case(dtype, layout, n, pooling, neck, output, channels=264, reduced=48)
    kernel, stream, found = PycudaKernel(problem), driver.Stream(), []
    maps = [gpuarray.to_gpu(map_) for map_ in arrays.pop("maps")]
    for _ in range(2):
        on_gpu = {name: gpuarray.to_gpu(array) for name, array in arrays.items()}
        kernel.launch(maps, stream=stream, **on_gpu)
        stream.synchronize()
        found.append(on_gpu["output"].get())
    check(found[0], expected, dtype)
    np.testing.assert_array_equal(found[0], found[1])
