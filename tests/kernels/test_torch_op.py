"""torch.ops.mgn_deploy.stripe_pool_reduce against the definition, and its gradients against PyTorch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_arguments import BRANCHES, arguments, definition, op, requiring_gradients
from torch.library import opcheck

from mgn_deploy.kernels import torch_op
from mgn_deploy.kernels.plan import NECKS, POOLINGS

torch.set_num_threads(1)


@pytest.mark.parametrize("neck", NECKS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_op_is_the_definition(pooling, neck):
    given = arguments(pooling, neck)
    np.testing.assert_allclose(op(given).numpy(), definition(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_is_rounded_once_at_the_end(dtype, rounding):
    given = arguments(dtype=dtype, channels=64)
    found, expected = op(given), definition(given)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=rounding * 1.01, atol=1e-4)


@pytest.mark.parametrize("neck", NECKS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_are_those_of_finite_differences(pooling, neck):
    given = requiring_gradients(arguments(pooling, neck, torch.float64, n=1, reduced=2, channels=3))
    names = [name for name in ("powers", "scale", "shift") if given[name] is not None]
    tensors = [*given["maps"], given["weight"], given["bias"], *(given[name] for name in names)]

    def features(*values):
        changed = {**given, "maps": list(values[:3]), "weight": values[3], "bias": values[4]}
        return op({**changed, **dict(zip(names, values[5:], strict=True))})

    assert torch.autograd.gradcheck(features, tensors, fast_mode=True)


def test_gradients_are_those_of_plain_pytorch():
    """Heads as a network without the op has them: torch's adaptive pooling, a 1x1 convolution each, ReLU."""
    given = requiring_gradients(arguments())
    plain = []
    for map_, stripes in zip(given["maps"], BRANCHES, strict=True):
        parts = [torch.nn.functional.adaptive_max_pool2d(map_, 1)]
        if stripes > 1:
            parts += torch.nn.functional.adaptive_max_pool2d(map_, (stripes, 1)).split(1, dim=2)
        for part in parts:
            weight = given["weight"][len(plain)][:, :, None, None]
            plain.append(torch.nn.functional.conv2d(part, weight, given["bias"][len(plain)]).relu().flatten(1))
    expected = torch.cat(plain, 1)
    found = op(given)
    torch.testing.assert_close(found, expected)
    leaves = [*given["maps"], given["weight"], given["bias"]]
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(found, leaves, cotangent)
    theirs = torch.autograd.grad(expected, leaves, cotangent)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_maximums_gradient_goes_to_the_first_pixel_that_has_it():
    """Dead channels are all zero after a ReLU: their gradient must not grow or spread with the map."""
    given = requiring_gradients(arguments(neck="linear"))
    given["maps"] = [torch.zeros_like(map_).requires_grad_() for map_ in given["maps"]]
    op(given).sum().backward()
    first = given["maps"][0].grad
    assert (first[:, :, 0, 0] != 0).all()
    assert not first.flatten(2)[:, :, 1:].any()


def test_only_what_needs_a_gradient_gets_one():
    given = arguments()
    given["weight"].requires_grad_()
    op(given).sum().backward()
    assert given["weight"].grad is not None
    assert all(map_.grad is None for map_ in given["maps"])


@pytest.mark.parametrize(("pooling", "neck"), [("max", "relu"), ("avg", "linear"), ("gem", "relu_norm")])
def test_pytorchs_own_checks_of_an_operator_pass(pooling, neck):
    """Schema, fake tensor, autograd registration, and tracing with dynamic shapes."""
    given = requiring_gradients(arguments(pooling, neck))
    opcheck(torch.ops.mgn_deploy.stripe_pool_reduce.default, tuple(given.values()))


class Heads(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        given = arguments()
        self.weight, self.bias = torch.nn.Parameter(given["weight"]), torch.nn.Parameter(given["bias"])

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        bounded = [map_.relu() for map_ in maps]
        return torch_op.stripe_pool_reduce(bounded, list(BRANCHES), self.weight, self.bias) * 2


def test_it_trains_under_torch_compile():
    """`aot_eager` runs all of torch.compile but the code generation, which is not ours."""
    heads, maps = Heads(), arguments()["maps"]
    expected = heads(*maps)
    expected.square().sum().backward()
    gradient = heads.weight.grad.clone()
    heads.zero_grad()
    compiled = torch.compile(heads, backend="aot_eager", fullgraph=True)
    found = compiled(*maps)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(heads.weight.grad, gradient)


def test_it_survives_export_as_one_call_with_any_batch():
    heads, maps = Heads(), arguments()["maps"]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(heads, tuple(maps), dynamic_shapes=[tuple({0: batch} for _ in maps)])
    calls = [node for node in program.graph.nodes if "stripe_pool_reduce" in str(node.target)]
    assert len(calls) == 1
    more = arguments(n=5, seed=4)["maps"]
    torch.testing.assert_close(program.module()(*more), heads(*more))


def test_the_op_is_the_heads_of_a_network(weights):
    """The maps of a network through the op are what its own branches make of them."""
    from mgn_deploy.train.model import fold_batch_norms
    from mgn_deploy.train.weights import load_weights

    model = load_weights(weights).eval()
    images = torch.randn(2, 3, 96, 32, generator=torch.Generator().manual_seed(0))
    reductions = [reduction[0] for branch in fold_batch_norms(model).branches for reduction in branch.reductions]
    weight = torch.stack([conv.weight[:, :, 0, 0] for conv in reductions])
    bias = torch.stack([conv.bias for conv in reductions])
    with torch.inference_mode():
        expected = model(images)
        found = torch_op.stripe_pool_reduce(model.feature_maps(images), list(model.config.branches), weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "median"}, "median"),
        ({"branches": [1, 2]}, "number of stripes"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"weight": torch.zeros(8, 16, 9)}, "weight"),
        ({"weight": torch.zeros(8, 16, 8, dtype=torch.float16)}, "float16"),
        ({"neck": "relu_norm"}, "scale"),
        ({"pooling": "gem"}, "powers"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        op({**arguments(), **change})


@pytest.mark.parametrize("name", ["map 1", "weight", "bias", "powers", "scale", "shift"])
def test_a_tensor_on_another_device_is_named(name):
    """Its address would be another memory's: the GPU would stop with an illegal one, for the rest of the process."""
    given = arguments("gem", "relu_norm")
    if name == "map 1":
        given["maps"][1] = given["maps"][1].to("meta")
    else:
        given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=rf"{name} is on meta, needs cpu as map 0 is"):
        op(given)


def test_a_given_tensor_that_the_choices_do_not_use_is_on_the_maps_device_too():
    given = {**arguments(), "scale": torch.zeros(8, 16, device="meta")}
    with pytest.raises(ValueError, match="scale is on meta"):
        op(given)
