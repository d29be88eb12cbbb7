"""The bundle: one folder that is all an edge box needs to run one model, with the proof that it is still that model.

    BUNDLE/manifest.json            what the model is, its input, precision, the hash of every file, the proofs
    BUNDLE/manifest.sha256          the manifest's own hash, as `sha256sum -c manifest.sha256` checks it
    BUNDLE/manifest.sig             an Ed25519 signature of the manifest, where it was exported with --sign
    BUNDLE/graph.onnx               uint8 [n, height, width, 3] RGB -> float32 [n, dim] unit rows
    BUNDLE/NAME.plan, NAME.layers.txt     TensorRT plans and their layer tables, where they were built
    BUNDLE/proof.npz                the reference's embeddings of the crops that the proof is on, and their hashes
    BUNDLE/reference.safetensors    the PyTorch weights (left out by --no-reference): torch backend, `validate`

A file's bytes are compared with the manifest before any parser sees them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mgn_deploy.bundle.kinds import refuse_other_kind
from mgn_deploy.bundle.manifest import MANIFEST, MANIFEST_HASH, Manifest, hash_line, parse_manifest
from mgn_deploy.bundle.signature import require_signature, trusted_key
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun, UserError

_MOST_MANIFEST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `manifest` was checked against its hash; `read` checks each file."""

    folder: Path
    manifest: Manifest

    def __repr__(self) -> str:
        config = self.config
        proven = ", ".join(name for name, proof in self.manifest.proofs.items() if proof.passed) or "none"
        return (
            f"Bundle({str(self.folder)!r}, {config.backbone} MGN {config.height}x{config.width}, "
            f"{self.manifest.precision}, proven: {proven})"
        )

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify_key: str | os.PathLike[str] | None = None) -> Bundle:
        """Read and check the manifest.

        Args:
            folder: the bundle.
            verify_key: PEM file of the Ed25519 public key that has to have signed it; None: the one that the
                environment's MGN_DEPLOY_VERIFY_KEY names, if any; "": none.

        Raises:
            UserError: no bundle there, a changed or unreadable manifest, or a schema later than this version reads.
        """
        folder = Path(folder)
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise UserError(
                f"{folder} is not a bundle ({error.strerror}): `mgn-deploy export WEIGHTS -o BUNDLE` makes one"
            ) from None
        try:
            with open(folder / MANIFEST, "rb") as manifest, open(folder / MANIFEST_HASH, "rb") as hashes:
                content, expected = manifest.read(_MOST_MANIFEST_BYTES), hashes.read(4096)
        except OSError as error:
            refuse_other_kind(folder, "a bundle")
            raise UserError(f"{folder} is not a bundle: {Path(error.filename).name}: {error.strerror}") from None
        if hash_line(content) not in expected.splitlines(keepends=True):
            raise UserError(
                f"{folder / MANIFEST} is not what was written (its SHA-256 differs): copy the bundle or export it again"
            )
        key = trusted_key() if verify_key is None else verify_key
        if key:
            require_signature(folder, content, key)
        return cls(folder, parse_manifest(content, folder / MANIFEST))

    def read(self, name: str) -> bytes:
        """The bytes of one of the bundle's files, after comparing them with the manifest.

        Raises:
            UserError: the bundle has no such file, or its content is not the manifest's.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise UserError(f"{self.folder} was exported without {name}")
        try:
            path = self.folder / name
            content = path.read_bytes() if path.stat().st_size == entry.size else b""
        except OSError as error:
            raise UserError(f"{self.folder / name}: {error.strerror}; copy the bundle or export it again") from None
        if len(content) != entry.size or hashlib.sha256(content).hexdigest() != entry.sha256:
            raise UserError(
                f"{self.folder / name} is not what was exported (its SHA-256 differs): "
                "copy the bundle or export it again"
            )
        return content

    @property
    def config(self) -> ModelConfig:
        return self.manifest.model

    @cached_property
    def id(self) -> str:
        return self.manifest.id

    def require_proof(self, backend: str) -> None:
        """Raise CannotRun unless this backend's embeddings were proven equal to the reference's at export."""
        proof = self.manifest.proofs.get(backend)
        if proof is None:
            proven = [name for name, other in self.manifest.proofs.items() if other.passed]
            raise CannotRun(
                f"{self.folder} has no proof for {backend} (proven: {', '.join(proven) or 'none'}): export it where "
                f"{backend} is installed, choose a proven --backend, or pass --allow-unproven"
            )
        if not proof.passed:
            raise CannotRun(
                f"{self.folder} is not proven for {backend} ({'; '.join(proof.misses)}): choose another --backend or "
                "pass --allow-unproven"
            )
