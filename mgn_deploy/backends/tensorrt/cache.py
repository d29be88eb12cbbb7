"""Built plans on disk, by the hash of all that determines them. An entry that is not what was written is as good as
none.

$XDG_CACHE_HOME/mgn-deploy/plans/KEY.plan    the plan
$XDG_CACHE_HOME/mgn-deploy/plans/KEY.json    its SHA-256, the seconds that building took, the layer table; and a hash of
these
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from mgn_deploy.errors import UserError
from mgn_deploy.files import cache_folder, write_bytes

_log = logging.getLogger("mgn_deploy")


def plan_folder() -> Path:
    return cache_folder("plans")


def cache_key(graph: bytes, facts: dict[str, Any]) -> str:
    """SHA-256 over the graph's bytes and what else determines a plan."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(graph)
    return digest.hexdigest()


def load_plan(key: str) -> tuple[bytes, dict[str, Any]] | None:
    """The plan and its record, or None where there is none or either is damaged."""
    try:
        stored = json.loads(load(f"{key}.json"))
        plan = load(f"{key}.plan")
        record = stored["record"]
        intact = stored["sha256"] == _hash(record) and record["plan_sha256"] == hashlib.sha256(plan).hexdigest()
    except (ValueError, TypeError, KeyError):
        return None
    return (plan, record) if intact else None


def save_plan(key: str, plan: bytes, record: dict[str, Any]) -> None:
    """Put a plan into the cache; the record, written last, makes it valid. A cache that cannot be written is warned
    of."""
    record = {**record, "plan_sha256": hashlib.sha256(plan).hexdigest()}
    content = json.dumps({"record": record, "sha256": _hash(record)}).encode()
    if save(f"{key}.plan", plan):
        save(f"{key}.json", content)


def load(name: str) -> bytes:
    """One file of the cache; empty where it is not there or cannot be read."""
    try:
        return (plan_folder() / name).read_bytes()
    except (UserError, OSError):
        return b""


def save(name: str, content: bytes) -> bool:
    """Write one file of the cache; where that cannot be, say so and go on: what took minutes to make is not thrown
    away."""
    try:
        folder = plan_folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, content)
    except (UserError, OSError) as error:
        _log.warning(f"{name} is not cached ({error}): set XDG_CACHE_HOME to a writable folder")
        return False
    return True


def _hash(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
