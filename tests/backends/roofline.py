"""The least time that a network's convolutions can take on a GPU: arithmetic, no measurement.

Each convolution takes at least as long as its products at the rate of the matrix units, and as its maps and weights at
the bandwidth of memory, whichever is more (Williams et al., "Roofline", CACM 2009). What is fused with it costs nothing
more; by itself it reads and writes maps again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgn_deploy.backends.torch_cuda.network import Convolution, InferenceMGN


@dataclass(frozen=True)
class Layer:
    """One convolution of one batch.

    Attributes:
        products: multiplications with an addition each.
        bytes: of its input, weights, residual and output, each moved once.
        apart: of what a batch norm, a residual's addition and a ReLU move as kernels of their own.
    """

    products: int
    bytes: int
    apart: int

    def seconds(self, rate: float, bandwidth: float) -> float:
        """At least, fused: of products a second and bytes a second."""
        return max(self.products / rate, self.bytes / bandwidth)

    def seconds_apart(self, rate: float, bandwidth: float) -> float:
        """At least, each operator a kernel of its own, as PyTorch eager runs a network whose norms are not folded."""
        return self.seconds(rate, bandwidth) + self.apart / bandwidth


@torch.no_grad()
def layers_of(network: InferenceMGN, images: int) -> list[Layer]:
    """The convolutions of a batch of `images` (and as many mirrors, where the network averages them), in the order in
    which they run. Nothing is computed: the network is moved to PyTorch's meta device, and of no more use.
    """
    found: list[Layer] = []

    def record(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        size = output.element_size()
        weight = module.weight
        residual = output.numel() if len(inputs) > 1 and inputs[1] is not None else 0
        moved = inputs[0].numel() + weight.numel() + residual + output.numel()
        norm, relu = 2 * output.numel(), 2 * output.numel() if getattr(module, "relu", False) else 0
        products = output.numel() * weight[0].numel()
        found.append(Layer(products, size * moved, size * (norm + relu + 3 * residual)))

    for module in network.modules():
        if isinstance(module, (Convolution, nn.Conv2d)):
            module.register_forward_hook(record)
    config = network.config
    network.to("meta").feature_maps(
        torch.empty((images, config.height, config.width, 3), dtype=torch.uint8, device="meta")
    )
    return found


@dataclass(frozen=True)
class Bound:
    """The least seconds of a batch's convolutions, fused and apart, and of their products alone."""

    fused: float
    apart: float
    products: float

    @property
    def share(self) -> float:
        """Of the matrix units' rate that fused convolutions can come to."""
        return self.products / self.fused

    @property
    def gain(self) -> float:
        """How many times as long operators apart take."""
        return self.apart / self.fused


def bound_of(layers: list[Layer], tera_operations: float, terabytes: float) -> Bound:
    """Of a GPU that does so many 10^12 multiplications and additions a second on its matrix units, and moves so many
    10^12 bytes a second."""
    rate, bandwidth = tera_operations * 1e12 / 2, terabytes * 1e12
    return Bound(
        sum(layer.seconds(rate, bandwidth) for layer in layers),
        sum(layer.seconds_apart(rate, bandwidth) for layer in layers),
        sum(layer.products for layer in layers) / rate,
    )
