"""Built plans on disk, by the hash of all that determines them. An entry that is not what was written is as good as none.

$XDG_CACHE_HOME/mgn-deploy/plans/KEY.plan    the plan
$XDG_CACHE_HOME/mgn-deploy/plans/KEY.json    its SHA-256, the seconds that building took, the layer table; and a hash of these
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file, cache_folder


def plan_folder() -> Path:
    return cache_folder("plans")


def cache_key(graph: bytes, facts: dict[str, Any]) -> str:
    """SHA-256 over the graph's bytes and what else determines a plan."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(graph)
    return digest.hexdigest()


def load_plan(key: str) -> tuple[bytes, dict[str, Any]] | None:
    """The plan and its record, or None where there is none or either is damaged."""
    folder = plan_folder()
    try:
        stored = json.loads((folder / f"{key}.json").read_bytes())
        plan = (folder / f"{key}.plan").read_bytes()
        record = stored["record"]
        intact = stored["sha256"] == _hash(record) and record["plan_sha256"] == hashlib.sha256(plan).hexdigest()
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (plan, record) if intact else None


def save_plan(key: str, plan: bytes, record: dict[str, Any]) -> None:
    """Put a plan into the cache; the record, written last, makes it valid.

    Raises:
        UserError: the cache folder is not writable or the disk is full.
    """
    folder = plan_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}): set XDG_CACHE_HOME to a writable place, or use --no-cache"
        ) from None
    record = {**record, "plan_sha256": hashlib.sha256(plan).hexdigest()}
    with atomic_file(folder / f"{key}.plan") as file:
        file.write(plan)
    with atomic_file(folder / f"{key}.json") as file:
        file.write(json.dumps({"record": record, "sha256": _hash(record)}).encode())


def _hash(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
