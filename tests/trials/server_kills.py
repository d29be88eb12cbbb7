"""Random kills of the server: `python -m tests.trials.server_kills --bundle BUNDLE --images DIR --kills 30`.

While callers enrol people and `embed` writes the store that the server shows, both processes are killed by SIGKILL at
a random moment and started again. Nothing that was answered may be lost: each enrolment that got its answer is in the
people folder with its images, one that got none is whole or not there, and the store is what one run writes.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np

from mgn_deploy.gallery.maintain import verify
from mgn_deploy.gallery.store import Store
from mgn_deploy.identity.people import People


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mgn_deploy", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def enrol(address: str, images: list[Path], first: int, done: dict[str, int], sent: set[str]) -> None:
    """Enrol people of three images each until the server is gone."""
    with httpx.Client(base_url=address, timeout=60) as client:
        for number in range(first, first + 1_000_000):
            three = [images[(3 * number + index) % len(images)].read_bytes() for index in range(3)]
            sent.add(name := f"person {number}")
            try:
                files = [("image", (str(index), content)) for index, content in enumerate(three)]
                answer = client.post("/enrol", data={"name": name}, files=files)
            except httpx.HTTPError:
                return
            if answer.status_code != 200:
                raise SystemExit(f"{name}: {answer.status_code} {answer.text}")
            done[name] = len(set(three))


def check(people: Path, done: dict[str, int], sent: set[str]) -> None:
    """Raise SystemExit unless everybody who was answered is there, and nobody in part."""
    there = {person.name: person for person in People.open(people).load().people}
    wrong = [name for name, count in done.items() if name not in there or len(there[name].images) != count]
    wrong += [name for name in there if name not in sent]
    norms = [np.linalg.norm(person.embeddings, axis=1) for person in there.values()]
    if wrong or not all(np.allclose(norm, 1, atol=1e-4) for norm in norms):
        raise SystemExit(f"after a kill {len(wrong)} people are wrong: {wrong[:5]} in {people}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    work = Path(tempfile.mkdtemp(prefix="mgn-server-kills-"))
    people, store, images = work / "people", work / "store", sorted(asked.images.glob("*.jpg"))
    embed = ["embed", str(asked.images), "-o", str(store), "--bundle", str(asked.bundle), "--batch", "4"]
    some = ["embed", str(images[0]), "--root", str(asked.images), *embed[2:]]
    start(some).communicate()  # a store for the server to begin with
    serve = f"serve --bundle {asked.bundle} --store {store} --people {people} --port 0".split()
    done: dict[str, int] = {}
    sent: set[str] = set()
    for kill in range(asked.kills):
        server = start(serve)
        assert server.stdout
        address = server.stdout.readline().strip()
        if not address:
            raise SystemExit(f"the server did not start again after {kill} kills: {work}")
        writer = start(embed)
        callers = [
            threading.Thread(target=enrol, args=(address, images, 10_000_000 * kill + 1_000_000 * caller, done, sent))
            for caller in range(3)
        ]
        for caller in callers:
            caller.start()
        time.sleep(rng.uniform(0.1, 4))
        for process in (server, writer):
            process.kill()
            process.communicate()
        for caller in callers:
            caller.join()
        check(people, done, sent)
        print(f"{kill + 1} kills of the server, {len(done)} enrolments answered, all there", flush=True)
    start(embed).communicate()
    found, rows = verify(store), Store.open(store)
    print(json.dumps({"kills": asked.kills, "enrolled": len(done), "lost": 0, "store": found.to_dict()}))
    if found.damaged or sorted(row.name for row in rows) != [path.name for path in images]:
        raise SystemExit(f"the store has {len(rows)} rows of {len(images)} images, or is damaged: {store}")


if __name__ == "__main__":
    main()
