"""An MGN made for inference in PyTorch: batch norms folded, channels last, few kernels a convolution.

    uint8 [n, h, w, 3] -> normalised [n or 2n, 3, h, w] -> stem -> blocks -> branches' maps -> heads -> float32 [n, dim]

On a GPU each convolution with a ReLU is one cuDNN call with its bias, its residual addition and the ReLU inside; on a
CPU the same module runs PyTorch's operators one by one, which is how it is tested.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from mgn_deploy.kernels.torch_heads import Heads
    from mgn_deploy.train.model import MGN

HEAD_NUMBERS = ("weight", "bias", "powers", "scale", "shift")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by the bundle's precision


class Convolution(nn.Module):
    """A convolution with bias, then a residual's addition where one is given, then a ReLU where `relu` says so.

    `fused` asks for all of it in one cuDNN call (https://github.com/pytorch/pytorch/pull/52102). cuDNN has no such
    engine for some shapes: its first refusal sets `fused` to False, and PyTorch's operators go on.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        assert conv.bias is not None
        self.register_buffer("weight", conv.weight.detach())
        self.register_buffer("bias", conv.bias.detach())
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.padding = [int(n) for n in conv.padding]
        self.groups, self.relu, self.fused = conv.groups, relu, False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.fused:
            try:
                return self._in_one_call(x, residual)
            except RuntimeError as error:
                if not any(words in str(error) for words in ("nable to find an engine", "NOT_SUPPORTED")):
                    raise
                self.fused = False
        y = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if self.relu else y

    def _in_one_call(self, x: Tensor, residual: Tensor | None) -> Tensor:
        how = (self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, *how)
        return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, *how)


class Block(nn.Module):
    """A residual block of torchvision, basic or bottleneck, with its batch norms folded.

    The bias on the skip side is added to the last convolution's, as both go into one sum: PyTorch adds a bias outside
    of cuDNN by a kernel of its own, and a convolution without one needs none.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        convs = [block.conv1, block.conv2, *([block.conv3] if hasattr(block, "conv3") else [])]
        self.norm = None if isinstance(block.bn1, nn.Identity) else block.bn1  # IBN: half of it cannot be folded
        self.convs = nn.ModuleList(
            Convolution(conv, relu=index > 0 or self.norm is None) for index, conv in enumerate(convs)
        )
        self.skip = None
        if block.downsample is not None:
            self.skip = copy.deepcopy(block.downsample[0])
            last: Any = self.convs[-1]
            last.bias = last.bias + self.skip.bias.detach()
            self.skip.bias = None

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.skip is None else self.skip(x)
        first, *others, last = self.convs
        y = first(x)
        if self.norm is not None:
            y = self.norm(y).relu_().contiguous(memory_format=torch.channels_last)  # an instance norm's are not
        for conv in others:
            y = conv(y)
        return last(y, residual)


class InferenceMGN(nn.Module):
    """What `train.model.Embedding` computes, for one dtype: uint8 RGB `[n, height, width, 3]` -> unit float32 rows
    `[n, dim]`.

    Weights, maps and products are of `dtype`, sums and the heads' numbers besides their weight are float32.

    Args:
        model: in float32, as it was trained; it is left as it is.
        flip: average the features of each image and of its mirror.
        dtype: a value of `DTYPES`.
        kernel: run the heads as the stripe-pool-reduce kernel (on a GPU) instead of by PyTorch's operators.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: MGN, flip: bool, dtype: torch.dtype, *, kernel: bool = False) -> None:
        from mgn_deploy.train.model import fold_batch_norms, head_numbers

        super().__init__()
        self.config, self.flip, self.dtype, self.kernel = model.config, flip, dtype, kernel
        folded: Any = fold_batch_norms(model)
        stem, _, _, self.stem_pool, *stages, block = folded.trunk
        # Never fused: https://github.com/pytorch/pytorch/issues/68506 (7x7, channels last: 17 times slower).
        self.stem = Convolution(stem, relu=True)
        self.trunk = nn.Sequential(*(Block(one) for stage in stages for one in stage), Block(block))
        self.branches = nn.ModuleList(
            nn.Sequential(*(Block(one) for one in (*branch.layer3, *branch.layer4))) for branch in folded.branches
        )
        self.to(dtype).to(memory_format=torch.channels_last)
        numbers = head_numbers(folded)
        for name in HEAD_NUMBERS:
            kept = dtype if name == "weight" else torch.float32
            self.register_buffer(f"head_{name}", numbers[name].to(kept) if name in numbers else None)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(model.config, name)).view(1, 3, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        from mgn_deploy.kernels.torch_op import embeddings

        return embeddings(self.heads(self.feature_maps(images)), self.flip, kernel=self.kernel)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Each branch's last map, `[n or 2n, C, H_b, W_b]` of `dtype`, channels last; mirrors last."""
        pixels = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        if self.flip:
            pixels = torch.cat([pixels, pixels.flip(3)])
        pixels = pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)
        shared = self.trunk(self.stem_pool(self.stem(pixels)))
        return [branch(shared) for branch in self.branches]

    def heads(self, maps: list[Tensor]) -> Heads:
        """The heads' problem for these maps."""
        from mgn_deploy.kernels.torch_heads import Heads

        numbers = {name: getattr(self, f"head_{name}") for name in HEAD_NUMBERS}
        config = self.config
        return Heads(maps, config.branches, pooling=config.pooling, neck=config.neck, **numbers)

    def fuse(self) -> None:
        """Ask for one cuDNN call a convolution with ReLU, but for the stem."""
        for conv in self.fusible:
            conv.fused = True

    @property
    def fusible(self) -> list[Convolution]:
        """The convolutions that one cuDNN call can compute with all that follows them."""
        inner = (module for module in self.modules() if isinstance(module, Convolution))
        return [conv for conv in inner if conv.relu and conv is not self.stem]
