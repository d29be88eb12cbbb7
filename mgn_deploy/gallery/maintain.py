"""What is done to a store besides adding rows: verify, repair, prune, compact, merge."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.crops import source_of
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.manifest import ShardEntry, StoreManifest, read_manifest
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.run import GalleryReport
from mgn_deploy.gallery.shards import Shard, latest_rows, open_shards
from mgn_deploy.gallery.store import Store
from mgn_deploy.gallery.writer import StoreWriter, hold
from mgn_deploy.progress import Progress

_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class Damage:
    """A shard that cannot be used.

    Attributes:
        shard: its name.
        rows: how many rows it has by the manifest; None where a store of schema 1 does not say.
        reason: one sentence.
        known: its rows, where their file is whole.
    """

    shard: str
    rows: int | None
    reason: str
    known: list[Row] = field(default_factory=list, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the names of the images in place of the rows."""
        images = [row.name for row in self.known]
        return {"shard": self.shard, "rows": self.rows, "reason": self.reason, "images": images}


@dataclass(frozen=True)
class Verification:
    """What `verify` found: the shards and rows that it compared with their hashes, and those that are damaged."""

    shards: int
    rows: int
    without_hash: int
    damaged: list[Damage]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "damaged": [damage.to_dict() for damage in self.damaged]}


def verify(store: str | os.PathLike[str]) -> Verification:
    """Compare every byte of a store with its manifest's hashes and counts.

    Raises:
        UserError: not a store.
    """
    folder = Path(store)
    manifest = read_manifest(folder)
    found = [_judge(folder, entry, manifest) for entry in manifest.shards]
    good = [shard for shard in found if isinstance(shard, Shard)]
    return Verification(
        shards=len(found),
        rows=sum(len(shard.rows) for shard in good),
        without_hash=sum(shard.entry.array_sha256 is None for shard in good),
        damaged=[damage for damage in found if isinstance(damage, Damage)],
    )


def repair(
    store: str | os.PathLike[str],
    bundle: str | os.PathLike[str] | None = None,
    *,
    allow_unproven: bool = False,
    progress: Progress | None = None,
) -> tuple[list[Damage], GalleryReport | None]:
    """Drop the shards that `verify` finds damaged, and embed their images again, but for frames of videos.

    Args:
        store: its folder.
        bundle: that embedded it; None: where it was then.
        allow_unproven: embed by an engine without a passed proof, too.
        progress: called with the images done and to do.

    Returns:
        What was dropped, and what the embedding did; None where no image could be embedded: no row says which there
        were, or the bundle is not there, which is warned of. The same `embed` as at first makes up for what is missing.

    Raises:
        UserError: not a store, or it is in use.
        GateFailed: not one of the images can be read.
    """
    folder = Path(store)
    with hold(folder):
        found = verify(folder)
        if found.damaged:
            broken = {damage.shard for damage in found.damaged}
            writer = StoreWriter(folder, read_manifest(folder))
            writer.replace(shard for shard in writer.manifest.shards if shard.name not in broken)
    rows = [row for damage in found.damaged for row in damage.known]
    if not rows:
        return found.damaged, None
    opened = Store.open(folder)
    source = source_of(opened, rows)
    try:
        made = opened.manifest
        embedder = Embedder.open(bundle or opened.find_bundle(), made.backend, allow_unproven=allow_unproven)
        return found.damaged, embed_folder(source, folder, embedder, dtype=made.dtype, progress=progress)
    except UserError as error:
        _log.warning(f"what was dropped is not embedded again: {error}")
        return found.damaged, None


def prune(store: str | os.PathLike[str], keep: Collection[str]) -> int:
    """Remove the rows, failures too, whose names are not in `keep`; how many images they were of.

    Raises:
        UserError: not a store, it is in use or damaged, or nothing of it would be left.
    """
    names = set(keep)
    with StoreWriter(store, read_manifest(Path(store))) as writer:
        gone = writer.known.keys() - names
        if gone and len(gone) == len(writer.known):
            raise UserError(f"{writer.folder}: none of its {len(gone)} images would be left; was it another source's?")
        if gone:
            latest = latest_rows(open_shards(writer.folder, writer.manifest))
            writer.rewrite([row for row in latest if row[0].name in names])
    return len(gone)


def compact(store: str | os.PathLike[str]) -> tuple[int, int]:
    """Write a store's latest rows into whole shards, without those that later ones replaced.

    Returns:
        How many rows it had and has.

    Raises:
        UserError: not a store, or it is in use or damaged.
    """
    with StoreWriter(store, read_manifest(Path(store))) as writer:
        before = sum(shard.count or 0 for shard in writer.manifest.shards)
        writer.rewrite(latest_rows(open_shards(writer.folder, writer.manifest)))
        return before, sum(shard.count or 0 for shard in writer.manifest.shards)


def merge(stores: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> int:
    """Join stores of one source, as `embed --shard` makes them, into a new store in the order of the names' bytes.

    It has the bytes that one run over the whole source would have written. A folder that holds just these rows stays as
    it is: a merge that was killed after its last step may be run again.

    Returns:
        How many rows it has.

    Raises:
        UserError: the stores differ in bundle, backend, preprocessing, type or source, or one is damaged; `out` holds
            other rows.
    """
    manifests = [read_manifest(Path(store)) for store in stores]
    with StoreWriter(out, manifests[0].model_copy(update={"shards": (), "schema_version": 2})) as writer:
        rows: dict[str, tuple[Row, Shard, int]] = {}
        for store, manifest in zip(stores, manifests, strict=True):
            writer.check_same(manifest, Path(store))
            for row in latest_rows(open_shards(Path(store), manifest)):
                twice = rows.get(row[0].name)
                if twice is None or twice[0].error is not None:
                    rows[row[0].name] = row
        merged = sorted(rows.values(), key=lambda row: os.fsencode(row[0].name))
        if not writer.manifest.shards:
            writer.rewrite(merged)
        elif list(writer.known.values()) != [row for row, _, _ in merged]:
            raise UserError(f"{out} holds other rows already: merge into a new folder")
    return len(rows)


def _judge(folder: Path, entry: ShardEntry, manifest: StoreManifest) -> Shard | Damage:
    rows: list[Row] = []
    try:
        shard = Shard(folder, entry, manifest, check=False)
        rows = shard.rows
        shard.check_size()
        shard.verify()
        return shard
    except UserError as error:
        return Damage(entry.name, entry.count, str(error).partition(": `mgn-deploy store repair")[0], rows)
