"""The processes of one run: a single one, or those that `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist

from mgn_deploy.choices import Device
from mgn_deploy.errors import UserError

T = TypeVar("T")


class Group:
    """A context manager that joins torchrun's process group, where there is one.

    The process is number `rank` of `ranks` and computes on `device`.
    """

    def __init__(self, device: Device = "auto") -> None:
        """Choose the process's device: with several CUDA devices the one of its local rank.

        Raises:
            UserError: cuda was asked for and there is none.
        """
        if device not in get_args(Device):
            raise UserError(f"--device {device}: choose {', '.join(get_args(Device))}")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
        cuda = device != "cpu" and torch.cuda.is_available()
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Tell whether this is the process that writes files and logs."""
        return self.rank == 0

    def agree(self, value: float) -> float:
        """Return rank 0's value on every rank."""
        if self.ranks == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared.item())

    def first_does(self, work: Callable[[], T]) -> T:
        """Do on rank 0 what is to be done once, and return its result on every rank.

        Raises:
            UserError: rank 0's, on every rank.
        """
        if self.ranks == 1:
            return work()
        outcome: list[Any] = [None]
        if self.is_first:
            try:
                outcome = [work()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        result: T = outcome[0]
        return result

    def __enter__(self) -> Group:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.ranks > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, *_: object) -> None:
        if self.ranks > 1:
            dist.destroy_process_group()
