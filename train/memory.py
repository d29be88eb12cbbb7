"""Memory that is not there, told with what to change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from mgn_deploy.errors import UserError

CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container
CHOOSE = (
    "choose smaller batches (batch.identities or batch.images, with batch.accumulate to make up for it), smaller "
    "images (model.height, width) or a smaller network (model.base_width, branches, reduced_width)"
)


def require_memory(needed: int) -> None:
    """Refuse what this machine, or its container, surely cannot hold, rather than be killed for it.

    Args:
        needed: a lower bound, in bytes.

    Raises:
        UserError: all of the memory is less than that.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such file outside of containers, or "max" in it
        memory = min(memory, int(CGROUP.read_text()))
    if needed > memory:
        raise UserError(
            f"this takes {needed / 2**30:.1f} GiB of memory or more, and there are {memory / 2**30:.1f} here: {CHOOSE}"
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
        raise UserError(f"the memory does not hold this: {CHOOSE}") from error
