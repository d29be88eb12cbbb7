"""ONNX graph -> TensorRT plan, by TensorRT 10 or 11, or by TensorRT-RTX, which needs no GPU to build for one.

The network is strongly typed: precision is the graph's to say, so TF32 is off, too. Plans are kept in a cache
(`mgn_deploy/cached.py`).
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx

import mgn_deploy
from mgn_deploy.backends.heads.cut import cut_trunk
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.backends.tensorrt.network import PreparedGraph, build_network, parsed_network, prepare
from mgn_deploy.backends.tensorrt.package import import_tensorrt, logger, title
from mgn_deploy.bundle.manifest import DEFAULT_BATCH, EngineEntry, TensorRtName
from mgn_deploy.cached import load, load_entry, save, save_entry
from mgn_deploy.choices import MAX_BATCH
from mgn_deploy.cuda.device import Gpu, gpu_problem, this_gpu
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.progress import Progress

CACHE = "plans"  # its folder
# TensorRT has one logger a process, and a build's messages must be its own.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class BuildSettings:
    """What a plan is built for.

    `batch`: min, opt and max images a call. `compute_capability`: "8.6", for TensorRT-RTX only, which without it
    builds for any GPU from Ampere on. `workspace`: bytes of GPU memory that a layer may take for itself; None: all
    there is. With `fused_heads` the plan ends with the feature maps. `version_compatible` and `hardware_compatible`
    (other GPUs from Ampere on) are TensorRT's only.
    """

    engine: TensorRtName
    batch: tuple[int, int, int] = DEFAULT_BATCH
    compute_capability: str | None = None
    workspace: int | None = None
    fused_heads: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False


@dataclass(frozen=True)
class Plan:
    """A built plan. `layers` is TensorRT's own table of its layers, as text; `seconds` what building took when it was
    built."""

    content: bytes
    settings: BuildSettings
    version: str
    gpu: Gpu | None
    layers: str
    seconds: float
    cached: bool

    def entry(self, file: str) -> EngineEntry:
        """The manifest's entry for this plan under that file name."""
        facts = vars(self.settings) | {
            "file": file,
            "version": self.version,
            "gpu": self.gpu.name if self.gpu else None,
            "compute_capability": self._compute_capability,
        }
        del facts["workspace"]
        return EngineEntry(**facts)

    @property
    def file_name(self) -> str:
        """As in `tensorrt-rtx-sm86.plan`."""
        capability = self._compute_capability
        target = f"sm{capability.replace('.', '')}" if capability else "ampere-plus"
        return f"{self.settings.engine}-{target}{'-fused-heads' if self.settings.fused_heads else ''}.plan"

    @property
    def _compute_capability(self) -> str | None:
        return self.settings.compute_capability or (self.gpu.compute_capability if self.gpu else None)


def build_plans(
    graph: onnx.ModelProto,
    settings: BuildSettings,
    compute_capabilities: Sequence[str] = (),
    *,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> list[Plan]:
    """One plan for each compute capability, or one as the settings say without any.

    Args:
        graph: with its weights and precision as exported. Input: uint8 `[n, height, width, 3]`.
        settings: its own `compute_capability` gives way to the list's.
        compute_capabilities: as "8.6".
        use_cache: take plans from the cache and put them there.
        progress: called as (phase, step, steps), from another thread. What it raises stops the build and goes on to the
            caller.

    Raises:
        CannotRun: the package is not installed, or `tensorrt` finds no GPU.
        UserError: settings that it cannot build for, or a graph that it refuses (the sentence names the node).
        KeyboardInterrupt: Ctrl-C; the build is stopped first.
    """
    wanted = check_build(settings, compute_capabilities)
    prepared = prepare(cut_trunk(graph) if settings.fused_heads else graph)
    gpu = this_gpu() if settings.engine == "tensorrt" else None
    return [_plan(prepared, one, gpu, use_cache, progress) for one in wanted]


def check_build(settings: BuildSettings, compute_capabilities: Sequence[str] = ()) -> list[BuildSettings]:
    """The settings of each plan that `build_plans` would build; raises what it would before it looks at a graph."""
    engine = settings.engine
    wanted = [replace(settings, compute_capability=one) for one in compute_capabilities] or [settings]
    for one in wanted:
        _check(one)
    problem = ENGINES[engine].import_problem() or (gpu_problem() if engine == "tensorrt" else None)
    if problem:
        raise CannotRun(f"{ENGINES[engine].title} cannot build here: {problem}")
    for one in wanted:
        if one.compute_capability and one.compute_capability not in capabilities():
            raise UserError(
                f"{title('tensorrt-rtx')} builds for compute capability {', '.join(capabilities())}, "
                f"not for {one.compute_capability!r}"
            )
    return wanted


def _check(settings: BuildSettings) -> None:
    check_batch(settings.batch)
    if settings.workspace is not None and settings.workspace < 1:
        raise UserError(f"a workspace of {settings.workspace} bytes holds nothing: leave it out for no limit")
    rtx = settings.engine == "tensorrt-rtx"
    if not rtx and settings.compute_capability:
        raise UserError(
            "TensorRT builds for the GPU of the machine that it runs on, not for a compute capability ahead of time: "
            "use --engine tensorrt-rtx, or --hardware-compatible"
        )
    if rtx and (settings.version_compatible or settings.hardware_compatible):
        raise UserError(
            "TensorRT-RTX plans run with their own release only, and without a compute capability on any GPU from "
            "Ampere on: leave out --version-compatible and --hardware-compatible"
        )


def check_batch(batch: tuple[int, int, int]) -> None:
    """Raise UserError unless 1 <= min <= opt <= max <= 4096 images."""
    if not 1 <= batch[0] <= batch[1] <= batch[2] <= MAX_BATCH:
        raise UserError(
            f"batch {batch[0]},{batch[1]},{batch[2]}: it must be 1 <= min <= opt <= max <= {MAX_BATCH} images"
        )


def capabilities() -> list[str]:
    """The compute capabilities that the installed TensorRT-RTX builds for, as "8.6"."""
    names = import_tensorrt("tensorrt-rtx").ComputeCapability.__members__
    digits = sorted((name[2:] for name in names if name.startswith("SM")), key=int)
    return [f"{one[:-1]}.{one[-1]}" for one in digits]


def _plan(
    prepared: PreparedGraph, settings: BuildSettings, gpu: Gpu | None, use_cache: bool, progress: Progress | None
) -> Plan:
    version = str(import_tensorrt(settings.engine).__version__)
    # Of this package, too: what it tells TensorRT beyond the settings is code.
    facts = {
        **vars(settings),
        "version": version,
        "gpu": vars(gpu) if gpu else None,
        "mgn-deploy": mgn_deploy.__version__,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + prepared.content).hexdigest()
    found = load_entry(CACHE, key, "plan") if use_cache else None
    if found:
        content, record = found
        return Plan(content, settings, version, gpu, record["layers"], record["seconds"], True)
    started = time.perf_counter()
    content, layers = _build(prepared, settings, gpu, use_cache, progress)
    seconds = time.perf_counter() - started
    if use_cache:
        save_entry(CACHE, key, "plan", content, {"layers": layers, "seconds": seconds})
    return Plan(content, settings, version, gpu, layers, seconds, False)


def _build(
    prepared: PreparedGraph, settings: BuildSettings, gpu: Gpu | None, use_cache: bool, progress: Progress | None
) -> tuple[bytes, str]:
    trt = import_tensorrt(settings.engine)
    with _one_at_a_time:
        logger(settings.engine).messages.clear()
        network = parsed_network(settings.engine, prepared)
        config = _config(trt, network.builder, prepared, settings)
        timings = _timing_cache(config, settings, gpu) if use_cache and gpu else None
        content = build_network(settings.engine, network, config, progress)
        if timings:
            cache, name = timings
            save(CACHE, name, bytes(memoryview(cache.serialize())))
        text = logger(settings.engine).messages.layers
    if text:
        return content, text
    runtime = trt.Runtime(logger(settings.engine))
    if settings.version_compatible:
        runtime.engine_host_code_allowed = True  # the plan, built here just now, brings its runtime with it
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:  # without a GPU, and with a log that has no table
        return content, ""
    inspector = engine.create_engine_inspector()
    return content, inspector.get_engine_information(trt.LayerInformationFormat.JSON)


def _config(trt: Any, builder: Any, prepared: PreparedGraph, settings: BuildSettings) -> Any:
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    shapes = [(size, prepared.height, prepared.width, 3) for size in settings.batch]
    profile.set_shape(prepared.input_name, *shapes)
    config.add_optimization_profile(profile)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the layer table; costs nothing at run time
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: what CUDA graphs need
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.compute_capability:
        config.num_compute_capabilities = 1
        member = getattr(trt.ComputeCapability, "SM" + settings.compute_capability.replace(".", ""))
        config.set_compute_capability(member, 0)
    return config


def _timing_cache(config: Any, settings: BuildSettings, gpu: Gpu) -> tuple[Any, str]:
    """How long TensorRT's kernels took on this GPU in earlier builds. TensorRT-RTX times none."""
    version = import_tensorrt(settings.engine).__version__
    name = hashlib.sha256(f"{settings.engine} {version} {gpu}".encode()).hexdigest() + ".timings"
    timings = config.create_timing_cache(load(CACHE, name)) or config.create_timing_cache(b"")
    config.set_timing_cache(timings, ignore_mismatch=False)
    return timings, name
