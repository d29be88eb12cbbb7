"""What takes long to make, kept on disk by the hash of all that determines it: TensorRT's plans, the kernels' machine
code. An entry that is not what was written is as good as none.

$XDG_CACHE_HOME/mgn-deploy/KIND/KEY.SUFFIX  the content
$XDG_CACHE_HOME/mgn-deploy/KIND/KEY.json    its SHA-256 and what is told of it; and a hash of these
"""

from __future__ import annotations

import json
import logging
from typing import Any

from mgn_deploy.errors import UserError
from mgn_deploy.files import cache_folder, sha256_bytes, write_bytes

_log = logging.getLogger("mgn_deploy")


def load_entry(kind: str, key: str, suffix: str) -> tuple[bytes, dict[str, Any]] | None:
    """The content and what is told of it, or None where there is none or either is damaged."""
    try:
        stored = json.loads(load(kind, f"{key}.json"))
        content, record = load(kind, f"{key}.{suffix}"), stored["record"]
        intact = stored["sha256"] == _hash(record) and record[f"{suffix}_sha256"] == sha256_bytes(content)
    except (ValueError, TypeError, KeyError):
        return None
    return (content, record) if intact else None


def save_entry(kind: str, key: str, suffix: str, content: bytes, record: dict[str, Any]) -> None:
    """Put an entry into the cache; the record, written last, makes it valid. A cache that cannot be written is warned
    of."""
    record = {**record, f"{suffix}_sha256": sha256_bytes(content)}
    if save(kind, f"{key}.{suffix}", content):
        save(kind, f"{key}.json", json.dumps({"record": record, "sha256": _hash(record)}).encode())


def load(kind: str, name: str) -> bytes:
    """One file of the cache; empty where it is not there or cannot be read."""
    try:
        return (cache_folder(kind) / name).read_bytes()
    except (UserError, OSError):
        return b""


def save(kind: str, name: str, content: bytes) -> bool:
    """Write one file of the cache; where that cannot be, say so and go on: what took minutes to make is not thrown
    away."""
    try:
        folder = cache_folder(kind)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, content)
    except (UserError, OSError) as error:
        _log.warning(f"{name} is not cached ({error}): set XDG_CACHE_HOME to a writable folder")
        return False
    return True


def _hash(record: Any) -> str:
    return sha256_bytes(json.dumps(record, sort_keys=True).encode())
