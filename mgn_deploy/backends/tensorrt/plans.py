"""Which plan a bundle has for this GPU; where it has none, one built from its graph."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mgn_deploy.backends.tensorrt.package import import_problem_of, import_tensorrt
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.engine_entry import DEFAULT_BATCH, TITLES, EngineEntry, Flavour
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.cuda.device import Gpu
from mgn_deploy.errors import CannotRun
from mgn_deploy.packages import import_problem

_log = logging.getLogger("mgn_deploy")


def plan_for(bundle: Bundle, flavour: Flavour, version: str, gpu: Gpu) -> bytes:
    """A plan that runs on this GPU: the bundle's, compared with the manifest's hash, or one built here and cached.

    Raises:
        CannotRun: the bundle has none that runs here and none can be built; the sentence says why.
        UserError: the bundle's plan or graph is not what was exported, or TensorRT refuses the graph.
    """
    engines = bundle.manifest.engines
    fitting = fitting_entry(engines, flavour, version, gpu)
    if fitting is not None:
        return bundle.read(fitting.file)
    own = [engine for engine in engines if engine.flavour == flavour]
    reason = (
        "; ".join(engine.misfit(flavour, version, gpu.name, gpu.compute_capability) or "" for engine in own)
        or f"it has no plan for {TITLES[flavour]}"
    )
    problem = builder_problem(flavour)
    if problem:
        raise CannotRun(
            f"{bundle.folder} has no plan that runs here ({reason}) and none can be built from its graph ({problem}): "
            f"export it for this GPU with --engine {flavour.replace('_', '-')}, or choose another --backend"
        )
    return _built_here(bundle, flavour, gpu, own[0].batch if own else DEFAULT_BATCH)


def fitting_entry(engines: Sequence[EngineEntry], flavour: Flavour, version: str, gpu: Gpu) -> EngineEntry | None:
    """The first plan that runs here, one for this very compute capability before a portable one."""
    fitting = [
        engine for engine in engines if engine.misfit(flavour, version, gpu.name, gpu.compute_capability) is None
    ]
    return min(fitting, key=lambda engine: engine.compute_capability != gpu.compute_capability, default=None)


def builder_problem(flavour: Flavour) -> str | None:
    """Why no plan can be built with what is installed, or None. TensorRT's lean and dispatch runtimes have no builder."""
    problem = import_problem_of(flavour)
    if problem:
        return problem
    if not hasattr(import_tensorrt(flavour), "Builder"):
        return f"the installed {TITLES[flavour]} is its runtime only, without the builder"
    return import_problem("onnx", flavour.replace("_", "-"))


def _built_here(bundle: Bundle, flavour: Flavour, gpu: Gpu, batch: tuple[int, int, int]) -> bytes:
    import onnx

    from mgn_deploy.backends.tensorrt.builder import BuildSettings, build_plans, capabilities

    ahead = flavour == "tensorrt_rtx" and gpu.compute_capability in capabilities()
    settings = BuildSettings(flavour, batch, gpu.compute_capability if ahead else None)
    _log.warning(f"{bundle.folder} has no plan for {gpu.name}: building one, once, or taking it from the cache")
    return build_plans(onnx.load_from_string(bundle.read(GRAPH)), settings)[0].content
