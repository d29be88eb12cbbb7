"""What a run was started with, and the sentences that say how another start differs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError, first_names
from mgn_deploy.files import sha256_bytes
from mgn_deploy.train.prepare import Prepared
from mgn_deploy.train.recipe import Recipe

_log = logging.getLogger("mgn_deploy")

# Keys that a run may go on with another value of: they decide when it ends and is looked at, not what a step is.
FREE = ("schedule.epochs", "schedule.max_seconds", "loop.evaluate_every")


@dataclass(frozen=True)
class Started:
    """What decides a run's weights.

    `recipe` is by "table.key", `model` the config, `ranks` the number of processes, `images` and `people` are those of
    `Prepared`, and `evaluation` is a hash of what is evaluated on (which decides only `best`).
    """

    recipe: dict[str, Any]
    model: dict[str, Any]
    ranks: int
    images: dict[str, list[int | str]]
    people: list[int | str]
    evaluation: str

    @classmethod
    def of(cls, recipe: Recipe, config: ModelConfig, ranks: int, prepared: Prepared) -> Started:
        """Put together what a run is started with."""
        tables = recipe.model_dump(mode="json")
        root, data = prepared.data.root, prepared.data
        evaluated = sorted((os.path.relpath(one.path, root), one.identity) for one in (*data.query, *data.gallery))
        return cls(
            {f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()},
            config.model_dump(mode="json"),
            ranks,
            prepared.facts,
            prepared.people,
            sha256_bytes(repr(evaluated).encode("utf-8", "surrogateescape")),
        )


def require_same(folder: Path, before: Started, now: Started, allow_data_change: bool = False) -> None:
    """Refuse to go on with another recipe, other images or another number of processes.

    Args:
        folder: the run's, for the sentence.
        before, now: what the run was started with, and what it is to go on with.
        allow_data_change: other images are a warning.

    Raises:
        UserError: the sentence names each key with both values, or the first files of each kind of difference.
    """
    changed = {key: value for key, value in now.recipe.items() if before.recipe.get(key, value) != value}
    told = [f"{key} was {before.recipe[key]!r} and is {value!r}" for key, value in changed.items() if key not in FREE]
    if told:
        raise UserError(
            f"{folder} holds a run of another recipe ({first_names(told)}): give the run's values, or start another in "
            f"a folder of its own, from these weights with --init (only {', '.join(FREE)} may change)"
        )
    if before.ranks != now.ranks:
        raise UserError(f"{folder} holds a run of {before.ranks} processes, and this has {now.ranks}: start as many")
    difference = image_differences(before.images, now.images)
    if difference and not allow_data_change:
        raise UserError(
            f"{folder} holds a run with other training images ({difference}): put them back, choose another folder, or "
            "go on with these by --allow-data-change"
        )
    for key in FREE:
        if key in changed:
            _log.info(f"{key} is {changed[key]} from here on; it was {before.recipe[key]}")
    if difference:
        _log.warning(f"{folder} goes on with other training images ({difference})")


def image_differences(before: dict[str, list[int | str]], now: dict[str, list[int | str]]) -> str:
    """Count and name what was added, removed, changed and labelled otherwise; empty where nothing was."""
    both = [name for name in now if name in before and now[name] != before[name]]
    relabelled = [name for name in both if now[name][0] != before[name][0]]
    kinds: dict[str, Iterable[str]] = {
        "removed": before.keys() - now.keys(),
        "added": now.keys() - before.keys(),
        "of another identity": relabelled,
        "changed": [name for name in both if name not in relabelled],
    }
    told = {kind: sorted(names) for kind, names in kinds.items()}
    return "; ".join(f"{len(names)} {kind}: {first_names(names)}" for kind, names in told.items() if names)
