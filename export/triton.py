"""A model repository of Triton Inference Server from a bundle.

    OUT/MODEL/config.pbtxt
    OUT/MODEL/1/model.onnx     run by Triton's onnxruntime backend, or
    OUT/MODEL/1/model.plan     by its tensorrt backend (TensorRT proper: Triton has none for TensorRT-RTX)

The configuration's fields are those of `model_config.proto` in triton-inference-server/common.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from string import Template

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH, EngineEntry
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_folder
from mgn_deploy.images.decode import PREPROCESSING

MODEL_NAME = "mgn"
# Backends of ours that run graphs as Triton's onnxruntime backend does.
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-cuda")
# How long Triton lets a request wait for others to fill its batch.
QUEUE_DELAY_MICROSECONDS = 1000

_CONFIG = Template("""\
name: "$name"
backend: "$backend"
default_model_filename: "$file"
max_batch_size: $most
input { name: "images" data_type: TYPE_UINT8 dims: [ $height, $width, 3 ] }
output { name: "embeddings" data_type: TYPE_FP32 dims: [ $dim ] }
dynamic_batching {
  preferred_batch_size: [ $preferred ]
  max_queue_delay_microseconds: $delay
}
instance_group { count: 1 kind: $kind }
parameters { key: "bundle_id" value { string_value: "$bundle_id" } }
parameters { key: "preprocessing" value { string_value: "$preprocessing" } }
$warmups""")

_WARMUP = Template("""\
model_warmup {
  name: "batch $size"
  batch_size: $size
  inputs {
    key: "images"
    value { data_type: TYPE_UINT8 dims: [ $height, $width, 3 ] random_data: true }
  }
}
""")


def write_model_repository(
    bundle: Bundle,
    out: str | os.PathLike[str],
    *,
    plan: EngineEntry | None = None,
    max_batch: int = 64,
    preferred: Sequence[int] = (8, 32),
) -> Path:
    """Write the repository's model `mgn`; an earlier one is replaced.

    Args:
        bundle: its graph, or its plan, becomes version 1 of the model.
        out: the repository; other models in it stay.
        plan: one of the bundle's plans of TensorRT, for the GPUs that it was built for; None: the graph.
        max_batch: most images that Triton puts into one call; a plan's profile must hold it.
        preferred: batch sizes that Triton tries to fill, none above `max_batch`.

    Returns:
        The model's folder.

    Raises:
        UserError: a plan without its heads, sizes that do not fit, a plan of TensorRT-RTX, no proof for the engine that
            Triton would run, or a folder that cannot be written.
    """
    _check(plan, max_batch, preferred)
    runs_it = ("tensorrt",) if plan else ONNXRUNTIMES
    if not any(name in runs_it and proof.passed for name, proof in bundle.manifest.proofs.items()):
        raise UserError(
            f"Triton would run {plan.file if plan else GRAPH} of {bundle.folder} by {runs_it[0]}, which is not proven "
            f"with it: `mgn-deploy prove --bundle {bundle.folder}` where that is installed"
        )
    folder = Path(out) / MODEL_NAME
    file = "model.plan" if plan else "model.onnx"
    content = bundle.read(plan.file if plan else GRAPH)
    with atomic_folder(folder, ("config.pbtxt", "1")) as new:
        (new / "config.pbtxt").write_text(_config(bundle, file, max_batch, preferred))
        (new / "1").mkdir()
        (new / "1" / file).write_bytes(content)
    return folder


def _check(plan: EngineEntry | None, max_batch: int, preferred: Sequence[int]) -> None:
    if max_batch < 1 or not preferred or any(not 1 <= size <= max_batch for size in preferred):
        raise UserError(
            f"preferred batch sizes {', '.join(map(str, preferred)) or 'none'}: each must lie between 1 and the "
            f"maximum, {max_batch}"
        )
    if plan is None:
        return
    if plan.engine != "tensorrt":
        raise UserError(
            f"Triton runs no plan of TensorRT-RTX ({plan.file}): build one with --engine tensorrt, or serve the graph"
        )
    if plan.fused_heads:
        raise UserError(
            f"{plan.file} ends with the feature maps, and Triton serves whole graphs: leave out --fused-heads"
        )
    if not plan.batch[0] == 1 or plan.batch[2] < max_batch:
        raise UserError(
            f"{plan.file} takes {plan.batch[0]} to {plan.batch[2]} images a call and Triton would send 1 to "
            f"{max_batch}: build it with --batch 1,{plan.batch[1]},{max_batch}"
        )


def _config(bundle: Bundle, file: str, max_batch: int, preferred: Sequence[int]) -> str:
    config = bundle.config
    sides = {"height": config.height, "width": config.width}
    # The first call of a batch size is slow: it picks kernels. Triton answers no request before these have run.
    sizes = sorted({1, *preferred, max_batch})
    return _CONFIG.substitute(
        sides,
        name=MODEL_NAME,
        bundle_id=bundle.id,
        preprocessing=PREPROCESSING,
        backend="tensorrt" if file == "model.plan" else "onnxruntime",
        file=file,
        most=max_batch,
        dim=config.dim,
        preferred=", ".join(str(size) for size in sorted(set(preferred))),
        delay=QUEUE_DELAY_MICROSECONDS,
        kind="KIND_GPU" if file == "model.plan" else "KIND_AUTO",
        warmups="".join(_WARMUP.substitute(sides, size=size) for size in sizes),
    )
