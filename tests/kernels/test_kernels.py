"""The CUDA kernels, run on the CPU by tests/emulator, against the definition in tests/emulator/reference.py."""

from __future__ import annotations

import ctypes
import re
from itertools import count, product
from pathlib import Path

import numpy as np
import pytest
from emulator.host import HostKernel, build_host, host_library
from emulator.reference import embed, stripe_pool_reduce
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import COMPILER, check_features, random_case

from mgn_deploy.kernels.nvrtc import SOURCE
from mgn_deploy.kernels.plan import LAYOUTS, NECKS, PATHS, POOLINGS, TYPES, Problem

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

PATHS = PATHS[1:]  # but "auto"


FEW_EXAMPLES = settings(
    max_examples=40, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def kernel():
    return HostKernel(host_library())


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
