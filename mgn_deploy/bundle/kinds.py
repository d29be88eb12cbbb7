"""What another of mgn-deploy's folders is, where one was given in its stead: each has a `manifest.json`."""

from __future__ import annotations

import json
from pathlib import Path

from mgn_deploy.errors import UserError

_KINDS = {
    "source_weights_sha256": "a bundle",
    "bundle_path": "an embedding store",
    "store_sha256": "a search index",
    "kind": "a folder of enrolled people",
}
_MOST_BYTES = 64 << 20


def refuse_other_kind(folder: Path, wanted: str) -> None:
    """Raise UserError if the folder's manifest is that of another kind than `wanted`, "a bundle" for one."""
    try:
        with open(folder / "manifest.json", "rb") as file:
            keys = set(json.loads(file.read(_MOST_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError):
        return  # what is wrong with it the caller knows
    kind = next((kind for key, kind in _KINDS.items() if key in keys), wanted)
    if kind != wanted:
        raise UserError(f"{folder} is {kind}, not {wanted}")
