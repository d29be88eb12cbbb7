"""Random kills of workers and nodes: `embed` on a Ray cluster has to write the bytes of one process.

    python -m tests.trials.cluster --kills 20 --images /data/crops --bundle bundle --out cluster.json

Two nodes run on this machine. While each run embeds, processes that decode or embed are killed by SIGKILL at random
moments, and once a run the second node is removed with all that is on it; the next run gets another one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from mgn_deploy.embedder import Embedder
from mgn_deploy.gallery import writer
from mgn_deploy.gallery.cluster import embed_on_cluster
from mgn_deploy.gallery.cluster_connection import Cluster
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_source
from mgn_deploy.gallery.sources import Source
from tests.cluster_kills import Killer, two_nodes
from tests.trials.kills import contents

SHARD_ROWS = 32  # so that some hundred images are many parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--most", type=int, default=600, help="images of the folder")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    writer.SHARD_ROWS = SHARD_ROWS
    source = open_source(arguments.images)
    source.files = source.files[: arguments.most]
    with tempfile.TemporaryDirectory(prefix="mgn-cluster-") as folder, two_nodes() as nodes:
        embed_folder(source, f"{folder}/one", Embedder.open(arguments.bundle, "onnxruntime"))
        expected = contents(Path(folder, "one"))
        runs: list[dict[str, Any]] = []
        while sum(run["workers"] + run["nodes"] for run in runs) < arguments.kills:
            if not nodes.worker_nodes:
                nodes.add_node(num_cpus=2)
            runs.append(
                disturbed(source, Path(folder, f"many-{len(runs)}"), arguments.bundle, nodes, len(runs), expected)
            )
            print(json.dumps(runs[-1]), flush=True)
            arguments.out.write_text(json.dumps({"images": len(source.files), "runs": runs}, indent=1) + "\n")
    if not all(run["same"] for run in runs):
        raise SystemExit("a store differs from that of one process")


def disturbed(
    source: Source, store: Path, bundle: Path, nodes: Any, seed: int, expected: dict[str, str]
) -> dict[str, Any]:
    """One run under kills: how many there were, and whether every file is as expected."""
    start = time.monotonic()
    with Killer(nodes, store / "parts", seed, workers=6, nodes_too=1) as killer:
        embed_on_cluster(source, store, bundle, Cluster("auto", (1, 4)), backend="onnxruntime")
    return {
        "workers": killer.workers,
        "nodes": killer.nodes,
        "seconds": round(time.monotonic() - start, 1),
        "same": contents(store) == expected,
    }


if __name__ == "__main__":
    main()
