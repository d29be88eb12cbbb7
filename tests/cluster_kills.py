"""Two Ray nodes on this machine, and who kills their workers and removes one of them at random moments."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes with two CPUs each, which this process is connected to."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    session = nodes.head_node.get_session_dir_path()
    try:
        nodes.add_node(num_cpus=2)
        ray.init(nodes.address, log_to_driver=False)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()
        shutil.rmtree(session, ignore_errors=True)


class Killer(threading.Thread):
    """Within it, from the moment that an engine has its first images, something is killed every few tenths of a second.

    Attributes:
        workers: how many processes, which decoded or embedded, were killed.
        nodes: how many nodes were removed with all that was on them.
    """

    def __init__(self, nodes: Any, parts: Path, seed: int, workers: int, nodes_too: int) -> None:
        super().__init__(daemon=True)
        self._cluster, self._parts, self._random = nodes, parts, random.Random(seed)
        self._todo = ["worker"] * workers + ["node"] * nodes_too
        self._random.shuffle(self._todo)
        self._end = threading.Event()
        self.workers = self.nodes = 0

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        while not any(self._parts.glob("*-embed-*")):
            if self._end.wait(0.01):
                return
        for kind in self._todo:
            if self._end.wait(self._random.uniform(0, 0.6)):
                return
            if kind == "node":
                self._remove_node()
            else:
                self._kill_worker()

    def _remove_node(self) -> None:
        self._cluster.remove_node(next(iter(self._cluster.worker_nodes)), allow_graceful=False)
        self.nodes += 1

    def _kill_worker(self) -> None:
        while not (found := self._busy()):
            if self._end.wait(0.01):
                return
        os.kill(self._random.choice(found), signal.SIGKILL)
        self.workers += 1

    def _busy(self) -> list[int]:
        """Processes of this cluster that are within a task of Ray Data, which Ray names them after."""
        raylets = {
            info.process.pid for node in self._cluster.list_all_nodes() for info in node.all_processes.get("raylet", [])
        }
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes()
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):  # it has ended
                continue
            if command.startswith((b"ray::Map", b"ray::_map")) and parent in raylets:
                found.append(int(folder.name))
        return found
