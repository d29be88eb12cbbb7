"""`torch-cuda`: its module and its pipeline on the CPU, where convolutions are not fused and there are no graphs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import REFERENCE, write_manifest
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun, UserError

torch = pytest.importorskip("torch")

from mgn_deploy.backends.torch_cuda import pipeline  # noqa: E402
from mgn_deploy.backends.torch_cuda.backend import TorchCudaBackend  # noqa: E402
from mgn_deploy.backends.torch_cuda.network import DTYPES, Convolution, InferenceMGN  # noqa: E402
from mgn_deploy.train.model import MGN, Embedding  # noqa: E402

PAPER = {"backbone": "resnet18", "base_width": 16, "reduced_width": 16, "height": 96, "width": 32}
MODELS = {
    "paper": {},
    "bottlenecks, averages, no ReLU": {"backbone": "resnet50", "pooling": "avg", "neck": "linear", "global_stride": 1},
    "IBN, generalised means, second norm": {"ibn": "a", "pooling": "gem", "neck": "relu_norm", "stem_pool": "ceil"},
    "groups": {"backbone": "resnext50_32x4d", "base_width": 32, "branches": (1, 2)},
}


def trained(**fields: object) -> MGN:
    """A model whose batch norms are not all zero and one."""
    torch.manual_seed(1)
    model = MGN(ModelConfig(**{**PAPER, **fields})).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.7, 1.3)
            module.bias.data.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (150, 96, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def engine() -> TorchCudaBackend:
    return opened("fp32")


@pytest.fixture(scope="module")
def expected(pixels) -> np.ndarray:
    with torch.inference_mode():
        return Embedding(trained())(torch.from_numpy(pixels)).numpy()


def opened(precision, **options) -> TorchCudaBackend:
    from safetensors.torch import save

    model = trained()
    return TorchCudaBackend(save(model.state_dict()), model.config, True, precision, device="cpu", **options)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_in_float32_the_network_is_the_reference(fields, flip, pixels):
    model, images = trained(**fields), torch.from_numpy(pixels[:4])
    with torch.inference_mode():
        found = InferenceMGN(model, flip, torch.float32)(images)
        assert (found - Embedding(model, flip)(images)).abs().max() < 1e-6


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_in_half_precision_it_rounds_and_no_more(fields, precision, pixels):
    model, images = trained(**fields), torch.from_numpy(pixels[:4])
    network = InferenceMGN(model, True, DTYPES[precision])
    with torch.inference_mode():
        found, exact = network(images), Embedding(model)(images)
        assert {map_.dtype for map_ in network.feature_maps(images)} == {DTYPES[precision]}
    assert found.dtype == torch.float32
    assert (found * exact).sum(1).min() >= 0.999
    assert (found - exact).abs().max() > 1e-6  # it did round


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_maps_and_weights_are_channels_last_from_end_to_end(dtype, pixels):
    network = InferenceMGN(trained(ibn="a"), True, dtype)
    found = []
    for conv in network.fusible:
        conv.register_forward_hook(lambda _, inputs, output: found.extend([*inputs, output]))
    network.feature_maps(torch.from_numpy(pixels[:2]))
    kept = [conv.weight for conv in network.fusible]
    assert len(found) > 50
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in [*found, *kept])


def test_the_model_is_left_as_it_was():
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    InferenceMGN(model, True, torch.float16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_convolution_with_a_relu_is_fused_but_the_stem_and_those_before_an_instance_norm():
    network = InferenceMGN(trained(ibn="a"), True, torch.float16)
    network.fuse()
    fused = {name for name, module in network.named_modules() if isinstance(module, Convolution) and module.fused}
    plain = {name for name, module in network.named_modules() if isinstance(module, Convolution)} - fused
    assert "stem" in plain
    assert all(name == "stem" or name.endswith("convs.0") for name in plain)
    assert "trunk.0.convs.0" in plain  # of layer1
    assert "branches.0.2.convs.0" in fused  # of layer4, which has no instance norm


def operators(aten: str):
    """What ATen documents of cuDNN's fused convolutions, of PyTorch's own operators."""

    def relu(x, weight, bias, stride, padding, dilation, groups):
        return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return (y + alpha * z).relu()

    names = [argument.name for argument in getattr(torch.ops.aten, aten).default._schema.arguments]
    if aten == "cudnn_convolution_relu":
        assert names == ["self", "weight", "bias", "stride", "padding", "dilation", "groups"]
        return relu
    assert names == ["self", "weight", "z", "alpha", "bias", "stride", "padding", "dilation", "groups"]
    return add_relu


def test_the_fused_calls_have_the_arguments_that_pytorch_declares(pixels, expected, monkeypatch):
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch, name, operators(name))
    network = InferenceMGN(trained(), True, torch.float32)
    network.fuse()
    with torch.inference_mode():
        found = network(torch.from_numpy(pixels[:4])).numpy()
    assert np.abs(found - expected[:4]).max() < 1e-6
    assert all(conv.fused for conv in network.fusible)


@pytest.mark.parametrize(
    "said", ["GET was unable to find an engine to execute this computation", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"]
)
def test_what_cudnn_cannot_fuse_runs_as_several_operators(said, pixels, expected, monkeypatch):
    def refuse(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", refuse)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", operators("cudnn_convolution_relu"))
    network = InferenceMGN(trained(), True, torch.float32)
    network.fuse()
    with torch.inference_mode():
        found = network(torch.from_numpy(pixels[:4])).numpy()
    assert np.abs(found - expected[:4]).max() < 1e-6
    assert {conv.fused for conv in network.fusible} == {True, False}


def test_another_failure_of_a_fused_call_is_not_passed_over(pixels, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fail)
    network = InferenceMGN(trained(), True, torch.float32)
    network.fuse()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        network(torch.from_numpy(pixels[:1]))


# The pipeline


@pytest.mark.parametrize("images", [0, 1, 3, 64, 65, 150])
def test_a_batch_of_any_size_is_padded_or_split(engine, pixels, expected, images):
    found = engine(pixels[:images])
    assert found.shape == (images, 128)
    assert images == 0 or np.abs(found - expected[:images]).max() < 1e-6


def test_padding_of_an_earlier_batch_changes_nothing(engine, pixels):
    first = engine(pixels[:3])
    engine(pixels[60:124])
    assert np.array_equal(engine(pixels[:3]), first)


def test_a_stream_gives_every_batch_in_order(engine, pixels, expected):
    sizes = [3, 97, 0, 8, 8, 1]
    ends = np.cumsum(sizes)
    found = list(engine.stream(pixels[end - size : end] for size, end in zip(sizes, ends, strict=True)))
    assert [len(rows) for rows in found] == sizes
    assert np.abs(np.concatenate(found) - expected[: ends[-1]]).max() < 1e-6


def test_a_stream_asks_for_the_next_batch_before_it_gives_the_last_result(engine, pixels):
    asked = []

    def batches() -> Iterator[np.ndarray]:
        for index in range(4):
            asked.append(index)
            yield pixels[index : index + 1]

    results = engine.stream(batches())
    next(results)
    assert asked == [0, 1]
    list(results)


def test_pixels_written_to_the_engines_memory_are_not_copied_to_it_again(engine, pixels, expected, monkeypatch):
    monkeypatch.setattr(engine._pipeline, "_fill", None)  # would copy
    pinned = {slot.images.ctypes.data for slot in engine._pipeline._slots}

    def batches() -> Iterator[np.ndarray]:
        for first in range(0, 60, 6):
            batch = engine.buffer(6, 96, 32)
            assert batch.ctypes.data in pinned
            batch[:] = pixels[first : first + 6]
            yield batch

    found = list(engine.stream(batches()))
    assert np.abs(np.concatenate(found) - expected[:60]).max() < 1e-6


def test_buffers_that_are_taken_and_not_used_leave_one_for_what_comes_otherwise(engine, pixels, expected):
    taken = [engine.buffer(4, 96, 32) for _ in range(5)]
    assert len({array.ctypes.data for array in taken}) == 5
    assert np.abs(engine(pixels[:4]) - expected[:4]).max() < 1e-6


def test_an_embedder_fills_the_engines_memory(engine, pixels, expected, monkeypatch):
    from mgn_deploy.embedder import Embedder

    monkeypatch.setattr(engine._pipeline, "_fill", None)  # would copy
    found = Embedder(engine, ModelConfig(**PAPER)).embed(list(pixels[:20]), batch_size=8)
    assert np.abs(found - expected[:20]).max() < 1e-6


def test_a_stream_that_is_left_early_leaves_the_engine_usable(engine, pixels, expected):
    results = engine.stream(pixels[first : first + 4] for first in range(0, 40, 4))
    next(results)
    with pytest.raises(RuntimeError, match="use up the iterator"):
        engine(pixels[:1])
    results.close()
    assert np.abs(engine(pixels[:4]) - expected[:4]).max() < 1e-6


def test_a_size_is_prepared_when_it_is_first_needed(pixels):
    fresh = opened("fp32")
    assert not fresh._pipeline._runs
    fresh(pixels[:5])
    fresh(pixels[:8])
    assert list(fresh._pipeline._runs) == [8]


class Accelerator(RuntimeError):
    """As torch.AcceleratorError, which PyTorch raises for CUDA's errors from 2.8 on."""

    error_code = 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), Accelerator("out of memory")])
def test_a_full_gpu_is_a_sentence(error):
    with pytest.raises(UserError, match="too little free memory"), pipeline.gpu_errors():
        raise error


def test_an_error_that_is_not_cudas_stays_as_it_is():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), pipeline.gpu_errors():
        raise RuntimeError("shapes cannot be multiplied")


# The bundle


def test_int8_is_refused():
    with pytest.raises(CannotRun, match="torch-cuda computes in fp32, fp16, bf16, and this bundle is in int8"):
        opened("int8")


def test_a_bundle_without_weights_is_a_sentence(bundle_folder, tmp_path):
    import shutil

    shutil.copytree(bundle_folder, tmp_path / "b")
    manifest = Bundle.open(tmp_path / "b").manifest
    files = {name: entry for name, entry in manifest.files.items() if name != REFERENCE}
    write_manifest(tmp_path / "b", manifest.model_copy(update={"files": files}))
    with pytest.raises(CannotRun, match="--no-reference: torch-cuda needs the weights"):
        TorchCudaBackend.open(Bundle.open(tmp_path / "b"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_engine_says_so_and_runs_nowhere_else(bundle_folder):
    assert "GPU" in str(ENGINES["torch-cuda"].load().missing())
    with pytest.raises(CannotRun, match="GPU"):
        TorchCudaBackend.open(Bundle.open(bundle_folder))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused_heads", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_on_a_gpu_it_computes_what_it_does_on_a_cpu(precision, fused_heads, pixels, expected):
    from safetensors.torch import save

    model = trained()
    weights = save(model.state_dict())
    found = TorchCudaBackend(weights, model.config, True, precision, fused_heads=fused_heads)
    for images in (1, 3, 64, 150):
        first, again = found(pixels[:images]), found(pixels[:images])
        assert np.array_equal(first, again)  # by the captured graph as without it
        assert (first * expected[:images]).sum(1).min() >= (0.999999 if precision == "fp32" else 0.999)
