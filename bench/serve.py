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
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle, islice
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from mgn_deploy.bench.contenders import Images, read_images
from mgn_deploy.bench.timing import calls
from mgn_deploy.console import in_one_sentence
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError

Answer = tuple[float, float, float]  # when it came, its latency, its wait in the queue, in seconds
_QUEUE = re.compile(r"queue;dur=([\d.]+)")
_CPU = re.compile(rb"^process_cpu_seconds_total (\S+)", re.MULTILINE)


def call(address: str, contents: list[bytes], first: int, until: float) -> list[Answer]:
    """Send images one after the other, until then (of `time.monotonic()`); a refusal counts as no answer."""
    connection, answers = http.client.HTTPConnection(urlsplit(address).netloc), list[Answer]()
    for content in islice(cycle(contents), first, None):
        start = time.monotonic()
        if start > until:
            break
        connection.request("POST", "/embed", content)
        response = connection.getresponse()
        response.read()
        end = time.monotonic()
        queued = _QUEUE.search(response.headers.get("server-timing", ""))
        if response.status == 200 and queued:
            answers.append((end, end - start, float(queued[1]) / 1000))
    return answers


def served(address: str, contents: list[bytes], callers: int, seconds: float) -> dict[str, float]:
    """The rate and latencies of a server, its first batches left out."""
    cpu, until = cpu_seconds(address), time.monotonic() + seconds
    with ThreadPoolExecutor(callers) as pool:
        each = pool.map(lambda number: call(address, contents, 7 * number, until), range(callers))
    answers = sorted(chain.from_iterable(each))
    cpu = cpu_seconds(address) - cpu
    counted = steady(answers, callers)
    latency, queue = np.array([answer[1:] for answer in counted]).T
    return {
        "rate": (len(counted) - 1) / (counted[-1][0] - counted[0][0]), "served_cpu": cpu / len(answers),
        "p50": float(np.percentile(latency, 50)), "p99": float(np.percentile(latency, 99)),
        "p99_beyond_queue": float(np.percentile(latency - queue, 99)),
    }  # fmt: skip


def steady(answers: list[Answer], callers: int) -> list[Answer]:
    """Those from one batch's end to another's, while every caller was waiting."""
    counted = answers[callers:-callers]
    if len(counted) < 2:
        raise UserError(f"{len(answers)} answers to {callers} callers are too few for a rate: --seconds must be longer")
    return counted


def cpu_seconds(address: str) -> float:
    connection = http.client.HTTPConnection(urlsplit(address).netloc)  # of this machine, whatever proxies are set
    connection.request("GET", "/metrics")
    found = _CPU.search(connection.getresponse().read())
    connection.close()
    return float(found[1]) if found else float("nan")


def turn(embedder: Embedder, images: Images, batch: int, address: str, seconds: float) -> dict[str, float]:
    """The engine's median seconds a call and its seconds of CPU an image, then what its server does, and the shares."""
    start = time.process_time()
    took = calls(lambda: embedder.backend(images.crops[:batch]), seconds)
    cpu = time.process_time() - start
    one = {"batch_seconds": statistics.median(took), "bare_cpu": cpu / len(took) / batch}
    one |= served(address, images.encoded, 3 * batch, seconds)
    one["share"] = one["rate"] * one["batch_seconds"] / batch
    one["cpu_share"] = one["bare_cpu"] / one["served_cpu"]
    one["batches_beyond_queue"] = one["p99_beyond_queue"] / one["batch_seconds"]
    return one


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
        try:
            address = server.stdout.readline().strip()
            turns = [turn(embedder, images, batch, address, asked.seconds) for _ in range(asked.turns)]
        finally:
            server.terminate()
    medians = {name: statistics.median(one[name] for one in turns) for name in turns[0]}
    print(json.dumps({"backend": embedder.backend.name, "medians": medians, "turns": turns}, indent=2))


if __name__ == "__main__":
    with in_one_sentence():
        main()
