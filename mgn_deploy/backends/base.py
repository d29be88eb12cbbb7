"""What a backend is: a bundle's model, opened by one engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun
from mgn_deploy.machine import Hardware


class BatchLimits(NamedTuple):
    """Images a call that an engine was compiled for. `max` is no limit of the caller's: larger batches are run in
    parts."""

    min: int
    opt: int
    max: int


class Backend(ABC):
    """A model opened by one engine. Calls are made from one thread at a time.

    To add a backend, derive from this class in a file of its own and give it a row in `registry.py`.
    """

    name: ClassVar[str]  # its row's name in the registry
    # Compiled for one GPU by one release: a proof made elsewhere is then no proof of what runs here.
    compiled: ClassVar[bool] = False

    version: str  # of the engine
    hardware: Hardware  # what it runs on
    batch_limits: BatchLimits | None = None  # None: any number of images a call
    fused_heads: bool = False  # the heads run as the kernel of `kernels/` instead of the graph's operators

    @classmethod
    def missing(cls) -> str | None:
        """Say why this backend cannot run here and what to install; None where it can. Imports the engine."""
        return ENGINES[cls.name].import_problem()

    @classmethod
    @abstractmethod
    def open_graph(cls, graph: bytes, config: ModelConfig, *, fused_heads: bool = False) -> Backend:
        """Open an ONNX graph as `export/graph/trace.py` makes it, of any precision. `missing` has returned None.

        Raises:
            CannotRun: the engine cannot run the graph.
        """

    @classmethod
    def open(cls, bundle: Bundle, *, fused_heads: bool = False) -> Backend:
        """Open a bundle.

        Raises:
            CannotRun: the bundle lacks what this backend needs, or the engine cannot run the graph.
            UserError: the bundle's files are not what was exported.
        """
        return cls.open_graph(bundle.read(GRAPH), bundle.config, fused_heads=fused_heads)

    @abstractmethod
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embed uint8 RGB `[n, height, width, 3]`, C-contiguous, as float32 unit rows `[n, dim]`, a new array."""

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Embed each batch, in order. An engine on a GPU asks for batches ahead of its results."""
        return map(self, batches)

    def buffer(self, images: int, height: int, width: int) -> np.ndarray:
        """Memory for the next batch to `stream`, uint8 `[images, height, width, 3]`, uninitialised. An engine on a GPU
        gives memory that its copies start from, so that pixels written there are not moved again; it is the engine's
        from the moment that `stream` asks for the batch after it, and no longer valid when `stream` ends."""
        return np.empty((images, height, width, 3), np.uint8)

    @property
    def device(self) -> str:
        """The name of the GPU that it runs on, or "CPU"."""
        return self.hardware.gpu or "CPU"


def refuse_fused_heads(name: str, asked: bool) -> None:
    """Raise CannotRun where they are asked of a backend that runs the whole graph."""
    if asked:
        raise CannotRun(
            f"{name} runs the whole graph: fused heads are a property of GPU engines, leave out --fused-heads"
        )


def refuse_shapes(shapes: Sequence[Sequence[object]], config: ModelConfig) -> None:
    """Raise CannotRun unless the shapes of a graph's inputs and outputs, batch first, are the model's."""
    found = [[str(size) for size in shape[1:]] for shape in shapes]
    expected = [[str(config.height), str(config.width), "3"], [str(config.dim)]]
    if found != expected:
        raise CannotRun(f"this graph maps {found[:1]} to {found[1:]}, not {expected[:1]} to {expected[1:]}")
