"""What an index says of itself, and whether it belongs to a store."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mgn_deploy.choices import BuiltIndexKind
from mgn_deploy.errors import UserError, first_problem
from mgn_deploy.files import printable, sha256_bytes
from mgn_deploy.gallery.store import Store


class IndexManifest(BaseModel):
    """What made an index. Its rows are those of the store, in the store's order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    bundle_id: str
    store: str  # its folder then
    store_sha256: str  # of what its manifest says of its rows
    rows: int = Field(ge=1)
    dim: int = Field(ge=1)
    kind: BuiltIndexKind
    metric: Literal["cosine"] = "cosine"  # as the inner product of unit rows
    effort: int = Field(ge=0)  # efSearch of hnsw, nprobe of ivf-pq; 0: the kind has none
    recall_at_10: float = Field(ge=0, le=1)  # after exact re-scoring, as `search` does it
    recall_queries: int = Field(ge=1)
    seed: int
    index_sha256: str | None = None  # of index.faiss

    @classmethod
    def of(cls, store: Store, **made: Any) -> IndexManifest:
        """Of an index of a store as it is now; `made` are the other fields."""
        return cls(
            bundle_id=store.manifest.bundle_id,
            store=printable(os.path.abspath(store.folder)),
            store_sha256=store_sha256(store),
            rows=len(store),
            dim=store.manifest.dim,
            **made,
        )

    @classmethod
    def read(cls, content: str | bytes, where: str) -> IndexManifest:
        """Parse an index's manifest.

        Raises:
            UserError: it is none, or one of a later schema.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise UserError(
                f"{where} is not an index that this mgn-deploy reads ({first_problem(error)}): build it again"
            ) from None

    def check_store(self, store: Store, where: str) -> None:
        """Raise UserError unless the index is of this store as it is now."""
        again = f"build it again by `mgn-deploy index build {store.folder} -o {where}`"
        if self.bundle_id != store.manifest.bundle_id:
            raise UserError(
                f"{where} indexes embeddings of bundle {self.bundle_id[:12]} and {store.folder} holds those of "
                f"{store.manifest.bundle_id[:12]}: {again}"
            )
        if self.store_sha256 != store_sha256(store) or self.rows != len(store):
            same = os.path.realpath(self.store) == os.path.realpath(store.folder)
            what = f"{store.folder} has changed since {where} was built" if same else f"{where} is of {self.store}"
            raise UserError(f"{what}: {again}")


def store_sha256(store: Store) -> str:
    """Hex SHA-256 of what a store's manifest says of its rows; where its images are is left out."""
    return sha256_bytes(store.manifest.model_dump_json(exclude={"bundle_path", "source"}).encode())
