"""Other ways to run the same network: `python -m mgn_deploy.bench.peers --bundle B --images DIR --out FILE`.

All run over the same crops, once a round in random order, for `--minutes`. The quantising ones need `--calib DIR`, and
our INT8 beside them `--int8 BUNDLE` of the same weights. Whether the mirror is averaged is the bundle's: in all alike.
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
from mgn_deploy.bench.timing import in_turns, spread
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.console import show_log
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.proof.agreement import cosines
from mgn_deploy.files import atomic_file

ROUNDS = 30


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the JSON; 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m mgn_deploy.bench.peers", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a float32 bundle with its reference weights")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="the JSON")
    parser.add_argument("--int8", type=Path, help="our INT8 bundle of the same weights")
    parser.add_argument("--calib", type=Path, help="folder of images to quantise on")
    parser.add_argument("--calib-count", type=int, default=300, help="of them (300, as NNCF takes)")
    parser.add_argument("--batch", type=int, default=8, help="images a call, of those that take batches (8)")
    parser.add_argument("--count", type=int, default=64, help="images a run (64)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the rounds; opening and quantising come before")
    parser.add_argument("--peers", help="only those whose names have one of these words, as in nncf,compile")
    show_log()
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: before PyTorch is loaded
    wanted = [word.lower() for word in (chosen.peers or "").split(",")]
    peers = [peer for peer in PEERS if peer.name == OURS or any(word in peer.name.lower() for word in wanted)]
    try:
        result = run(chosen, peers)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    with atomic_file(chosen.out) as file:
        file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
    for row in result["rows"]:
        rate = row.get("images_per_second", {}).get("median")
        print(f"{row['peer']}: " + (f"{rate:.1f} images/s" if rate else row.get("left_out") or row["failed"]))
    return 0


def run(chosen: argparse.Namespace, peers: Sequence[Peer]) -> dict[str, Any]:
    """Open every peer, and run them in turns.

    Raises:
        UserError: no bundle, or no images.
    """
    bundle = Bundle.open(chosen.bundle)
    size = bundle.config.height, bundle.config.width
    images = read_images(chosen.images, *size, chosen.count, chosen.batch)
    calibration = read_images(chosen.calib, *size, chosen.calib_count, 1).crops if chosen.calib else None
    expected = Embedder.open_reference(bundle).embed(list(images.crops), batch_size=chosen.batch)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(prefix="mgn-deploy-peers-") as scratch:
        seconds = 60 * chosen.minutes / (len(peers) * 6)
        int8 = Bundle.open(chosen.int8) if chosen.int8 else None
        given = Given(
            bundle, int8, images.paths, images.crops, calibration, chosen.batch, min(seconds, 10.0), Path(scratch)
        )
        for peer in peers:
            rows[peer.name] = {"peer": peer.name, "remark": peer.remark}
            try:
                runs[peer.name] = peer.open(given)
                found = runs[peer.name]()  # also warms it up
                if isinstance(found, np.ndarray):
                    rows[peer.name]["distance"] = float(1 - cosines(found, expected).mean())
            except CannotRun as reason:
                rows[peer.name]["left_out"] = str(reason)
            except Exception as error:  # a peer's own: the others are worth having
                rows[peer.name]["failed"] = sentence(error)
            if "left_out" in rows[peer.name] or "failed" in rows[peer.name]:
                runs.pop(peer.name, None)
        with Meter() as meter:
            tasks = {name: _rate(run, len(images.paths)) for name, run in runs.items()}
            rates = in_turns(tasks, until=time.monotonic() + 60 * chosen.minutes, fewest=1, most=ROUNDS, seed=0)
    for name, figures in rates.items():
        ours = rates.get(OURS_FROM_FILES if "from files" in name else OURS, figures)
        ratios = [one / other for one, other in zip(figures, ours, strict=True)]
        rows[name] |= {
            "images_per_second": spread(figures, 3).model_dump(),
            "of_ours": round(float(np.median(ratios)), 4),
        }
    config = bundle.config
    mirror = f"{'with' if bundle.manifest.flip else 'without'} the mirror average"
    return {
        "bench": "peers",
        "schema_version": 1,
        "model": f"{config.backbone} MGN {config.height}x{config.width}, {mirror}, batch {chosen.batch}",
        "bundle_id": bundle.id,
        "mirror": bundle.manifest.flip,
        "machine": cpu(),
        "environment": environment().model_dump(mode="json"),
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
    sys.exit(main())
