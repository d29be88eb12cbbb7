"""Memory that is not there, told with what to change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from mgn_deploy.errors import UserError

CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container
KEYS = "a smaller network (model.base_width, branches, reduced_width)"


def require_memory(model: nn.Module, copies: int) -> None:
    """Refuse a model that this machine cannot hold, rather than be killed for it.

    Args:
        model: of any device, "meta" too.
        copies: how often its parameters are held: with gradients, and what the optimizer gathers.

    Raises:
        UserError: all of the machine's memory, or its container's, is less than that.
    """
    needed = copies * sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such file outside of containers, or "max" in it
        memory = min(memory, int(CGROUP.read_text()))
    if needed > memory:
        raise UserError(
            f"this model takes {needed / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f}: choose {KEYS}"
        )


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turn what PyTorch and Python raise when they get no memory into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            "the memory does not hold this: give smaller batches (batch.identities or batch.images, with "
            f"batch.accumulate to make up for it), smaller images (model.height, width), or {KEYS}"
        ) from error
