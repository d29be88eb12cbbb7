"""The engines that can run a bundle, one small file each.

To add one: write `backends/NAME.py` with `missing()` and `open_engine(bundle)` as below, and put NAME into `ORDER`.
Nothing else in the project knows an engine's name.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from mgn_deploy.backends.base import Backend, BackendModule
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.machine import place

# What `auto` tries: GPUs, whose order is not measured yet, then the CPU: in float32 OpenVINO and ONNX Runtime are within a tenth of each other
# with the full model, in int8 OpenVINO was ahead with the small one (README, Figures).
ORDER = ("tensorrt", "tensorrt_rtx", "onnxruntime_cuda", "openvino", "onnxruntime", "torch")


MODULES = {
    "tensorrt": "mgn_deploy.backends.tensorrt.runner",
    "tensorrt_rtx": "mgn_deploy.backends.tensorrt_rtx",
    "onnxruntime_cuda": "mgn_deploy.backends.onnxruntime.cuda",
    "openvino": "mgn_deploy.backends.openvino",
    "onnxruntime": "mgn_deploy.backends.onnxruntime.cpu",
    "torch": "mgn_deploy.backends.torch",
}
_log = logging.getLogger("mgn_deploy")


def backend_module(name: str) -> BackendModule:
    """The module of a backend by name.

    Raises:
        UserError: no such backend.
    """
    if name not in ORDER:
        raise UserError(f"no backend {name!r}: choose auto, {', '.join(ORDER)}")
    module: Any = import_module(MODULES[name])
    return module


def open_backend(bundle: Bundle, name: str = "auto", *, allow_unproven: bool = False) -> Backend:
    """Open a bundle with the named backend ("-" is as good as "_"), or with the first of `ORDER` that is installed and proven.

    Raises:
        CannotRun: the backend is not installed, or the bundle has no passed proof for it and `allow_unproven` is False.
        UserError: no such backend, or the bundle's files are not what was exported: no other backend is tried then.
    """
    if name != "auto":
        return _open(bundle, name.replace("-", "_"), allow_unproven)
    reasons = []
    for candidate in ORDER:
        try:
            return _open(bundle, candidate, allow_unproven)
        except ProvenElsewhere as error:  # or a GPU would stand idle, and nobody would know why
            _log.warning(f"{error}; trying the next backend")
            reasons.append(f"{candidate}: {error}")
        except CannotRun as error:
            reasons.append(f"{candidate}: {error}")
    raise CannotRun(f"no backend can run {bundle.folder}. " + " | ".join(reasons))


def _open(bundle: Bundle, name: str, allow_unproven: bool) -> Backend:
    module = backend_module(name)
    if not allow_unproven:
        bundle.require_proof(name)
    reason = module.missing()
    if reason:
        raise CannotRun(f"backend {name} cannot run here: {reason}")
    engine = module.open_engine(bundle)
    if not allow_unproven:
        compare_places(bundle, name, engine)
    return engine


class ProvenElsewhere(CannotRun):
    """An engine that was compiled here and proven somewhere else: it is another engine."""


def compare_places(bundle: Bundle, name: str, engine: Backend) -> None:
    """With where the engine was proven. Compiled for another GPU or by another release it is refused, else warned of."""
    proof = bundle.manifest.proofs[name]
    compiled = hasattr(engine, "profile")
    here = engine.device if compiled else place(engine.device)
    same_place = proof.machine.endswith(f", {here})") if compiled else proof.machine == here
    if same_place and proof.backend_version == engine.version:
        return
    there = f"{name} {proof.backend_version} on {proof.machine}"
    sentence = f"{bundle.folder} was proven with {there} and this is {engine.version} on {here}"
    if compiled:
        raise ProvenElsewhere(
            f"{sentence}: `mgn-deploy prove {bundle.folder}` proves it here, or pass --allow-unproven"
        )
    _log.warning(f"{sentence}: `mgn-deploy prove {bundle.folder}` would prove it here")
