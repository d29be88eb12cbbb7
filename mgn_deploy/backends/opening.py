"""How a bundle is opened by one of the engines, where its proof allows it."""

from __future__ import annotations

import logging

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.registry import ENGINES, Engine, engine_row
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import CannotRun

_log = logging.getLogger("mgn_deploy")


def open_backend(
    bundle: Bundle, name: str = "auto", *, allow_unproven: bool = False, fused_heads: bool | None = None
) -> Backend:
    """Open a bundle with the named backend, or with the first of the table that is installed and proven.

    Args:
        bundle: an opened one.
        name: a row's name, or "auto".
        allow_unproven: also open what has no passed proof here.
        fused_heads: of an engine on a GPU; None: as it was proven, without a proof as its plan was built.

    Raises:
        CannotRun: the backend is not installed, or the bundle has no passed proof for it and `allow_unproven` is False.
        UserError: no such backend, or the bundle's files are not what was exported: no other backend is tried then.
    """
    if name != "auto":
        return _open(bundle, engine_row(name), allow_unproven, fused_heads)
    reasons = []
    for row in ENGINES.values():
        try:
            return _open(bundle, row, allow_unproven, fused_heads)
        except CannotRun as error:
            proof = bundle.manifest.proofs.get(row.name)
            if proof is not None and proof.passed:  # or a GPU would stand idle, and nobody would know why
                _log.warning(f"{error}; trying the next backend")
            reasons.append(f"{row.name}: {error}")
    raise CannotRun(f"no backend can run {bundle.folder}. " + " | ".join(reasons))


def _open(bundle: Bundle, row: Engine, allow_unproven: bool, fused_heads: bool | None) -> Backend:
    if not allow_unproven:
        bundle.require_proof(row.name)
    backend = row.load()
    reason = backend.missing()
    if reason:
        raise CannotRun(f"backend {row.name} cannot run here: {reason}")
    if fused_heads is None:
        fused_heads = bundle.manifest.has_fused_heads(row.name)
    engine = backend.open(bundle, fused_heads=fused_heads)
    if not allow_unproven:
        compare_with_proof(bundle, engine)
    return engine


def compare_with_proof(bundle: Bundle, engine: Backend) -> None:
    """Compare an opened engine with what its proof was made with. Other instruction sets, another release or driver are
    warned of; of an engine that was compiled for its GPU, another GPU or release is refused.

    Raises:
        CannotRun: the engine was compiled here, and its proof is of one that was compiled elsewhere or has other heads.
    """
    proof = bundle.manifest.proofs[engine.name]
    same = proof.hardware.is_same_device(engine.hardware) and proof.backend_version == engine.version
    if same and proof.fused_heads == engine.fused_heads and proof.hardware.driver == engine.hardware.driver:
        return
    sentence = (
        f"{bundle.folder} was proven with {_described(engine.name, proof.backend_version, proof.fused_heads)} on "
        f"{proof.hardware} and this is {_described(engine.name, engine.version, engine.fused_heads)} on "
        f"{engine.hardware}"
    )
    if engine.compiled and not (same and proof.fused_heads == engine.fused_heads):
        raise CannotRun(
            f"{sentence}: `mgn-deploy prove --bundle {bundle.folder}` proves it here, or pass --allow-unproven"
        )
    _log.warning(f"{sentence}: `mgn-deploy prove --bundle {bundle.folder}` would prove it here")


def _described(name: str, version: str, fused_heads: bool) -> str:
    return f"{name} {version}{' with fused heads' if fused_heads else ''}"
