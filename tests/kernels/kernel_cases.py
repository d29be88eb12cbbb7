"""Cases for the CUDA kernels, which tests/emulator runs on the CPU, and the check of their features."""

from __future__ import annotations

import shutil

import numpy as np
from emulator.host import rounded
from emulator.reference import stripe_pool_reduce

from mgn_deploy.config import features_of

COMPILER = shutil.which("g++")
# Half the distance to the next number, over the number: what one rounding may change.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINIEST = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 2.0**-134}


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
