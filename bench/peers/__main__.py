"""Other ways to run the same network: `python -m mgn_deploy.bench.peers --bundle B... --images DIR --out FILE`.

All of a bundle run over the same crops, once a round in random order. The quantising ones need `--calib DIR`, and our
INT8 beside them `--int8 BUNDLE` of the same weights. Whether the mirror is averaged is the bundle's, in all alike: give
one of each kind for both tables.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.bench.contenders import read_images
from mgn_deploy.bench.environment import Meter, cpu, environment, sentence
from mgn_deploy.bench.peers.ways import OURS, OURS_FROM_FILES, PEERS, Given, Peer, Run
from mgn_deploy.bench.timing import in_turns, median_ratio, spread
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.console import in_one_sentence, show_log
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.proof.agreement import cosines
from mgn_deploy.files import write_text

ROUNDS = 30


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the JSON; 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m mgn_deploy.bench.peers", description=__doc__)
    parser.add_argument("--bundle", type=Path, nargs="+", required=True, help="float32 bundles with reference weights")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="the JSON")
    parser.add_argument("--int8", type=Path, nargs="*", default=(), help="our INT8 bundles of the same weights")
    parser.add_argument("--calib", type=Path, help="folder of images to quantise on")
    parser.add_argument("--calib-count", type=int, default=300, help="of them (300, as NNCF takes)")
    parser.add_argument("--batch", type=int, default=8, help="images a call, of those that take batches (8)")
    parser.add_argument("--count", type=int, default=64, help="images a run (64)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all rounds (10); opening comes before")
    parser.add_argument("--peers", default="", help="only those with one of these words, as in nncf,compile")
    show_log()
    chosen = parser.parse_args(arguments)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: before PyTorch is loaded
    wanted = chosen.peers.lower().split(",")
    peers = [peer for peer in PEERS if peer.name == OURS or any(word in peer.name.lower() for word in wanted)]
    machine = {"machine": cpu(), "environment": environment().model_dump(mode="json")}
    try:
        models = [run(chosen, Bundle.open(folder), peers) for folder in chosen.bundle]
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result = {"bench": "peers", "schema_version": 1, **machine, "models": models}
    write_text(chosen.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    for model in models:
        print(model["model"])
        for row in model["rows"]:
            rate = row.get("images_per_second", {}).get("median")
            print(f"{row['peer']}: " + (f"{rate:.1f} images/s" if rate else row.get("left_out") or row["failed"]))
    return 0


def run(chosen: argparse.Namespace, bundle: Bundle, peers: Sequence[Peer]) -> dict[str, Any]:
    """Open every peer of a bundle, and run them in turns.

    Raises:
        UserError: no images, or no reference weights.
    """
    config, manifest = bundle.config, bundle.manifest
    images = read_images(chosen.images, config.height, config.width, chosen.count, chosen.batch)
    calibration = chosen.calib and read_images(chosen.calib, config.height, config.width, chosen.calib_count, 1).crops
    expected = Embedder.open_reference(bundle).embed(list(images.crops), batch_size=chosen.batch)
    minutes = chosen.minutes / len(chosen.bundle)

    def network(one: Bundle) -> tuple[str, bool]:
        return one.manifest.source_weights_sha256, one.manifest.flip

    int8 = next((one for one in map(Bundle.open, chosen.int8) if network(one) == network(bundle)), None)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(prefix="mgn-deploy-peers-") as scratch:
        seconds = min(10.0, 60 * minutes / (len(peers) * 6))
        given = Given(bundle, int8, images.paths, images.crops, calibration, chosen.batch, seconds, Path(scratch))
        for peer in peers:
            row = rows[peer.name] = {"peer": peer.name, "remark": peer.remark}
            try:
                way = peer.open(given)
                found = way()  # also warms it up
                if isinstance(found, np.ndarray):
                    row["distance"] = float(1 - cosines(found, expected).mean())
                runs[peer.name] = way
            except CannotRun as reason:
                row["left_out"] = str(reason)
            except Exception as error:  # a peer's own: the others are worth having
                row["failed"] = sentence(error)
        with Meter() as meter:
            tasks = {name: _rate(way, len(images.paths)) for name, way in runs.items()}
            rates = in_turns(tasks, until=time.monotonic() + 60 * minutes, fewest=1, most=ROUNDS, seed=0)
    for name, figures in rates.items():
        rows[name]["images_per_second"] = spread(figures, 3).model_dump()
        if ours := rates.get(OURS_FROM_FILES if "from files" in name else OURS):  # else it was left out
            rows[name]["of_ours"] = median_ratio(figures, ours)
    mirror = f"{'with' if manifest.flip else 'without'} the mirror average"
    return {
        "model": f"{config.backbone} MGN {config.height}x{config.width}, {mirror}, batch {chosen.batch}",
        "bundle_id": bundle.id,
        "mirror": manifest.flip,
        "noise": meter.noise(None).model_dump(),
        "rows": list(rows.values()),
    }


def _rate(run: Run, images: int) -> Callable[[], float]:
    def rate() -> float:
        start = time.perf_counter()
        found = run()
        return found if isinstance(found, float) else images / (time.perf_counter() - start)

    return rate


if __name__ == "__main__":
    with in_one_sentence():
        sys.exit(main())
