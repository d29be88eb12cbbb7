"""An engine's speed in turns with PyTorch's, eager and compiled: for `bench/gpu/matrix.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mgn_deploy.backends.base import Backend
from mgn_deploy.bench.report import sentence
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.embedder import Embedder
from mgn_deploy.train.model import MGN, Embedding, fold_batch_norms
from mgn_deploy.train.weights import load_weights

CALLS = 8  # batches that a rate is taken over, and calls whose latency is taken, each round
FEWEST_ROUNDS = 3
REFERENCE = "torch fp32"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METHOD = {
    "images/s": f"{CALLS} batches from host memory to embeddings in host memory, as `embed` gives them: what an engine "
    "can overlap, it does; median over the rounds",
    "latency ms": f"one batch alone, host to host; median over the rounds and {CALLS} calls in each",
    "x": "the row's images/s over the rival's in the same round; median over the rounds",
    "rounds": "each round runs the engine and all its rivals one after the other; the first round is not counted",
    REFERENCE: "PyTorch eager as `mgn-deploy` runs it, batch norms not folded, TF32 off",
    "other rivals": "batch norms folded; in 16 bits the network is channels-last; torch_compile is mode "
    "reduce-overhead (CUDA graphs), compiled for each batch; beside INT8 they are fp16's",
}


class TorchRival:
    """The MGN by PyTorch in one type, on the GPU where there is one; compiled for each batch size, or eager."""

    def __init__(self, weights: Path, flip: bool, precision: str, compiled: bool) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        embedding = _Typed(fold_batch_norms(load_weights(weights)), flip, DTYPES[precision]).to(self._device)
        self._run: Any = embedding
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # batches x types; beyond its limit it refuses
            self._run = torch.compile(embedding, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        return map(self, batches)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            rows: np.ndarray = self._run(torch.from_numpy(images).to(self._device)).cpu().numpy()
            return rows


class _Typed(Embedding):
    """Pixels, average and norm as in `Embedding`, the network between in its type."""

    def __init__(self, model: MGN, flip: bool, dtype: torch.dtype) -> None:
        wide = dtype == torch.float32
        self._format = torch.contiguous_format if wide else torch.channels_last
        self._dtype = dtype
        super().__init__(model.to(dtype).to(memory_format=self._format), flip)

    def normalise(self, images: Tensor) -> Tensor:
        return super().normalise(images).to(self._dtype).contiguous(memory_format=self._format)


class Rivals:
    """PyTorch's contenders, each made when a row first needs it. One that fails is not tried again."""

    def __init__(self, weights: Path, compiled: bool, batches: Sequence[int]) -> None:
        self._weights, self._compiled, self._batches = weights, compiled, batches
        self._made: dict[str, Any] = {}
        self._failed: dict[str, str] = {}

    def turns(
        self, engine: Backend, bundle: Bundle, crops: np.ndarray, *, rounds: int, until: float
    ) -> dict[str, dict[str, Any]]:
        """Of an engine, by batch: `rounds`, `images/s`, `latency ms`, and the same of each rival, or why it has
        `failed`.

        Args:
            engine: of the bundle, opened.
            bundle: with its reference weights.
            crops: uint8 `[n, height, width, 3]`, repeated to fill a batch.
            rounds: to be counted.
            until: of `time.monotonic()`: after it there are no more rounds than the fewest.
        """
        own = bundle.manifest.precision if bundle.manifest.precision in DTYPES else "fp16"
        names = list(dict.fromkeys([REFERENCE, f"torch {own}", *([f"torch_compile {own}"] if self._compiled else [])]))
        batches = {size: crops[np.arange(size) % len(crops)] for size in self._batches}
        found: dict[tuple[str, int], list[Times]] = {}
        for turn in range(rounds + 1):
            if turn > FEWEST_ROUNDS and time.monotonic() > until:
                break
            for size, batch in batches.items():
                taken = {"": Times.of(engine, batch)}
                taken |= {name: times for name in names if (times := self._times(name, bundle, batch))}
                for name, times in taken.items() if turn else ():
                    found.setdefault((name, size), []).append(times)
        return {str(size): self._summary(found, size, names) for size in self._batches}

    def _times(self, name: str, bundle: Bundle, batch: np.ndarray) -> Times | None:
        """None: it has failed."""
        if name in self._failed:
            return None
        try:
            if name not in self._made:
                self._made[name] = self._make(name, bundle)
            return Times.of(self._made[name], batch)
        except Exception as error:  # the engine's times are worth having without it
            self._failed[name] = sentence(error)
            return None

    def _make(self, name: str, bundle: Bundle) -> Any:
        if name == REFERENCE:
            return Embedder.open_reference(bundle).backend
        how, _, precision = name.partition(" ")
        return TorchRival(self._weights, bundle.manifest.flip, precision, how == "torch_compile")

    def _summary(self, found: dict[tuple[str, int], list[Times]], size: int, names: list[str]) -> dict[str, Any]:
        own = found["", size]
        rivals: dict[str, dict[str, Any]] = {}
        for name in names:
            if name in self._failed:
                rivals[name] = {"failed": self._failed[name]}
            else:
                theirs = found[name, size]
                times = statistics.median(one.rate / other.rate for one, other in zip(own, theirs, strict=True))
                rivals[name] = {**_medians(theirs), "x": round(times, 3)}
        return {"rounds": len(own), **_medians(own), "rivals": rivals}


class Times(NamedTuple):
    """Of one round at one batch size: images/s, and seconds of single calls."""

    rate: float
    latencies: list[float]

    @classmethod
    def of(cls, backend: Any, batch: np.ndarray) -> Times:
        start = time.perf_counter()
        for _ in backend.stream(repeat(batch, CALLS)):
            pass
        rate = CALLS * len(batch) / (time.perf_counter() - start)
        latencies = []
        for _ in range(CALLS):
            start = time.perf_counter()
            backend(batch)
            latencies.append(time.perf_counter() - start)
        return cls(rate, latencies)


def _medians(rounds: list[Times]) -> dict[str, float]:
    latencies = [one for times in rounds for one in times.latencies]
    rate = statistics.median(times.rate for times in rounds)
    return {"images/s": round(rate, 2), "latency ms": round(1e3 * statistics.median(latencies), 4)}
