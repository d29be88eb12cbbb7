"""mgn-deploy: from the weights of a Multiple Granularity Network to the fastest verified engine of this machine.

    >>> from mgn_deploy import Embedder
    >>> embedder = Embedder.open("bundle/")
    >>> embedder.embed(["a.jpg", "b.jpg"]).shape     # doctest: +SKIP
    (2, 2048)

Importing this package imports neither torch nor an engine; the names below are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mgn_deploy.telemetry import switch_off

if TYPE_CHECKING:
    from mgn_deploy.bundle.bundle import Bundle as Bundle
    from mgn_deploy.embedder import Embedder as Embedder
    from mgn_deploy.errors import GateFailed as GateFailed
    from mgn_deploy.errors import UnreadableImage as UnreadableImage
    from mgn_deploy.errors import UserError as UserError
    from mgn_deploy.gallery.store import Store as Store

__version__ = "0.1.0"

switch_off()

_HOME = {
    "Bundle": "mgn_deploy.bundle.bundle",
    "Embedder": "mgn_deploy.embedder",
    "GateFailed": "mgn_deploy.errors",
    "Store": "mgn_deploy.gallery.store",
    "UnreadableImage": "mgn_deploy.errors",
    "UserError": "mgn_deploy.errors",
}
__all__ = ["Bundle", "Embedder", "GateFailed", "Store", "UnreadableImage", "UserError"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mgn_deploy' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
