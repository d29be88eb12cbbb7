"""What takes long to make, kept on disk by the hash of all that determines it: TensorRT's plans, the kernels' machine
code. An entry that is not what was written is as good as none.

$XDG_CACHE_HOME/mgn-deploy/KIND/KEY.TYPE    the content
$XDG_CACHE_HOME/mgn-deploy/KIND/KEY.json    its SHA-256 and what is told of it; and a hash of these
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mgn_deploy.errors import UserError
from mgn_deploy.files import cache_folder, sha256_bytes, write_bytes

_log = logging.getLogger("mgn_deploy")


def load_entry(kind: str, name: str) -> tuple[bytes, dict[str, Any]] | None:
    """The file KEY.TYPE and its record, or None where there is none or either is damaged."""
    try:
        stored = json.loads(load(kind, _record_name(name)))
        content, record = load(kind, name), stored["record"]
        intact = stored["sha256"] == _hash(record) and record[_content_hash(name)] == sha256_bytes(content)
    except (ValueError, TypeError, KeyError):
        return None
    return (content, record) if intact else None


def save_entry(kind: str, name: str, content: bytes, record: dict[str, Any]) -> None:
    """Put a file KEY.TYPE into the cache; the record, written last, makes it valid. A cache that cannot be written is
    warned of."""
    record = {**record, _content_hash(name): sha256_bytes(content)}
    if save(kind, name, content):
        save(kind, _record_name(name), json.dumps({"record": record, "sha256": _hash(record)}).encode())


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


def _record_name(name: str) -> str:
    return str(Path(name).with_suffix(".json"))


def _content_hash(name: str) -> str:
    """As in "plan_sha256"."""
    return f"{Path(name).suffix[1:]}_sha256"


def _hash(record: Any) -> str:
    return sha256_bytes(json.dumps(record, sort_keys=True).encode())
