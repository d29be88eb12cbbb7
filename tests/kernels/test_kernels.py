"""The CUDA kernels, run on the CPU by tests/emulator, against the definition in tests/emulator/reference.py."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from itertools import count, product
from pathlib import Path

import numpy as np
import pytest
from emulator.host import HostKernel, build_host, host_library, rounded
from emulator.reference import embed, stripe_pool, stripe_pool_reduce
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mgn_deploy.config import features_of
from mgn_deploy.kernels.nvrtc import SOURCE
from mgn_deploy.kernels.plan import LAYOUTS, NECKS, PATHS, POOLINGS, TYPES, Device, Problem, launches, plan_on

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

PATHS = PATHS[1:]  # but "auto"
# Half the distance to the next number, over the number: what one rounding may change.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINIEST = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 2.0**-134}
FEW_EXAMPLES = settings(
    max_examples=40, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def kernel():
    return HostKernel(host_library())


def random_case(branches, sizes, n=2, channels=24, reduced=16, dtype="float32", pooling="max", neck="relu", seed=0):
    """Arguments of the definition, and of `HostKernel.run`, that `dtype` can hold."""
    rng = np.random.default_rng(seed)
    features = sum(map(features_of, branches))
    # A GeM of numbers mostly above its epsilon, as after a ReLU.
    shift = 1.5 if pooling == "gem" else 0.0
    case = {
        "maps": [rounded(rng.normal(size=(n, channels, *size)) + shift, dtype) for size in sizes],
        "branches": branches,
        "weight": rounded(rng.normal(size=(features, channels, reduced)), dtype),
        "bias": rng.normal(size=(features, 1, reduced)).astype(np.float32),
        "pooling": pooling,
        "neck": neck,
    }
    if pooling == "gem":
        case["powers"] = rng.uniform(1.5, 4.5, features).astype(np.float32)
    if neck == "relu_norm":
        case["scale"] = rng.normal(size=(features, 1, reduced)).astype(np.float32)
        case["shift"] = rng.normal(size=(features, 1, reduced)).astype(np.float32)
    return case


def check_features(kernel, case, dtype, **how):
    """Within 1e-5 of the sizes of what is summed, and then one rounding to the dtype."""
    found = kernel.run(**case, dtype=dtype, **how)
    expected = stripe_pool_reduce(**case)
    sizes = {**case, "maps": [np.abs(map_) for map_ in case["maps"]], "weight": np.abs(case["weight"])}
    sizes |= {"bias": np.abs(case["bias"]), "neck": "linear" if case["neck"] == "linear" else "relu"}
    summed = stripe_pool_reduce(**{k: v for k, v in sizes.items() if k not in ("scale", "shift")})
    if case["neck"] == "relu_norm":
        n = len(summed)
        summed = summed * np.abs(case["scale"]).reshape(1, -1) + np.abs(case["shift"]).reshape(1, -1)
        assert summed.shape == (n, expected.shape[1])
    allowed = 1e-5 * summed * (1 + ROUNDING[dtype]) + ROUNDING[dtype] * np.abs(expected) + TINIEST[dtype]
    assert (np.abs(found - expected) <= allowed).all()
    if dtype == "float32":
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    return found


SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 9))


@st.composite
def problems(draw):
    branches = tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=4)))
    path = draw(st.sampled_from(PATHS))
    return {
        "branches": branches,
        "sizes": tuple(draw(SHAPES) for _ in branches),
        "n": draw(st.integers(1, 8 if path != "tiles" else 70)) if len(branches) < 3 else draw(st.integers(1, 3)),
        "channels": 8 * draw(st.integers(1, 12)),
        "reduced": 16 * draw(st.integers(1, 5)),
        "dtype": draw(st.sampled_from(list(TYPES))),
        "pooling": draw(st.sampled_from(list(POOLINGS))),
        "neck": draw(st.sampled_from(list(NECKS))),
        "seed": draw(st.integers(0, 1000)),
    }, {"layout": draw(st.sampled_from(list(LAYOUTS))), "path": path}


@FEW_EXAMPLES
@given(problem=problems(), multiprocessors=st.integers(1, 150), capability=st.sampled_from([70, 75, 90, 120]))
def test_any_problem_gives_the_definitions_features_on_any_device(problem, multiprocessors, capability):
    what, how = problem
    kernel = HostKernel(host_library(), multiprocessors, capability)
    check_features(kernel, random_case(**what), what["dtype"], **how)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_papers_heads_in_small(kernel, dtype, layout, path):
    """Three branches of 12x4 and 24x8 maps; the sum over channels goes in several tiles and parts."""
    case = random_case((1, 2, 3), ((12, 4), (24, 8), (24, 8)), 2, 520, 16, dtype)
    check_features(kernel, case, dtype, layout=layout, path=path)


@pytest.mark.parametrize("output", ["embeddings", "mirror_embeddings"])
@pytest.mark.parametrize("neck", NECKS)
@pytest.mark.parametrize("path", PATHS)
def test_embeddings_are_unit_rows_of_each_image_with_its_own_mirror(kernel, path, neck, output):
    case = random_case((1, 3), ((3, 2), (7, 2)), n=6, reduced=48, dtype="float16", neck=neck)
    found = kernel.run(**case, dtype="float16", layout="nhwc", output=output, path=path)
    expected = embed(stripe_pool_reduce(**case), flip=output == "mirror_embeddings")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("output", ["features", "embeddings", "mirror_embeddings"])
@pytest.mark.parametrize("reduced", [688, 1392])
def test_rows_wider_than_a_blocks_registers(kernel, reduced, output):
    """2064 and 4176 columns, of which a block of the epilogue holds 2048: the others are read back."""
    case = random_case((2,), ((3, 2),), n=2, channels=8, reduced=reduced)
    found = kernel.run(**case, output=output, path="fused")
    expected = stripe_pool_reduce(**case)
    if output != "features":
        expected = embed(expected, flip=output == "mirror_embeddings")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", ["max", "gem"])
def test_the_order_that_warps_and_blocks_run_in_changes_no_bit(kernel, pooling, layout, path):
    """Sums have a fixed order, and no result depends on who came first: a missing barrier would."""
    dtype = "float16" if pooling == "max" else "float32"
    case = random_case((2, 3), ((5, 3), (7, 5)), n=4, channels=136, pooling=pooling, dtype=dtype)
    how = {"layout": layout, "path": path, "output": "embeddings", "dtype": dtype}
    first = kernel.run(**case, **how)
    assert np.isfinite(first).all()
    for order in (0, 1, 2, 3):
        assert np.array_equal(first, kernel.run(**case, **how, order=order))


@pytest.mark.slow
def test_every_barriers_absence_would_be_noticed(tmp_path):
    """Each is skipped in turn, and each wait for the launch before: what the simulation cannot see, the tests of orders
    above would not prove."""
    source, numbers = SOURCE.read_text(), count()
    barrier = r"(?:__syncthreads|cluster_sync|wait_for_launch_before)\(\);|    wait_for_all_blocks\(p.barrier\);"
    device, end, kernels = source.partition("}  // namespace\n#endif\n")  # the first are not compiled here
    broken = tmp_path / SOURCE.name
    broken.write_text(
        f'extern "C" {{ int without = -1; }}\n{device}{end}'
        + re.sub(barrier, lambda found: f"if (without != {next(numbers)}) {found[0]}", kernels)
    )
    barriers = next(numbers)
    kinds = (
        "pool_kernel<{0}, {1}, kMax>",
        "fused_kernel<{0}, {1}, kMax>",
        "rows_kernel<{0}, {0}>",
        "epilogue_kernel<{0}>",
    )
    names = {kind.format(*of) for kind in kinds for of in product(("float", "Half"), LAYOUTS.values())}
    names |= {"mma_kernel<Half>", "fma_kernel<float, float>"}
    library = build_host(tmp_path, COMPILER, source=broken, kernels=sorted(names))
    without = ctypes.c_int.in_dll(HostKernel(library).library, "without")
    assert not results_differ(library)
    for number in range(barriers):
        without.value = number
        line = broken.read_text().partition(f"(without != {number})")[0].count("\n")
        assert results_differ(library), f"without the barrier in line {line} of {SOURCE.name}"
    assert barriers == 18


def results_differ(library: Path) -> bool:
    """On a device where each block of the fused kernel has several turns, and a row of the three launches' epilogue
    several blocks."""
    for path, layout, dtype in product(PATHS, LAYOUTS, ("float32", "float16")):
        kernel = HostKernel(library, multiprocessors=2 if path == "fused" else 16)
        case = random_case((2, 3), ((5, 3), (7, 5)), n=4, channels=72, dtype=dtype)  # two steps of 64
        how = {"dtype": dtype, "layout": layout, "path": path, "output": "embeddings"}
        first = kernel.run(**case, **how)
        if any(not np.array_equal(first, kernel.run(**case, **how, order=order)) for order in (1, 2, 3)):
            return True
    return False


def test_the_sum_over_channels_is_split_only_where_blocks_are_few():
    case = random_case((1,), ((2, 2),), n=9, channels=1024)
    for multiprocessors, parts in ((132, 4), (1, 2)):
        kernel = HostKernel(host_library(), multiprocessors)
        check_features(kernel, case, "float32", path="tiles")
        assert [one.grid[2] for one in kernel.launched] == [1, parts, 1]  # one feature


def test_more_parts_than_the_epilogue_loads_at_once():
    """Five, and four are under way together; mirrors are read alongside."""
    case = random_case((1,), ((2, 2),), n=10, channels=1600)
    many = HostKernel(host_library(), multiprocessors=132)
    check_features(many, case, "float32", path="tiles")
    assert many.launched[1].grid[2] == 5
    found = many.run(**case, path="tiles", output="mirror_embeddings")
    np.testing.assert_allclose(found, embed(stripe_pool_reduce(**case), flip=True), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "least"), [("float16", 75), ("bfloat16", 80)])
def test_tensor_cores_and_plain_multiply_adds_give_the_same_answer(dtype, least):
    """Volta's and Turing's tensor cores do not take all types."""
    case = random_case((2,), ((4, 3),), n=9, channels=72, dtype=dtype)
    for capability, reduction in ((least - 5, "fma"), (least, "mma")):
        kernel = HostKernel(host_library(), capability=capability)
        check_features(kernel, case, dtype, path="tiles")
        assert kernel.launched[1].kernel.startswith(f"{reduction}_kernel")


def pooled_only(kernel, maps, branches, dtype, layout, path="rows"):
    """Pooled vectors `[n, F, C]`, seen through reductions that are the identity."""
    channels, features = maps[0].shape[1], sum(map(features_of, branches))
    case = {
        "maps": maps,
        "branches": branches,
        "weight": np.repeat(np.eye(channels, dtype=np.float32)[None], features, 0),
        "bias": np.full((features, 1, channels), -0.0, np.float32),
        "neck": "linear",
    }
    return kernel.run(**case, dtype=dtype, layout=layout, path=path).reshape(len(maps[0]), features, channels)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_maxima_are_the_maps_own_numbers(kernel, dtype, layout, path):
    """Negative, subnormal and largest numbers come out as they went in: no bit is rounded on the way."""
    rng = np.random.default_rng(3)
    size = {"float32": 2.0**-128, "float16": 2.0**-16, "bfloat16": 2.0**-128}[dtype]
    subnormal = rounded(rng.uniform(-1.9, -0.5, size=(2, 16, 5, 3)) * size, dtype)
    large = rounded(rng.uniform(-6e4, -5e4, size=(2, 16, 5, 3)), dtype)
    for map_ in (subnormal, large):
        expected = np.stack(stripe_pool(map_, 3), axis=1)
        assert (expected < 0).all()
        assert np.array_equal(pooled_only(kernel, [map_], (3,), dtype, layout, path), expected)


def test_every_finite_half_passes_unchanged(kernel):
    """Through the pool, a tensor core tile and the last rounding: the simulated conversions are NumPy's."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves[~np.isfinite(halves)] = 0
    maps = [halves.reshape(1024, 64, 1, 1)]
    found = pooled_only(kernel, maps, (1,), "float16", "nhwc", "tiles")
    assert np.array_equal(found.reshape(-1), halves)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("pixel", [0, 7, 34])
def test_nan_reaches_the_regions_that_hold_it_and_no_other(kernel, pixel, dtype, layout, path):
    """7 rows in 3 stripes: rows 2 and 4 are in two of them."""
    case = random_case((3,), ((7, 5),), dtype=dtype)
    case["maps"][0].reshape(2, 24, 35)[1, 5, pixel] = np.nan
    expected = np.isnan(stripe_pool_reduce(**case))
    assert expected.any()
    assert not expected.all()
    assert np.array_equal(np.isnan(kernel.run(**case, dtype=dtype, layout=layout, path=path)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_infinities_are_numbers_like_others(kernel, infinity, dtype, layout):
    case = random_case((1, 2), ((2, 3), (4, 3)), dtype=dtype, neck="linear")
    case["weight"] = np.abs(case["weight"])
    case["maps"][1][0, 3, :2] = infinity  # a whole stripe: the minimum shows only there
    expected = stripe_pool_reduce(**case)
    assert np.isinf(expected).any()
    found = kernel.run(**case, dtype=dtype, layout=layout, path="tiles")
    assert np.array_equal(np.isinf(found) * np.sign(found), np.isinf(expected) * np.sign(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_negative_zero_is_more_than_what_is_negative(kernel, dtype, layout):
    """As a number: to compare bits, or to begin at the least of them, would take -1 or -0.5."""
    map_ = np.full((1, 16, 4, 2), -1.0, np.float32)
    map_[0, :, 1, 1] = -0.0
    map_[0, :, 2, 0] = -0.5
    found = pooled_only(kernel, [map_], (2,), dtype, layout)
    assert np.array_equal(found[0, :, 0], [0.0, 0.0, -0.5])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("branches", "size"),
    [((8,), (1, 1)), ((8,), (3, 1)), ((7,), (5, 1)), ((8,), (15, 2)), ((5,), (23, 1)), ((1,), (1, 9))],
)
def test_stripes_that_share_rows_or_outnumber_them(kernel, branches, size, layout):
    for dtype, pooling in (("float32", "avg"), ("float16", "max"), ("bfloat16", "gem")):
        case = random_case(branches, (size,), n=1, channels=8, dtype=dtype, pooling=pooling)
        check_features(kernel, case, dtype, layout=layout, path="fused")


def test_paths_are_taken_by_batch(kernel):
    def taken(kernel, n):
        return kernel.plan(Problem("float16", "nhwc", n, 64, 16, (2,), ((4, 2),))).path

    assert [taken(kernel, n) for n in (1, 8, 9, 1024)] == ["fused", "fused", "tiles", "tiles"]
    assert taken(HostKernel(host_library(), cooperative=False), 8) == "rows"


@pytest.mark.parametrize(
    ("constant", "other"),
    [("kTile = 64", "kTile = 32"), ("float *bias, *scale", "float *scale, *bias"), ("kNchw, kNhwc", "kNhwc, kNchw")],
)
def test_a_source_that_disagrees_with_the_planner_does_not_build(tmp_path, constant, other):
    source = SOURCE.read_text()
    assert source.count(constant) == 1
    changed = tmp_path / "changed.cu"
    changed.write_text(source.replace(constant, other))
    with pytest.raises(RuntimeError, match="static assertion failed"):
        build_host(tmp_path, COMPILER, source=changed, kernels=["epilogue_kernel<float>"])


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
from test_kernels import SANITIZED_CASES, random_case
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
