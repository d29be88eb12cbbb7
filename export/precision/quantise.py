"""Float32 graph -> INT8 graph by explicit QuantizeLinear / DequantizeLinear pairs around the convolutions.

The engines' integer kernels differ, and so do the placements in the table of engines
(`mgn_deploy/backends/registry.py`):

- tensorrt: int8 activations, zero point 0 (its parser takes no other). Of a residual addition only the skip side is
  quantised, so that the convolution on the other side takes the addition into its own kernel.
- tensorrt-rtx: int8 activations, zero point 0, and float16 between the pairs, also through the additions. A convolution
  with a scale for each channel would write float32 and take nothing into its kernel, so a weight has one scale: the
  convolutions that an addition reads round by it, the others by channel, with a Mul and the bias after them
  (docs/decisions).
- openvino: tensorrt's with uint8 activations: with int8 ones its embeddings are off on a CPU without VNNI.
- onnxruntime: uint8 activations, int8 weights of 7 bits (its AVX2 kernel adds two products in 16 bits), int32 biases,
  both sides of an addition quantised.

Weights are int8, symmetric, rounded by output channel except as said. The heads, the mirror average and the L2 norm
stay in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import helper

from mgn_deploy.backends.registry import Placement
from mgn_deploy.export.graph.rewrite import GraphWriter, group_of, trunk_nodes
from mgn_deploy.export.precision.half import LIMIT, to_half
from mgn_deploy.export.precision.ranges import TensorRange


def conv_groups(graph: onnx.ModelProto) -> list[str]:
    """The units that are quantised or left in float as one: the stem's convolution and each residual block, in
    order."""
    return list(dict.fromkeys(group_of(node.input[1]) for node in trunk_nodes(graph) if node.op_type == "Conv"))


def quantise(
    graph: onnx.ModelProto,
    ranges: Mapping[str, TensorRange],
    thresholds: Mapping[str, float],
    placement: Placement,
    in_float: Collection[str] = (),
    *,
    correct_bias: bool = False,
) -> onnx.ModelProto:
    """A copy of the graph with Q/DQ pairs.

    Args:
        graph: float32, as `build_graph` makes it.
        ranges: of its activations.
        thresholds: the magnitude of each activation that maps to the largest integer.
        placement: which engine's.
        in_float: names of groups (`conv_groups`) that are not quantised.
        correct_bias: add to each bias what its channel's mean output loses by the rounding of the weights.
    """
    writer = _Writer(graph, ranges, thresholds, placement, correct_bias)
    producers = {output: node for node in graph.graph.node for output in node.output}
    zone = {node.name for node in trunk_nodes(graph)}
    added = {name for node in trunk_nodes(graph) if node.op_type == "Add" for name in node.input}
    for node in graph.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.name in zone and node.op_type == "Conv" and group_of(node.input[1]) not in in_float:
            writer.convolution(copy, node.output[0] in added)
            continue
        if node.name in zone and node.op_type == "Add" and _block(node, producers) not in in_float:
            skip = _skip_side(node, producers)
            for side in sorted((skip, 1 - skip)[: placement.sides]):
                copy.input[side] = writer.activation(node.input[side])
        writer.nodes.append(copy)
    result = writer.result()
    if placement.half:
        result = to_half(result, "fp16", writer.ranges)
    onnx.checker.check_model(result, full_check=True)
    return result


def _skip_side(addition: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> int:
    """Which input of a residual addition is the shortcut: the one that is no convolution's output, or the
    downsample's."""
    for side, name in enumerate(addition.input):
        producer = producers[name]
        if producer.op_type != "Conv" or "downsample" in producer.input[1]:
            return side
    raise ValueError(f"{addition.name} adds two convolutions' outputs: no residual addition of a ResNet")


def _block(addition: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> str:
    return group_of(producers[addition.input[1 - _skip_side(addition, producers)]].input[1])


class _Writer(GraphWriter):
    """Collects nodes, constants and the new tensors' ranges; each activation is quantised once, whoever reads it."""

    def __init__(
        self,
        graph: onnx.ModelProto,
        ranges: Mapping[str, TensorRange],
        thresholds: Mapping[str, float],
        placement: Placement,
        correct_bias: bool,
    ) -> None:
        super().__init__(graph)
        self._thresholds, self._placement, self._correct_bias = thresholds, placement, correct_bias
        self.ranges = dict(ranges)
        self._quantised: dict[str, str] = {}

    def activation(self, name: str) -> str:
        """The activation rounded to 8 bits, as float32 again."""
        if name not in self._quantised:
            scale, zero = self._activation_scale(name)
            inputs = [self.constant(f"{name}/scale", scale), self.constant(f"{name}/zero", zero)]
            self.nodes.append(
                helper.make_node("QuantizeLinear", [name, *inputs], [f"{name}/q"], name=f"quantise/{name}")
            )
            self.nodes.append(
                helper.make_node("DequantizeLinear", [f"{name}/q", *inputs], [f"{name}/dq"], name=f"dequantise/{name}")
            )
            self.ranges[f"{name}/dq"] = self.ranges[name]
            self._quantised[name] = f"{name}/dq"
        return self._quantised[name]

    def convolution(self, node: onnx.NodeProto, added: bool) -> None:
        """Append the convolution with its activation and weight quantised; `added`: a residual addition reads it."""
        activation, weight = node.input[0], node.input[1]
        node.input[0] = self.activation(activation)
        values = self.values(weight)
        levels = self._placement.weight_levels
        largest = np.abs(values).reshape(len(values), -1).max(axis=1).clip(1e-12)
        if self._placement.one_scale and added:
            largest[:] = largest.max()
        scale = (largest / levels).astype(np.float32)
        integers = np.round(values / scale.reshape(-1, 1, 1, 1)).clip(-levels, levels).astype(np.int8)
        if self._correct_bias and len(node.input) > 2:
            lost = values - integers * scale.reshape(-1, 1, 1, 1)
            bias = self.values(node.input[2])
            corrected = (bias + self._mean_output(node, activation, lost)).astype(np.float32)
            node.input[2] = self.constant(f"{node.input[2]}/corrected", corrected)
        by_shares = self._placement.one_scale and not added
        shared = self._within_half(scale.max(), integers, activation) if by_shares else scale.max()
        node.input[1] = self._dequantised(weight, integers, shared if self._placement.one_scale else scale)
        self.ranges[node.input[1]] = TensorRange(float(np.abs(values).max()))
        if self._placement.integer_bias and len(node.input) > 2:
            bias = self.values(node.input[2])
            steps = (scale * self._activation_scale(activation)[0]).astype(np.float32)
            limit = np.iinfo(np.int32).max
            rounded = np.round(bias.astype(np.float64) / steps).clip(-limit, limit).astype(np.int32)
            node.input[2] = self._dequantised(node.input[2], rounded, steps)
        self.nodes.append(node)
        if by_shares:
            self._append_shares(node, scale / shared)

    def _mean_output(self, node: onnx.NodeProto, activation: str, weight: np.ndarray) -> np.ndarray:
        """The mean output of the convolution with this weight, by channel: that of the mean input, as it is linear."""
        import torch

        mean = self.ranges[activation].mean
        if mean is None:
            raise ValueError(f"the range of {activation} was measured without its mean")
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        pads = given.get("pads", [0, 0, 0, 0])
        image = np.pad(mean, ((0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
        output = torch.nn.functional.conv2d(
            torch.from_numpy(image)[None],
            torch.from_numpy(weight.astype(np.float64)),
            stride=tuple(given.get("strides", (1, 1))),
            groups=given.get("group", 1),
        )
        return output.mean((0, 2, 3)).numpy()

    def _within_half(self, scale: float, integers: np.ndarray, activation: str) -> np.ndarray:
        """The scale, or as much less as it takes for float16 to hold the convolution's sums; the shares make up for it.

        The output's range is no bound of them: a sum is the output without its bias divided by its channel's share,
        which may be tiny. But the activation is cut off at its threshold, on any image.
        """
        largest = np.abs(integers).reshape(len(integers), -1).sum(axis=1).max() * scale * self._thresholds[activation]
        return np.array(scale / max(1.0, largest / LIMIT), np.float32)

    def _append_shares(self, node: onnx.NodeProto, shares: np.ndarray) -> None:
        """What a scale for each channel would have done: its share of the one scale by a Mul, and the bias after
        that."""
        bias = self.values(node.input.pop()) if len(node.input) > 2 else np.zeros_like(shares)
        output = node.output[0]
        raw, scaled = f"{output}/raw", f"{output}/scaled"
        node.output[0] = raw
        self.ranges[scaled] = TensorRange(self.ranges[output].largest + float(np.abs(bias).max()))
        for operator, source, values, target in (("Mul", raw, shares, scaled), ("Add", scaled, bias, output)):
            constant = self.constant(f"{source}/{operator}", values.reshape(1, -1, 1, 1))
            self.nodes.append(helper.make_node(operator, [source, constant], [target], name=f"{node.name}/{operator}"))

    def _activation_scale(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        threshold = self._thresholds[name]
        if not self._placement.unsigned:
            return np.array(threshold / 127, np.float32), np.array(0, np.int8)
        if self.ranges[name].negative:
            return np.array(threshold / 127, np.float32), np.array(128, np.uint8)
        return np.array(threshold / 255, np.float32), np.array(0, np.uint8)

    def _dequantised(self, name: str, integers: np.ndarray, scale: np.ndarray) -> str:
        """A constant of integers with one scale, or one a channel of axis 0, as float32."""
        inputs = [
            self.constant(f"{name}/q", integers),
            self.constant(f"{name}/scale", scale),
            self.constant(f"{name}/zero", np.zeros(scale.shape, integers.dtype)),
        ]
        self.nodes.append(
            helper.make_node("DequantizeLinear", inputs, [f"{name}/dq"], name=f"dequantise/{name}", axis=0)
        )
        return f"{name}/dq"
