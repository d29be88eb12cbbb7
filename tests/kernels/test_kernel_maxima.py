"""What the CUDA kernels pool: the maps' own numbers, halves, NaN, infinities and negative zero."""

from __future__ import annotations

import numpy as np
import pytest
from emulator.host import HostKernel, host_library, rounded
from emulator.reference import stripe_pool, stripe_pool_reduce
from kernel_cases import COMPILER, random_case

from mgn_deploy.config import features_of
from mgn_deploy.kernels.plan import LAYOUTS, PATHS, TYPES

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

PATHS = PATHS[1:]  # but "auto"


@pytest.fixture(scope="module")
def kernel():
    return HostKernel(host_library())


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
