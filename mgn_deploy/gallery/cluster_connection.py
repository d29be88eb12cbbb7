"""The Ray cluster to embed on: how it is reached, and what is raised there."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.machine import usable_cpus
from mgn_deploy.packages import require

LOCAL = "local"
CLIENT = "ray://"


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster to embed on.

    Attributes:
        address: `ray://HOST:PORT`, `auto` (the cluster that this machine is in), or `local` (one of this machine alone,
            which ends with the run).
        workers: the least and most engines; None: one, up to as many as the cluster has GPUs or, without any, nodes.
    """

    address: str
    workers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.address not in ("auto", LOCAL) and not self.address.startswith(CLIENT):
            raise UserError(f"--cluster {self.address}: give ray://HOST:PORT, auto or local")
        if self.workers is not None and not 1 <= self.workers[0] <= self.workers[1]:
            raise UserError(f"{self.workers[0]} to {self.workers[1]} workers: give the least, 1 or more, and the most")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray, connected to the cluster; a program that is connected already stays so."""
    require("ray.data", "ray", "--cluster embeds through Ray Data")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what went wrong is raised
    import ray

    if ray.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mgn-ray-", ignore_cleanup_errors=True) as folder:
        try:
            if address == LOCAL:
                # Only this machine reaches its ports: whoever does may run programs.
                ray.init(
                    LOCAL, num_cpus=usable_cpus(), include_dashboard=False, log_to_driver=False,
                    logging_level=logging.ERROR, _node_ip_address="127.0.0.1", _temp_dir=folder,
                )  # fmt: skip
            else:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, ImportError, RuntimeError) as error:
            raise UserError(f"--cluster {address}: no Ray cluster answers there ({error})") from None
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def explained() -> Iterator[None]:
    """What is raised on a worker, as it would be here; Ray Data says nothing on the way."""
    import ray

    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except ray.exceptions.RayError as error:
        raised: BaseException | None = error
        while raised is not None:
            if isinstance(raised, (UserError, CannotRun)):
                raise raised from None
            raised = getattr(raised, "cause", None) or raised.__cause__
        last = str(error).strip().splitlines()[-1]  # of the worker's trace: Ray keeps no cause of what a map raises
        raise UserError(f"the cluster ended the run, and the same command goes on from there: {last}") from error
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)
