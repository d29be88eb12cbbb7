"""Which plan a bundle has for this GPU; where it has none, one built from its graph."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.backends.tensorrt.package import import_tensorrt
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import DEFAULT_BATCH, GRAPH, EngineEntry, TensorRtName
from mgn_deploy.cuda.device import Gpu
from mgn_deploy.errors import CannotRun
from mgn_deploy.packages import import_problem

OLDEST_PORTABLE = [8, 0]  # Ampere: what hardware-compatible and portable plans need
_log = logging.getLogger("mgn_deploy")


def plan_for(bundle: Bundle, engine: TensorRtName, version: str, gpu: Gpu, fused_heads: bool) -> bytes:
    """Find or build a plan that runs on this GPU: the bundle's, compared with the manifest's hash, or one built here
    and cached.

    Raises:
        CannotRun: the bundle has none that runs here and none can be built; the sentence says why.
        UserError: the bundle's plan or graph is not what was exported, or TensorRT refuses the graph.
    """
    own = [entry for entry in bundle.manifest.engines if entry.engine == engine]
    fitting = fitting_entry(own, version, gpu, fused_heads)
    if fitting is not None:
        return bundle.read(fitting.file)
    title = ENGINES[engine].title
    reason = "; ".join(misfit(entry, version, gpu, fused_heads) or "" for entry in own) or f"it has no plan for {title}"
    problem = builder_problem(engine)
    if problem:
        raise CannotRun(
            f"{bundle.folder} has no plan that runs here ({reason}) and none can be built from its graph ({problem}): "
            f"export it for this GPU with --engine {engine}, or choose another --backend"
        )
    _log.warning(f"{bundle.folder} has no plan that runs here ({reason})")
    batch = own[0].batch if own else DEFAULT_BATCH
    return build_here(bundle.read(GRAPH), engine, gpu, batch, fused_heads)


def fitting_entry(entries: Sequence[EngineEntry], version: str, gpu: Gpu, fused_heads: bool) -> EngineEntry | None:
    """The first plan that runs here, one for this very compute capability before a portable one."""
    fitting = [entry for entry in entries if misfit(entry, version, gpu, fused_heads) is None]
    return min(fitting, key=lambda entry: entry.compute_capability != gpu.compute_capability, default=None)


def misfit(entry: EngineEntry, version: str, gpu: Gpu, fused_heads: bool) -> str | None:
    """Say as half a sentence why a plan cannot run on this GPU with this release of its engine; None where it can."""
    if entry.fused_heads != fused_heads:
        return f"{entry.file} was built {'with' if entry.fused_heads else 'without'} fused heads"
    # Version-compatible plans promise to run with later releases than their own.
    promised = entry.version_compatible and _numbers(version) >= _numbers(entry.version)
    if version != entry.version and not promised:
        return f"{entry.file} was built by {ENGINES[entry.engine].title} {entry.version} and {version} is installed"
    portable = entry.hardware_compatible or entry.compute_capability is None
    if portable and _numbers(gpu.compute_capability) >= OLDEST_PORTABLE:
        return None
    if portable or gpu.compute_capability != entry.compute_capability:
        needed = "8.0 or later" if portable else entry.compute_capability
        return f"{entry.file} needs compute capability {needed} and {gpu.name} has {gpu.compute_capability}"
    if entry.gpu is not None and gpu.name != entry.gpu:
        return f"{entry.file} was built for {entry.gpu} and this is {gpu.name}"
    return None


def builder_problem(engine: TensorRtName) -> str | None:
    """Why no plan can be built with what is installed, or None. TensorRT's lean and dispatch runtimes have no
    builder."""
    problem = ENGINES[engine].import_problem()
    if problem:
        return problem
    if not hasattr(import_tensorrt(engine), "Builder"):
        return f"the installed {ENGINES[engine].title} is its runtime only, without the builder"
    return import_problem("onnx", ENGINES[engine].extra)


def build_here(graph: bytes, engine: TensorRtName, gpu: Gpu, batch: tuple[int, int, int], fused_heads: bool) -> bytes:
    """Build a plan of an ONNX graph for this GPU, or take it from the cache."""
    import onnx

    from mgn_deploy.backends.tensorrt.builder import BuildSettings, build_plans, capabilities

    ahead = engine == "tensorrt-rtx" and gpu.compute_capability in capabilities()
    settings = BuildSettings(engine, batch, gpu.compute_capability if ahead else None, fused_heads=fused_heads)
    _log.warning(f"building a plan for {gpu.name}, once, or taking it from the cache: building may take minutes")
    return build_plans(onnx.load_from_string(graph), settings)[0].content


def _numbers(version: str) -> list[int]:
    """The first two: "8.6" -> [8, 6]."""
    return [int(part) for part in version.split(".")[:2]]
