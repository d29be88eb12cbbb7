"""The arithmetic of how fast the network could be."""

from __future__ import annotations

import pytest

from mgn_deploy.config import ModelConfig

torch = pytest.importorskip("torch")

from roofline import Layer, bound_of, layers_of  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from mgn_deploy.backends.torch_cuda.network import InferenceMGN  # noqa: E402
from mgn_deploy.train.model import MGN  # noqa: E402

SMALL = ModelConfig(backbone="resnet50", base_width=16, reduced_width=16, height=96, width=32)


def network(flip: bool = True) -> InferenceMGN:
    return InferenceMGN(MGN(SMALL), flip, torch.float16)


def test_products_are_those_that_pytorch_counts():
    counter = FlopCounterMode(display=False)
    with counter:
        network().to("meta").feature_maps(torch.empty((3, 96, 32, 3), dtype=torch.uint8, device="meta"))
    assert sum(layer.products for layer in layers_of(network(), 3)) * 2 == counter.get_total_flops()


def test_mirrors_are_images():
    with_mirrors, without = layers_of(network(), 4), layers_of(network(flip=False), 8)
    assert with_mirrors == without


def test_the_stem_moves_its_maps_once_fused_and_three_times_apart():
    stem = layers_of(network(flip=False), 1)[0]
    image, weight, output = 3 * 96 * 32, 16 * 3 * 49, 16 * 48 * 16
    assert stem == Layer(output * 147, 2 * (image + weight + output), 2 * (2 * output + 2 * output))


def test_a_layer_takes_what_its_products_or_its_bytes_take():
    assert bound_of([Layer(10**12, 10**9, 0)], tera_operations=1, terabytes=1).fused == pytest.approx(2.0)
    slow_memory = bound_of([Layer(10**9, 10**12, 10**12)], tera_operations=1, terabytes=1)
    assert (slow_memory.fused, slow_memory.apart) == (pytest.approx(1.0), pytest.approx(2.0))
    assert slow_memory.gain == pytest.approx(2.0)
    assert slow_memory.share == pytest.approx(0.002)


def test_the_papers_network_at_64_images_is_what_the_documentation_says():
    layers = layers_of(InferenceMGN(MGN(ModelConfig()), True, torch.float16), 64)
    for tera, terabytes, share, gain in ((989, 3.35, 0.65, 2.6), (989, 4.8, 0.79, 2.3)):
        bound = bound_of(layers, tera, terabytes)
        assert bound.share == pytest.approx(share, abs=0.005)
        assert bound.gain == pytest.approx(gain, abs=0.05)
