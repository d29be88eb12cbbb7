"""Search, index and re-ranking as a gallery grows: `python -m mgn_deploy.bench.growth 10000 100000 1000000`.

Galleries are float16 stores of drawn people on disk, made under --folder and removed afterwards (4.1 GB for a million
rows of 2048). Each measurement is in a process of its own, as in `bench/retrieval.py`. Prints JSON; --plot draws it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mgn_deploy.bench.environment import cpu
from mgn_deploy.bench.retrieval import IMAGES_A_PERSON, drawn_people, in_own_process, measured
from mgn_deploy.console import in_one_sentence

if TYPE_CHECKING:
    from mgn_deploy.gallery.store import Store

QUERIES, K = 100, 10
WRITTEN_ROWS = 15_000  # drawn at a time, whole people
TASKS = ("search", "index", "rerank")


def write_store(folder: Path, images: int, dim: int) -> None:
    """A float16 store of drawn people; those of one block are none of another's."""
    from mgn_deploy.gallery.manifest import StoreManifest
    from mgn_deploy.gallery.row import Row
    from mgn_deploy.gallery.writer import StoreWriter

    manifest = StoreManifest(
        bundle_id="0" * 64, backend="drawn", preprocessing="none", dim=dim, dtype="float16", source=folder.as_uri()
    )
    with StoreWriter(folder, manifest) as writer:
        for start in range(0, images, WRITTEN_ROWS):
            rows, people = drawn_people(min(WRITTEN_ROWS, images - start), dim, seed=start)
            people += start // IMAGES_A_PERSON
            names = [Row(f"{start + n}.jpg", 1, 1, None, int(who), n % 6) for n, who in enumerate(people)]
            writer.add(names, rows.astype(np.float16))


def run(task: str, folder: Path) -> dict[str, Any]:
    """One measurement of a store in this process."""
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.retrieval.nearest import top_k
    from mgn_deploy.retrieval.rerank import rerank_top_k

    store = Store.open(folder)
    asked = store.take(np.linspace(0, len(store) - 1, QUERIES, dtype=np.int64)).astype(np.float32)
    tasks = {
        "search": lambda: top_k(asked, store, K),
        "index": lambda: build_and_search(asked, store, folder.parent),
        "rerank": lambda: rerank_top_k(asked, store.embeddings(), K),
    }
    found, figures = measured(tasks[task])
    return {"task": task, "images": len(store), **figures, **(found if task == "index" else {})}


def build_and_search(asked: np.ndarray, store: Store, folder: Path) -> dict[str, Any]:
    """An index's kind and recall, and the seconds that building and searching it take."""
    from mgn_deploy.index.build import build_index, open_index

    with tempfile.TemporaryDirectory(dir=folder) as beside:
        start = time.perf_counter()
        made = build_index(store, f"{beside}/index")
        built = time.perf_counter()
        with open_index(f"{beside}/index", store) as candidates:
            opened = time.perf_counter()
            candidates(asked, K)
            seconds = {"build_seconds": built - start, "search_seconds": time.perf_counter() - opened}
    return {"kind": made.kind, "recall_at_10": made.recall_at_10, **seconds}


def exponent(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """CPU seconds = a N^b, fitted to the two largest galleries; what that gives for 500,000 images. Not measured."""
    if len(rows) < 2:
        return None
    (n, s), (more, t) = sorted((row["images"], row["cpu_seconds"]) for row in rows)[-2:]
    power = float(np.log(t / s) / np.log(more / n))
    return {"exponent": power, "cpu_seconds_at_500000": t * (500_000 / more) ** power}


def measure(sizes: list[int], dim: int, largest: dict[str, int], folder: Path) -> dict[str, Any]:
    """Every task at every size, one after the other; JSON-ready."""
    rows = []
    for images in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            write_store(Path(made) / "store", images, dim)
            for task in TASKS:
                if images > largest.get(task, images):
                    continue
                rows.append(in_own_process(run, task, Path(made) / "store"))
                print(json.dumps(rows[-1]), file=sys.stderr)  # what a run that is stopped has found
    reranked = [row for row in rows if row["task"] == "rerank"]
    asked = {"machine": cpu(), "dim": dim, "queries": QUERIES, "k": K}
    return {**asked, "rows": rows, "rerank_extrapolated": exponent(reranked)}


def plot(found: dict[str, Any], path: Path) -> None:
    """CPU seconds and peak memory over the number of images, both logarithmic (.svg or .png)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("cpu_seconds", "gigabytes"), strict=True):
        for task in TASKS:
            points = sorted((row["images"], row[key]) for row in found["rows"] if row["task"] == task)
            axes.loglog(*zip(*points, strict=True), "o-", label=task)
        axes.set(xlabel="images", ylabel=key.replace("_", " "))
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=[10_000, 100_000], help="images of each gallery")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--largest-rerank", type=int, default=100_000, help="time grows with the square")
    parser.add_argument("--largest-index", type=int, default=100_000, help="HNSW takes hours for a million")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where stores are made")
    parser.add_argument("--plot", type=Path, help="a figure to draw of it")
    given = parser.parse_args(arguments)
    largest = {"rerank": given.largest_rerank, "index": given.largest_index}
    found = measure(given.sizes, given.dim, largest, given.folder)
    print(json.dumps(found, indent=2))
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    with in_one_sentence():
        main()
