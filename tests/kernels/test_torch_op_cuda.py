"""What torch.ops.mgn_deploy.stripe_pool_reduce asks of CUDA: on the emulator, and on a GPU."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from emulator.host import HostKernel, host_library
from emulator.reference import embed
from op_arguments import arguments, definition, op, requiring_gradients
from torch.library import opcheck

from mgn_deploy.kernels.plan import BARRIER_BYTES, POOLINGS
from mgn_deploy.kernels.torch_heads import Heads as OpArguments

torch.set_num_threads(1)


HAS_GPU = torch.cuda.is_available()


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
