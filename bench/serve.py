"""The service under load beside its bare engine: `python -m mgn_deploy.bench.serve --bundle BUNDLE --images DIR`.

In turns, an engine runs full batches of pixels in memory, and callers of a server on this machine each send one image
file after the other. `share` is the server's rate over the engine's; `cpu_share` the same by seconds of CPU an image,
which other work on the machine disturbs less. What is left of a caller's latency after the wait in the queue, which
the answer tells, is given in batches, too.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np

from mgn_deploy.bench.contenders import read_images
from mgn_deploy.bench.timing import calls
from mgn_deploy.embedder import Embedder

Answer = tuple[float, float, float]  # when it came, its latency, its wait in the queue, in seconds
_QUEUE = re.compile(r"queue;dur=([\d.]+)")
_CPU = re.compile(rb"^process_cpu_seconds_total (\S+)", re.MULTILINE)


def bare(embedder: Embedder, pixels: np.ndarray, seconds: float) -> dict[str, float]:
    """The engine's median seconds a call, and its seconds of CPU an image."""
    start = time.process_time()
    took = calls(lambda: embedder.backend(pixels), seconds)
    cpu = time.process_time() - start
    return {"batch_seconds": statistics.median(took), "bare_cpu": cpu / len(took) / len(pixels)}


def call(netloc: str, contents: list[bytes], first: int, stop: threading.Event, answers: list[Answer]) -> None:
    """Send images until it is told to stop; a refusal counts as no answer."""
    connection = http.client.HTTPConnection(netloc)
    while not stop.is_set():
        start = time.monotonic()
        connection.request("POST", "/embed", contents[(first + len(answers)) % len(contents)])
        response = connection.getresponse()
        response.read()
        end = time.monotonic()
        queued = _QUEUE.search(response.headers.get("server-timing", ""))
        if response.status == 200 and queued:
            answers.append((end, end - start, float(queued[1]) / 1000))


def served(address: str, contents: list[bytes], callers: int, seconds: float) -> dict[str, float]:
    """The rate and latencies of a server, its first batches left out."""
    stop, netloc = threading.Event(), urlsplit(address).netloc
    each: list[list[Answer]] = [[] for _ in range(callers)]
    cpu = cpu_seconds(address)
    with ThreadPoolExecutor(callers) as pool:
        work = [pool.submit(call, netloc, contents, 7 * number, stop, mine) for number, mine in enumerate(each)]
        time.sleep(seconds)
        stop.set()
    for one in work:
        one.result()
    answers = sorted(answer for mine in each for answer in mine)
    cpu = (cpu_seconds(address) - cpu) / len(answers)
    steady = answers[callers:-callers]  # from one batch's end to another's, while every caller was waiting
    latency, queue = np.array([answer[1:] for answer in steady]).T
    return {
        "rate": (len(steady) - 1) / (steady[-1][0] - steady[0][0]), "served_cpu": cpu,
        "p50": float(np.percentile(latency, 50)), "p99": float(np.percentile(latency, 99)),
        "p99_beyond_queue": float(np.percentile(latency - queue, 99)),
    }  # fmt: skip


def cpu_seconds(address: str) -> float:
    found = _CPU.search(urlopen(f"{address}/metrics").read())
    return float(found[1]) if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder whose first 256 images are sent")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    embedder, batch = Embedder.open(asked.bundle, asked.backend), asked.batch
    images = read_images(asked.images, embedder.height, embedder.width, 256, batch)
    command = [sys.executable, "-m", "mgn_deploy", "serve", "--bundle", str(asked.bundle), "--port", "0"]
    command += ["--backend", embedder.backend.name, "--batch", str(batch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        address = server.stdout.readline().strip()
        turns: list[dict[str, float]] = []
        for _ in range(asked.turns):
            one = bare(embedder, images.crops[:batch], asked.seconds)
            one |= served(address, images.encoded, 3 * batch, asked.seconds)
            one["share"] = one["rate"] * one["batch_seconds"] / batch
            one["cpu_share"] = one["bare_cpu"] / one["served_cpu"]
            one["batches_beyond_queue"] = one["p99_beyond_queue"] / one["batch_seconds"]
            turns.append(one)
        server.terminate()
    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    print(json.dumps({"backend": embedder.backend.name, "medians": medians, "turns": turns}, indent=2))


if __name__ == "__main__":
    main()
