"""The CUDA kernels, run on the CPU through kernels/host_shim.h, against the definition in kernels/reference.py."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from emulator.host import SOURCE, HostKernel, build_host, rounded
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mgn_deploy.kernels import plan as python_plan
from mgn_deploy.kernels.reference import embed, stripe_pool, stripe_pool_reduce

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

DTYPES, LAYOUTS, PATHS = python_plan.DTYPES, python_plan.LAYOUTS, ("fused", "rows", "tiles")
# Half the distance to the next number, over the number: what one rounding may change.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINIEST = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 2.0**-134}
FEW_EXAMPLES = settings(
    max_examples=60, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build_host(tmp_path_factory.mktemp("kernel"), COMPILER)


@pytest.fixture(scope="session")
def kernel(library):
    return HostKernel(library)


def random_case(branches, sizes, n=2, channels=24, reduced=16, dtype="float32", pooling="max", neck="relu", seed=0):
    """Arguments of the definition, and of `HostKernel.run`, that `dtype` can hold."""
    rng = np.random.default_rng(seed)
    features = sum(map(python_plan.features_of, branches))
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
        "dtype": draw(st.sampled_from(DTYPES)),
        "pooling": draw(st.sampled_from(python_plan.POOLINGS)),
        "neck": draw(st.sampled_from(python_plan.NECKS)),
        "seed": draw(st.integers(0, 1000)),
    }, {"layout": draw(st.sampled_from(LAYOUTS)), "path": path}


@FEW_EXAMPLES
@given(problem=problems())
def test_any_problem_gives_the_definitions_features(kernel, problem):
    what, how = problem
    check_features(kernel, random_case(**what), what["dtype"], **how)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_papers_heads_in_small(kernel, dtype, layout, path):
    """Three branches of 12x4 and 24x8 maps; the sum over channels goes in several tiles and parts."""
    case = random_case((1, 2, 3), ((12, 4), (24, 8), (24, 8)), 2, 520, 16, dtype)
    check_features(kernel, case, dtype, layout=layout, path=path)


@pytest.mark.parametrize("output", ["embeddings", "mirror_embeddings"])
@pytest.mark.parametrize("neck", python_plan.NECKS)
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
    """Each is skipped in turn: what the simulation cannot see, the tests of orders above would not prove."""
    source, numbers = SOURCE.read_text(), count()
    barrier = r"__syncthreads\(\);|    wait_for_all_blocks\(p.barrier\);"
    broken = tmp_path / SOURCE.name
    broken.write_text(
        'extern "C" { int without = -1; }\n'
        + re.sub(barrier, lambda found: f"if (without != {next(numbers)}) {found[0]}", source)
    )
    barriers = next(numbers)
    assert barriers == 12
    kernel = HostKernel(build_host(tmp_path, COMPILER, source=broken))
    without = ctypes.c_int.in_dll(kernel.library, "without")
    assert not results_differ(kernel)
    for number in range(barriers):
        without.value = number
        line = broken.read_text().partition(f"(without != {number})")[0].count("\n")
        assert results_differ(kernel), f"without the barrier in line {line} of {SOURCE.name}"


def results_differ(kernel) -> bool:
    for path in PATHS:
        for layout in LAYOUTS:
            for dtype in ("float32", "float16"):
                case = random_case((2, 3), ((5, 3), (7, 5)), n=4, channels=136, dtype=dtype)
                how = {"dtype": dtype, "layout": layout, "path": path, "output": "embeddings"}
                results = [kernel.run(**case, **how, order=order) for order in range(4)]
                if any(not np.array_equal(results[0], result) for result in results[1:]):
                    return True
    return False


def test_the_sum_over_channels_is_split_only_where_blocks_are_few(library):
    case = random_case((1,), ((2, 2),), n=9, channels=1024)
    many = HostKernel(library, multiprocessors=132)
    many.take_launches()
    check_features(many, case, "float32", path="tiles")
    assert [launch[2] for launch in many.take_launches()] == [1, 4, 1]  # depth of the grid: one feature in four parts
    few = HostKernel(library, multiprocessors=1)
    check_features(few, case, "float32", path="tiles")
    assert [launch[2] for launch in few.take_launches()] == [1, 2, 1]


def test_more_parts_than_the_epilogue_loads_at_once(library):
    """Five, and four are under way together; mirrors are read alongside."""
    case = random_case((1,), ((2, 2),), n=10, channels=1600)
    many = HostKernel(library, multiprocessors=132)
    many.take_launches()
    check_features(many, case, "float32", path="tiles")
    assert many.take_launches()[1][2] == 5
    found = many.run(**case, path="tiles", output="mirror_embeddings")
    np.testing.assert_allclose(found, embed(stripe_pool_reduce(**case), flip=True), rtol=0, atol=2e-6)


def test_bfloat16_without_its_tensor_cores(library):
    """Turing has none for bfloat16: plain multiply-adds, the same answer."""
    case = random_case((2,), ((4, 3),), n=9, channels=72, dtype="bfloat16")
    turing = HostKernel(library, capability=75)
    turing.take_launches()
    check_features(turing, case, "bfloat16", path="tiles")
    assert turing.take_launches()[1][3] == 256
    check_features(HostKernel(library, capability=80), case, "bfloat16", path="tiles")
    assert turing.take_launches()[1][3] == 128


def pooled_only(kernel, maps, branches, dtype, layout, path="rows"):
    """Pooled vectors `[n, F, C]`, seen through reductions that are the identity."""
    channels, features = maps[0].shape[1], sum(map(python_plan.features_of, branches))
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
@pytest.mark.parametrize("dtype", DTYPES)
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
@pytest.mark.parametrize("dtype", DTYPES)
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
@pytest.mark.parametrize("dtype", DTYPES)
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
@pytest.mark.parametrize("dtype", DTYPES)
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


def test_paths_are_taken_by_batch(kernel, library):
    def taken(kernel, n):
        problem = python_plan.make_problem("float16", "nhwc", n, 64, 16, (2,), ((4, 2),))
        return python_plan.PATHS[kernel.plan(problem).path]

    assert [taken(kernel, n) for n in (1, 8, 9, 1024)] == ["fused", "fused", "tiles", "tiles"]
    assert taken(HostKernel(library, cooperative=False), 8) == "rows"


def plain(structure) -> bytes:
    return bytes(memoryview(structure).cast("B"))


@FEW_EXAMPLES
@given(problem=problems(), output=st.sampled_from(python_plan.OUTPUTS), auto=st.booleans(), data=st.data())
def test_python_plans_and_tells_the_kernels_what_c_does(library, problem, output, auto, data):
    """The same plan, the same bytes for the kernels, the same grids: NVRTC's kernels are launched by Python's."""
    what, how = problem
    n = what["n"] * 2 if output == "mirror_embeddings" else what["n"]
    problem = python_plan.make_problem(
        what["dtype"], how["layout"], n, what["channels"] * 16, what["reduced"], what["branches"], what["sizes"],
        pooling=what["pooling"], neck=what["neck"], output=output, path="auto" if auto or n > 8 else how["path"],
    )  # fmt: skip
    device = python_plan.Device(data.draw(st.integers(1, 150)), data.draw(st.sampled_from([75, 80, 90, 120])), 1)
    kernel = HostKernel(library, device.multiprocessors, device.capability)
    plan = kernel.plan(problem)
    assert plain(python_plan.plan_on(problem, device)) == plain(plan)
    pointers = python_plan.Pointers((ctypes.c_void_p * 4)(16, 32, 48, 64), 80, 96, 112, 128, 144, 160, 176)
    for unused in range(problem.branches, 4):
        pointers.maps[unused] = None
    assert plain(python_plan.params_of(problem, plan, pointers)) == plain(kernel.params(problem, plan, pointers))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", python_plan.OUTPUTS)
def test_python_launches_what_c_does(kernel, output, dtype, path):
    case = random_case((1, 3), ((3, 2), (7, 2)), n=4, dtype=dtype, pooling="max")
    for layout in LAYOUTS:
        kernel.take_launches()
        kernel.run(**case, dtype=dtype, layout=layout, path=path, output=output)
        problem = python_plan.make_problem(
            dtype, layout, 4, 24, 16, (1, 3), ((3, 2), (7, 2)), output=output, path=path
        )  # fmt: skip
        expected = python_plan.launches(problem, kernel.plan(problem))
        found = [(*one.grid, one.threads, one.shared, int(one.cooperative)) for one in expected]
        assert kernel.take_launches() == found


def test_problems_that_are_none_are_refused_by_their_field(kernel):
    good = python_plan.make_problem("float32", "nchw", 2, 8, 16, (1, 2), ((2, 2), (2, 2)))
    wrong = {
        "dtype": 3, "layout": 2, "pooling": -1, "neck": 3, "output": 3, "path": 4, "batch": 1025, "channels": 12,
        "reduced": 8, "branches": 5,
    }  # fmt: skip
    sentences = set()
    for field, value in wrong.items():
        bad = python_plan.Problem.from_buffer_copy(good)
        setattr(bad, field, value)
        with pytest.raises(RuntimeError) as failure:
            kernel.plan(bad)
        sentences.add(str(failure.value))
    assert len(sentences) == len(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 3, "output": "mirror_embeddings"}, "mirrors"),
        ({"batch": 9, "path": "rows"}, "up to 8"),
        ({"channels": 20}, "multiple of 8"),
        ({"reduced": 24}, "multiple of 16"),
        ({"branches": (1, 9)}, "stripes"),
        ({"sizes": ((0, 2), (2, 2))}, "pixels"),
    ],
)
def test_python_refuses_the_same_problems_by_name(change, message):
    good = {"batch": 2, "channels": 8, "reduced": 16, "branches": (1, 2), "sizes": ((2, 2), (2, 2))}
    python_plan.make_problem("float32", "nchw", **good)
    with pytest.raises(ValueError, match=message):
        python_plan.make_problem("float32", "nchw", **{**good, **change})


def test_pointers_off_their_alignment_are_refused(kernel):
    problem = python_plan.make_problem("float32", "nchw", 1, 8, 16, (1,), ((2, 2),))
    plan = kernel.plan(problem)
    for maps, weight in ((8, 16), (16, 8), (None, 16)):
        pointers = python_plan.Pointers((ctypes.c_void_p * 4)(maps), weight, 16, None, None, None, 16, 16)
        status = kernel.library.mgn_spr_launch(ctypes.byref(problem), ctypes.byref(plan), ctypes.byref(pointers), None)
        assert "16-byte aligned" in kernel.library.mgn_spr_error(status).decode()


SANITIZED = """
import sys
from itertools import count
from pathlib import Path
import numpy as np
from emulator.host import HostKernel
from test_kernel_host import DTYPES, LAYOUTS, PATHS, check_features, random_case
kernel = HostKernel(Path(sys.argv[1]))
rng = np.random.default_rng(5)
for dtype in DTYPES:
    for layout in LAYOUTS:
        for path in PATHS:
            branches = tuple(int(x) for x in rng.integers(1, 9, rng.integers(1, 4)))
            sizes = tuple((int(rng.integers(1, 12)), int(rng.integers(1, 8))) for _ in branches)
            n, channels = int(rng.integers(1, 4)), 8 * int(rng.integers(1, 15))
            pooling = ("max", "avg", "gem")[rng.integers(3)]
            case = random_case(branches, sizes, n, channels, 16 * int(rng.integers(1, 6)), dtype, pooling)
            check_features(kernel, case, dtype, layout=layout, path=path)
            kernel.run(**case, dtype=dtype, layout=layout, path=path, output="embeddings")
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
    return build_host(tmp_path_factory.mktemp("sanitized"), COMPILER, sanitize=True)


@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's runtime")
def test_sanitizers_find_nothing(sanitized):
    result = run_sanitized(SANITIZED, str(sanitized))
    assert result.stdout == "clean\n", result.stderr[-4000:]


@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's runtime")
def test_sanitizers_watch_what_kernels_read(sanitized):
    """A map that ends 16 bytes early is noticed: were it not, the test above would prove nothing."""
    script = SANITIZED.split("rng =")[0] + (
        "case = random_case((2,), ((4, 2),), n=1)\n"
        "copy = kernel._copy\n"
        "kernel._copy = lambda stack, data: copy(stack, data.reshape(-1)[:-4] if data.shape == (1, 24, 4, 2) else data)\n"
        "check_features(kernel, case, 'float32', layout='nchw', path='rows')\n"
    )
    result = run_sanitized(script, str(sanitized))
    assert "heap-buffer-overflow" in result.stderr
