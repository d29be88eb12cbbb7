"""Retrieval beside its peers: `python -m mgn_deploy.bench.retrieval`, by default at Market-1501's size.

Each contender runs in a process of its own, which says how long it took and how much memory it had at most beyond the
embeddings and its imports (Linux only). Embeddings are drawn: people's centres and noise, unit rows. torchreid's
re-ranking is run from its file (`pip install --no-deps torchreid`; the package itself imports much that is not needed),
where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.bench.environment import PeakMemory, cpu
from mgn_deploy.console import in_one_sentence

IMAGES_A_PERSON = 15
WARM_UP = 400  # images of a run before the one that is measured


def drawn_people(images: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings float32 `[images, dim]`, unit rows, and whose they are, int64 `[images]`."""
    rng = np.random.default_rng(seed)
    people = rng.integers(0, max(1, images // IMAGES_A_PERSON), images)
    rows = rng.standard_normal((people.max() + 1, dim), np.float32)[people]
    rows += rng.standard_normal((images, dim), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), people


def matrix_product(query: np.ndarray, gallery: np.ndarray, people: np.ndarray) -> np.ndarray:
    """NumPy's own, to compare the others with."""
    return query @ gallery.T


def distances(query: np.ndarray, gallery: np.ndarray, people: np.ndarray) -> np.ndarray:
    """`distance_matrix`."""
    from mgn_deploy.retrieval.distance import distance_matrix

    return distance_matrix(query, gallery)


def nearest(query: np.ndarray, gallery: np.ndarray, people: np.ndarray) -> np.ndarray:
    """The ten nearest by FAISS."""
    from mgn_deploy.retrieval.nearest import top_k

    return top_k(query, gallery, 10)[1]


def figures(query: np.ndarray, gallery: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Distances and metrics together, without a matrix in memory."""
    from mgn_deploy.retrieval.evaluation import score_embeddings
    from mgn_deploy.retrieval.truth import Truth

    cameras = np.arange(len(people)) % 6
    split = len(query)
    truth = Truth(people[:split], cameras[:split], people[split:], cameras[split:])
    return np.array([score_embeddings(query, gallery, truth).metrics.mAP])


def reranked(query: np.ndarray, gallery: np.ndarray, people: np.ndarray) -> np.ndarray:
    """k-reciprocal re-ranking, ours."""
    from mgn_deploy.retrieval.rerank import rerank

    return rerank(query, gallery)


def reranked_by_torchreid(query: np.ndarray, gallery: np.ndarray, people: np.ndarray) -> np.ndarray:
    """torchreid's, which takes Euclidean distances."""
    from mgn_deploy.retrieval.distance import distance_matrix

    re_ranking = runpy.run_path(str(torchreid_file()))["re_ranking"]
    pairs = (query, gallery), (query, query), (gallery, gallery)
    return re_ranking(*(distance_matrix(left, right, "euclidean") for left, right in pairs))


CONTENDERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    function.__name__: function
    for function in (matrix_product, distances, nearest, figures, reranked, reranked_by_torchreid)
}


def torchreid_file() -> Path | None:
    """Where torchreid's re-ranking is installed, or None."""
    spec = find_spec("torchreid")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for name in ("reid/utils/rerank.py", "utils/rerank.py"):
            if (Path(folder) / name).is_file():
                return Path(folder) / name
    return None


def run(name: str, queries: int, images: int, dim: int) -> dict[str, Any]:
    """Run one contender in this process; its figures, and of a re-ranking in `found` what it gives."""
    rows, people = drawn_people(images, dim)
    few, whose = drawn_people(WARM_UP, dim)
    CONTENDERS[name](few[: WARM_UP // 4], few[WARM_UP // 4 :], whose)  # imports and threads
    found, figures = measured(lambda: CONTENDERS[name](rows[:queries], rows[queries:], people))
    return {"contender": name, **figures, **({"found": found} if name.startswith("reranked") else {})}


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call gives; its seconds by the clock and of CPU, and the gigabytes that it had at most beyond what was
    there."""
    with PeakMemory() as peak:
        start, cpu_start = time.perf_counter(), time.process_time()
        found = call()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return found, {"seconds": seconds, "cpu_seconds": cpu_seconds, "gigabytes": peak.host / 1e9}


def in_own_process(call: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What a function of a module returns, and in `load` the machine's load average (1 minute) as it began: beyond 0.2
    others were at work, too."""
    load = os.getloadavg()[0]
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return {**process.submit(call, *arguments).result(), "load": round(load, 2)}


def measure(names: list[str], queries: int, images: int, dim: int, rounds: int = 1) -> dict[str, Any]:
    """Run contenders one after the other, each in a process, several times in turn; JSON-ready."""
    rows = [in_own_process(run, name, queries, images, dim) for name in names * rounds]
    kept = {row["contender"]: row.pop("found", None) for row in rows}
    largest, share = None, None
    if {"reranked", "reranked_by_torchreid"} <= set(names):
        apart = np.abs(kept["reranked"] - kept["reranked_by_torchreid"])
        largest, share = float(apart.max()), float((apart > 1e-5).mean())
    return {
        "machine": cpu(),
        "queries": queries,
        "gallery": images - queries,
        "dim": dim,
        "rows": rows,
        "median_seconds": {
            name: statistics.median(row["seconds"] for row in rows if row["contender"] == name) for name in names
        },
        # Where rounding turns a near tie of neighbours, sets differ by an image.
        "largest_difference_of_re_rankings": largest,
        "share_of_re_rankings_beyond_1e-5": share,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=CONTENDERS, help="which; by default all that can run")
    parser.add_argument("--queries", type=int, default=3368)
    parser.add_argument("--images", type=int, default=23_100, help="queries and gallery together")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1, help="how often each contender runs, in turn")
    given = parser.parse_args(arguments)
    every = [name for name in CONTENDERS if name != "reranked_by_torchreid" or torchreid_file()]
    print(json.dumps(measure(given.names or every, given.queries, given.images, given.dim, given.rounds), indent=2))


if __name__ == "__main__":
    with in_one_sentence():
        main()
