"""The service under load beside its bare engine: `python -m mgn_deploy.bench.serve --bundle BUNDLE --images DIR`.

In turns of some seconds, one engine runs full batches of pixels in memory, and callers of a server on this machine each
send one image file after the other. A caller's latency is told apart by the answer's Server-Timing: what is left after
the wait in the queue has to stay below two batches.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from mgn_deploy.embedder import Embedder
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.listing import list_images

_QUEUE = re.compile(r"queue;dur=([\d.]+)")


def bare(embedder: Embedder, pixels: np.ndarray, seconds: float) -> list[float]:
    """Seconds of each call of the engine."""
    calls = []
    end = time.monotonic() + seconds
    while (start := time.monotonic()) < end:
        embedder.backend(pixels)
        calls.append(time.monotonic() - start)
    return calls


class Caller(threading.Thread):
    """Sends images until it is told to stop: (when, latency, wait in the queue) of each, in seconds; and refusals."""

    def __init__(self, address: str, contents: list[bytes], number: int) -> None:
        super().__init__(daemon=True)
        self._netloc, self._contents, self._number = urlsplit(address).netloc, contents, number
        self.stop = threading.Event()
        self.answers: list[tuple[float, float, float]] = []
        self.refused = 0

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._netloc)
        while not self.stop.is_set():
            self._number += 1
            start = time.monotonic()
            connection.request("POST", "/embed", self._contents[self._number % len(self._contents)])
            response = connection.getresponse()
            response.read()
            end = time.monotonic()
            if response.status == 200:
                found = _QUEUE.search(response.headers["server-timing"])
                self.answers.append((end, end - start, float(found[1]) / 1000 if found else 0.0))
            else:
                self.refused += 1
                time.sleep(float(response.headers.get("retry-after", 1)))


def served(address: str, contents: list[bytes], callers: int, seconds: float, settle: float) -> dict[str, float]:
    """The rate and latencies of a server, from `settle` seconds after the first request on."""
    threads = [Caller(address, contents, 7 * number) for number in range(callers)]
    for thread in threads:
        thread.start()
    time.sleep(settle)
    start = time.monotonic()
    time.sleep(seconds)
    end = time.monotonic()
    for thread in threads:
        thread.stop.set()
    for thread in threads:
        thread.join()
    answers = [answer for thread in threads for answer in thread.answers if start <= answer[0] < end]
    latency = np.array([answer[1] for answer in answers])
    own = latency - [answer[2] for answer in answers]
    return {
        "rate": len(answers) / (end - start),
        "p50": float(np.percentile(latency, 50)),
        "p99": float(np.percentile(latency, 99)),
        "p99_beyond_queue": float(np.percentile(own, 99)),
        "refused": sum(thread.refused for thread in threads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder whose first 256 images are sent")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--callers", type=int, help="each sends one image at a time (3 times the batch)")
    parser.add_argument("--seconds", type=float, default=15, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    embedder = Embedder.open(asked.bundle, asked.backend)
    paths = [file.path for file in list_images(asked.images) if file.path][:256]
    contents = [path.read_bytes() for path in paths]
    pixels = np.stack(
        [read_crop(contents[n % len(contents)], embedder.height, embedder.width) for n in range(asked.batch)]
    )
    command = [sys.executable, "-m", "mgn_deploy", "serve", "--bundle", str(asked.bundle), "--port", "0"]
    command += ["--backend", embedder.backend.name, "--batch", str(asked.batch)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout
        address = server.stdout.readline().strip()
        bare(embedder, pixels, 1)
        turns = []
        for _ in range(asked.turns):
            call = statistics.median(bare(embedder, pixels, asked.seconds))
            found = served(address, contents, asked.callers or 3 * asked.batch, asked.seconds, settle=4 * call)
            share, waits = found["rate"] * call / asked.batch, found["p99_beyond_queue"] / call
            turns.append(
                {"batch_seconds": call, "bare_rate": asked.batch / call, **found, "share": share, "batches": waits}
            )
            print({name: round(value, 4) for name, value in turns[-1].items()}, file=sys.stderr)
    finally:
        server.terminate()
        server.wait()
    names = turns[0]
    print(json.dumps({name: round(statistics.median(turn[name] for turn in turns), 4) for name in names}, indent=2))


if __name__ == "__main__":
    main()
