"""Finding a dataset's root where the folder that was given is a level too high or too low."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mgn_deploy.errors import UserError


def find_root(given: str | os.PathLike[str], is_root: Callable[[Path], bool], layout: str) -> Path:
    """Find the folder that has the layout: `given` itself, or else the only one of its parent and its own folders.

    Args:
        given: the folder that the user named.
        is_root: whether a folder has the layout.
        layout: what such a folder holds, for error messages.

    Raises:
        UserError: `given` is not a folder that may be listed, or no folder or several have the layout.
    """
    given = Path(given)
    if not os.path.isdir(given):  # False, too, for what may not be looked at; Path.is_dir raises
        raise UserError(f"{given} is not a folder: give the one that holds {layout}")
    if is_root(given):
        return given
    inside = [path for path in list_folder(given) if os.path.isdir(path) and not path.name.startswith(".")]
    above = Path(os.path.abspath(given)).parent
    candidates = [folder for folder in (above, *inside) if is_root(folder)]
    if len(candidates) > 1:
        raise UserError(f"{given} could mean {' or '.join(map(str, candidates))}: give the one that is meant")
    if not candidates:
        raise UserError(f"{given} does not hold {layout}; neither does the folder above it nor one in it")
    return candidates[0]


def list_folder(folder: Path) -> list[Path]:
    """List what a folder holds, in the order of the names' bytes.

    Raises:
        UserError: it may not be read.
    """
    try:
        return sorted(folder.iterdir(), key=lambda path: os.fsencode(path.name))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}): see who may read it") from None
