"""torch.ops.mgn_deploy.stripe_pool_reduce against the definition, and its gradients against PyTorch's own."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from emulator.host import HostKernel, host_library
from emulator.reference import embed, stripe_pool_reduce
from torch.library import opcheck

from mgn_deploy.config import features_of
from mgn_deploy.kernels import torch_op
from mgn_deploy.kernels.plan import BARRIER_BYTES, NECKS, POOLINGS
from mgn_deploy.kernels.torch_heads import Heads as OpArguments

torch.set_num_threads(1)

BRANCHES, SIZES = (1, 2, 3), ((3, 2), (4, 3), (7, 3))
HAS_GPU = torch.cuda.is_available()


def arguments(pooling="max", neck="relu", dtype=torch.float32, n=2, channels=8, reduced=16, seed=0, device="cpu"):
    """Arguments of the op; the maps channels-last but the first."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, of=wide):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, of)

    features = sum(map(features_of, BRANCHES))
    maps = [normal(n, channels, *size, of=dtype) + (2 if pooling == "gem" else 0) for size in SIZES]
    maps = maps[:1] + [map_.to(memory_format=torch.channels_last) for map_ in maps[1:]]
    return {
        "maps": maps,
        "branches": list(BRANCHES),
        "weight": normal(features, reduced, channels, of=dtype),
        "bias": normal(features, reduced),
        "pooling": pooling,
        "neck": neck,
        "powers": normal(features).abs() + 1.5 if pooling == "gem" else None,
        "scale": normal(features, reduced) if neck == "relu_norm" else None,
        "shift": normal(features, reduced) if neck == "relu_norm" else None,
    }


def op(given):
    return torch.ops.mgn_deploy.stripe_pool_reduce(*given.values())


def definition(given):
    def numpy(tensor):
        return None if tensor is None else tensor.detach().double().cpu().numpy()

    def column(tensor):
        return None if tensor is None else numpy(tensor)[:, None]

    return stripe_pool_reduce(
        [numpy(map_) for map_ in given["maps"]],
        given["branches"],
        numpy(given["weight"]).transpose(0, 2, 1),
        column(given["bias"]),
        pooling=given["pooling"],
        powers=numpy(given["powers"]),
        neck=given["neck"],
        scale=column(given["scale"]),
        shift=column(given["shift"]),
    )


def tensors_of(given):
    return [*given["maps"], *(given[name] for name in ("weight", "bias", "powers", "scale", "shift"))]


def requiring_gradients(given):
    for tensor in tensors_of(given):
        if tensor is not None:
            tensor.requires_grad_()
    return given


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


@pytest.fixture(scope="module")
def emulated():
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return HostKernel(host_library())


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("pooling", "neck"), [("max", "relu"), ("avg", "linear"), ("gem", "relu_norm")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_cuda_is_told_gives_the_same_on_the_emulator(emulated, dtype, pooling, neck, last):
    """All of the CUDA implementation but the driver's calls. The weight begins off 16 bytes, as a slice may."""
    given = arguments(pooling, neck, dtype, n=3)
    format_ = torch.channels_last if last else torch.contiguous_format
    given["maps"] = [torch.cat([map_, map_])[1:4].to(memory_format=format_) for map_ in given["maps"]]
    odd = torch.zeros(given["weight"].numel() + 1, dtype=dtype)[1:].view_as(given["weight"])
    given["weight"] = odd.copy_(given["weight"])
    assert given["weight"].data_ptr() % 16
    heads = OpArguments(**given).arranged()
    problem = heads.problem()
    assert problem.layout == ("nhwc" if last else "nchw")
    plan = emulated.plan(problem)
    workspace = torch.full((plan.workspace_bytes,), 255, dtype=torch.uint8)
    workspace[:BARRIER_BYTES] = 0
    features = torch.full((3, 8 * 16), torch.nan, dtype=dtype)
    emulated.launch(problem, plan, heads.pointers(workspace, features))
    torch.testing.assert_close(features, op(given), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("n", [1, 2, 8, 9, 64])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_is_the_definition(dtype, pooling, last, n):
    given = arguments(pooling, "relu_norm", dtype, n, 264, 48, device="cuda")
    format_ = torch.channels_last if last else torch.contiguous_format
    given["maps"] = [map_.to(memory_format=format_) for map_ in given["maps"]]
    found, expected = op(given), definition(given)
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    error = np.linalg.norm(found.double().cpu().numpy() - expected) / np.linalg.norm(expected)
    assert error < 1e-5 + rounding
    assert torch.equal(found, op(given))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_cuda_passes_pytorchs_own_checks_of_an_operator():
    opcheck(
        torch.ops.mgn_deploy.stripe_pool_reduce.default, tuple(requiring_gradients(arguments(device="cuda")).values())
    )


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("output", ["features", "mirror_embeddings"])
@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cuda_graph_of_the_fused_path_gives_the_same_bits_again_and_again(dtype, n, output):
    """In one workspace that nobody clears: the kernel has to leave its barrier as it was and trust nothing else."""
    from cuda.core import Device

    from mgn_deploy.kernels.nvrtc import PlannedKernel

    given = arguments(dtype=dtype, n=n, channels=264, reduced=48, device="cuda")
    heads = OpArguments(**given).arranged()
    kernel = PlannedKernel(heads.problem(output, "fused"), given["weight"].device.index)
    assert kernel.plan.path == "fused"
    workspace = torch.zeros(kernel.workspace_bytes, dtype=torch.uint8, device="cuda")
    expected = definition(given) if output == "features" else embed(definition(given), True)
    result = torch.full(
        expected.shape, torch.nan, dtype=dtype if output == "features" else torch.float32, device="cuda"
    )
    pointers = heads.pointers(workspace, result)
    torch.cuda.synchronize()  # what is above is on PyTorch's stream

    stream = Device(given["weight"].device.index).create_stream()
    kernel.launch(pointers, int(stream.handle))
    stream.sync()
    first = result.clone()
    torch.cuda.synchronize()
    builder = stream.create_graph_builder()
    builder.begin_building()
    kernel.launch(pointers, int(builder.stream.handle))
    graph = builder.end_building().complete()

    again = []
    with torch.cuda.stream(torch.cuda.ExternalStream(int(stream.handle))):
        for _ in range(100):
            workspace[BARRIER_BYTES:].fill_(255)
            result.fill_(torch.nan)
            graph.launch(stream)
            again.append(result.clone())
    stream.sync()
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[result.dtype]
    error = np.linalg.norm(first.double().cpu().numpy() - expected) / np.linalg.norm(expected)
    assert error < 1e-5 + rounding
    assert [number for number, one in enumerate(again) if not torch.equal(one, first)] == []
