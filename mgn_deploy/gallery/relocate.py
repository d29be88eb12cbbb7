"""A source folder that was renamed or mounted elsewhere: its store goes on with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from mgn_deploy.errors import UserError
from mgn_deploy.gallery.archives import archive_of
from mgn_deploy.gallery.shards import MANIFEST, open_shards, read_manifest
from mgn_deploy.gallery.writer import StoreWriter

_log = logging.getLogger("mgn_deploy")


def follow_source(store: str | os.PathLike[str], source: str, names: Collection[str]) -> None:
    """Relocate a store, if there is one, whose source folder is gone and whose images are in the new one.

    It is changed on disk, with a warning, where at least half of its images are among `names`.

    Raises:
        UserError: not a store.
    """
    folder = Path(store)
    if not (folder / MANIFEST).is_file():
        return
    found = read_manifest(folder)
    if found.source == source or _exists(found.source):
        return
    known = {row.name for shard in open_shards(folder, found) for row in shard.rows}
    if 2 * len(known & set(names)) >= len(known):
        relocate(store, source)
        _log.warning(f"{folder}: its source {found.source} is gone; it goes on with {source}")


def relocate(store: str | os.PathLike[str], source: str) -> tuple[int, int]:
    """Say where a store's images are now.

    Args:
        store: its folder.
        source: a folder, or a URI.

    Returns:
        How many of the store's images are in the new source, and how many there are; of a URI that is not of this
        machine all are taken to be there.

    Raises:
        UserError: not a store, it is in use, or not one of its images is there.
    """
    folder = Path(store)
    manifest = read_manifest(folder)
    uri = source if urlsplit(source).scheme else Path(os.path.abspath(source)).as_uri()
    with StoreWriter(folder, manifest) as writer:
        there = len(writer.known)
        if uri.startswith("file:"):
            there = sum(_is_there(_path(uri) / row.file) for row in writer.known.values())
            if writer.known and not there:
                raise UserError(
                    f"not one of the {len(writer.known)} images of {folder} is in {_path(uri)}: give the folder that "
                    f"holds {next(iter(writer.known))!r}"
                )
        writer.replace(writer.manifest.shards, source=uri)
        return there, len(writer.known)


def _is_there(path: Path) -> bool:
    return os.path.lexists(path) or archive_of(path) is not None


def _exists(uri: str) -> bool:
    return not uri.startswith("file:") or _path(uri).exists()


def _path(uri: str) -> Path:
    return Path(os.fsdecode(unquote_to_bytes(urlsplit(uri).path)))
