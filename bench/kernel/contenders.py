"""Who runs in the suite's stages `correctness` and `kernel`: the fused kernel, and the same heads by PyTorch in several
ways.

A contender is made for one case and its inputs, and then run again and again over the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mgn_deploy.bench.kernel.cases import Case, Inputs, finish
from mgn_deploy.errors import CannotRun
from mgn_deploy.kernels.plan import BARRIER_BYTES, MAX_ROWS, PATHS
from mgn_deploy.packages import require
from mgn_deploy.train.model import stripe_pool

KERNEL_PATHS = {f"kernel_{path}": path for path in PATHS if path != "auto"}


@dataclass(frozen=True)
class Contender:
    """One way to compute a case's heads.

    `run` starts it on the current stream and returns where the result will be; `poison` spoils what it has to write.
    `facts` go into the results. `roundings` is how often it may round to the maps' type: PyTorch rounds the product,
    the sum with the bias and the sum with the mirror.
    """

    run: Callable[[], Tensor]
    poison: Callable[[], object] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)
    roundings: int = 3


class Heads(nn.Module):
    """As the branches of `train.model.MGN` have them: each region pooled alone, a 1x1 convolution each."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__()
        self.case = case
        self.weights = inputs.weight[:, :, :, None, None].unbind()
        self.biases = inputs.bias.to(inputs.weight.dtype).unbind()

    def forward(self, *maps: Tensor) -> Tensor:
        reduced: list[Tensor] = []
        for map_, stripes in zip(maps, self.case.branches, strict=True):
            for vector in stripe_pool(map_, stripes):
                feature = len(reduced)
                product = nn.functional.conv2d(vector, self.weights[feature], self.biases[feature])
                reduced.append(product.relu().flatten(1))
        return finish(torch.cat(reduced, dim=1), self.case.output)


class LeanHeads(nn.Module):
    """The heads as PyTorch can have them fastest: each map is read once, as the whole map's maxima are those of its
    stripes, and all reductions are one product. Heights must be multiples of the stripes."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__()
        self.case = case
        self.weight, self.bias = inputs.weight.transpose(1, 2), inputs.bias.to(inputs.weight.dtype).unsqueeze(1)

    def forward(self, *maps: Tensor) -> Tensor:
        pooled: list[Tensor] = []
        for map_, stripes in zip(maps, self.case.branches, strict=True):
            maxima = map_.unflatten(2, (stripes, -1)).amax((3, 4))  # [rows, C, stripes]
            pooled += [maxima.amax(2), *maxima.unbind(2)] if stripes > 1 else [maxima.squeeze(2)]
        reduced = torch.baddbmm(self.bias, torch.stack(pooled), self.weight).relu()
        return finish(reduced.transpose(0, 1).flatten(1), self.case.output)


def torch_op(case: Case, inputs: Inputs) -> Contender:
    from mgn_deploy.kernels.torch_op import stripe_pool_reduce

    branches = list(case.branches)
    return Contender(
        lambda: finish(stripe_pool_reduce(inputs.maps, branches, inputs.weight, inputs.bias), case.output),
        roundings=1 if case.output == "features" else 2,  # the sum with the mirror is PyTorch's
    )


def triton(case: Case, inputs: Inputs) -> Contender:
    """The rival in Triton's language, on a CPU by its interpreter.

    Raises:
        CannotRun: there is no Triton, or it does not take the case.
    """
    require("triton", "train", "the rival")
    if not inputs.weight.is_cuda:
        from triton.language import max as a_function_of_triton
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(a_function_of_triton, InterpretedFunction):
            raise CannotRun("Triton needs a GPU, or TRITON_INTERPRET=1 before it is loaded")
        if case.dtype == "bfloat16":
            raise CannotRun("Triton's interpreter has no bfloat16")  # triton-lang.org, "Debugging Triton"
    if (case.layout, case.output) != ("nhwc", "mirror_embeddings"):
        raise CannotRun("the rival takes maps that are channels last, with mirrors")
    from mgn_deploy.bench.kernel.triton_rival import triton_heads

    run = lambda: triton_heads(inputs.maps, case.branches, inputs.weight, inputs.bias, True)  # noqa: E731
    return Contender(run, roundings=0)


def kernel(case: Case, inputs: Inputs, path: str = "auto") -> Contender:
    """The kernel as an engine's tail would call it: nothing is allocated, copied or checked at a launch.

    Raises:
        UserError: NVRTC is not installed, or the device has not that path.
    """
    from mgn_deploy.kernels.nvrtc import PlannedKernel
    from mgn_deploy.kernels.torch_heads import Heads as Arguments

    arguments = Arguments(inputs.maps, case.branches, inputs.weight, inputs.bias).arranged()
    device, dtype = inputs.weight.device, inputs.weight.dtype if case.output == "features" else torch.float32
    planned = PlannedKernel(arguments.problem(case.output, path), device.index or 0)
    workspace = torch.zeros(planned.workspace_bytes, dtype=torch.uint8, device=device)
    result = torch.empty(case.images, case.features * case.reduced, dtype=dtype, device=device)
    pointers = arguments.pointers(workspace, result)

    def run(_held: object = arguments) -> Tensor:  # whose memory the pointers point to
        planned.launch(pointers, torch.cuda.current_stream(device).cuda_stream)
        return result

    def poison() -> None:
        result.fill_(torch.nan)
        workspace[BARRIER_BYTES:].fill_(255)

    facts = {name: getattr(planned.plan, name) for name in ("path", "splits", "tensor_cores")}
    return Contender(run, poison, facts, roundings=1)


def module(heads: Callable[..., Tensor], inputs: Inputs) -> Contender:
    return Contender(lambda: heads(*inputs.maps))


def graphed(contender: Contender) -> Contender:
    """Capture a contender's work in a CUDA graph; the result is where the capture put it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            contender.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = contender.run()

    def run() -> Tensor:
        graph.replay()
        return result

    def poison() -> None:
        contender.poison()
        result.fill_(torch.nan)

    return replace(contender, run=run, poison=poison)


def makers(case: Case, inputs: Inputs) -> dict[str, Callable[[], Contender]]:
    """Return how to make each contender of a case; making one may fail. What needs a GPU is left out on a CPU.

    `kernel_graph`, the kernel in a CUDA graph as in the pipeline, is the headline; its rivals are named ..._graph.
    `lean` reads each map once and reduces in one batched product.
    """
    torch.backends.cudnn.benchmark = True  # on a GPU cuDNN's fastest, as a careful user would have it
    heads, lean = Heads(case, inputs), LeanHeads(case, inputs)
    ways: dict[str, Callable[[], Contender]] = {
        "torch_op": lambda: torch_op(case, inputs),
        "eager": lambda: module(heads, inputs),
        "lean": lambda: module(lean, inputs),
        "triton": lambda: triton(case, inputs),
    }
    if not inputs.weight.is_cuda:
        return ways
    torch.compiler.reset()  # else the ninth shape would be refused
    compiled = torch.compile(lean, fullgraph=True, dynamic=False)  # for this very shape: code for any batch is slower
    ways |= {
        "kernel": lambda: kernel(case, inputs),
        "kernel_graph": lambda: graphed(kernel(case, inputs)),
        "triton_graph": lambda: graphed(triton(case, inputs)),
        "eager_graph": lambda: graphed(module(heads, inputs)),
        "lean_graph": lambda: graphed(module(lean, inputs)),
        "compiled_graph": lambda: graphed(module(compiled, inputs)),
    }
    for name, path in KERNEL_PATHS.items() if case.rows <= MAX_ROWS else ():
        ways[name] = lambda path=path: kernel(case, inputs, path)  # type: ignore[misc]
    return ways
