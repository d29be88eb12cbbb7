"""A source folder that was renamed or mounted elsewhere: its store goes on with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path

from mgn_deploy.errors import UserError
from mgn_deploy.gallery.archives import archive_of
from mgn_deploy.gallery.manifest import MANIFEST, folder_of, folder_uri, read_manifest
from mgn_deploy.gallery.remote import scheme_of
from mgn_deploy.gallery.shards import open_shards
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
    before = folder_of(found.source)
    if found.source == source or before is None or before.exists():
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
        UserError: not a store, it is in use, not one of its images is there, or what `scheme_of` refuses.
    """
    folder = Path(store)
    manifest = read_manifest(folder)
    now = folder_of(source) if scheme_of(source) else Path(os.path.abspath(source))
    uri = source.rstrip("/") if now is None else folder_uri(now)
    with StoreWriter(folder, manifest) as writer:
        there = len(writer.known)
        if now is not None:
            paths = (now / row.file for row in writer.known.values())
            there = sum(os.path.lexists(path) or archive_of(path) is not None for path in paths)
            if writer.known and not there:
                raise UserError(
                    f"not one of the {len(writer.known)} images of {folder} is in {now}: give the folder that "
                    f"holds {next(iter(writer.known))!r}"
                )
        writer.replace(writer.manifest.shards, source=uri)
        return there, len(writer.known)
