"""The reference's embeddings, kept in the bundle: a machine without PyTorch proves its engines against them.

`proof.npz` holds `pixels`, uint8 `[n, 32]`, the SHA-256 of each crop as the network sees it, and `embeddings`, float32
`[n, dim]`, the PyTorch reference's. The drawn crops are among them, which every installation draws again bit for bit,
and those of `--proof-images`, which are looked up by their pixels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping

import numpy as np

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.files import BROKEN_ZIP

RECORD = "proof.npz"


def record_bytes(crops: np.ndarray, embeddings: np.ndarray) -> bytes:
    """The file for crops uint8 `[n, height, width, 3]` and the reference's embeddings of them, `[n, dim]`."""
    buffer = io.BytesIO()
    digests = np.frombuffer(b"".join(map(_digest, crops)), np.uint8).reshape(-1, 32)
    np.savez(buffer, pixels=digests, embeddings=embeddings.astype(np.float32))
    return buffer.getvalue()


def recorded_embeddings(bundle: Bundle, crops: np.ndarray, source: str) -> np.ndarray:
    """The reference's embeddings `[n, dim]` of crops, as they were recorded at export.

    Raises:
        CannotRun: the bundle has no record, or not of all these crops.
    """
    known = _read(bundle)
    rows = [known.get(_digest(crop)) for crop in crops]
    missing = sum(row is None for row in rows)
    if missing:
        raise CannotRun(
            f"{missing} of {len(rows)} images of {source} were not recorded when {bundle.folder} was exported: prove "
            "on the images of the export's --proof-images, or on drawn people by leaving it out"
        )
    return np.stack([row for row in rows if row is not None])


def _read(bundle: Bundle) -> Mapping[bytes, np.ndarray]:
    if RECORD not in bundle.manifest.files:
        raise CannotRun(f"{bundle.folder} has no {RECORD}, the record of the reference: export it again")
    try:
        with np.load(io.BytesIO(bundle.read(RECORD)), allow_pickle=False) as file:
            pixels, embeddings = file["pixels"], file["embeddings"]
    except (*BROKEN_ZIP, ValueError, KeyError) as error:
        raise UserError(f"{bundle.folder / RECORD} is no record of the reference ({error})") from None
    if pixels.shape != (len(embeddings), 32) or embeddings.shape[1:] != (bundle.config.dim,):
        raise UserError(f"{bundle.folder / RECORD} has {pixels.shape} hashes of {embeddings.shape} embeddings")
    return {digest.tobytes(): row for digest, row in zip(pixels, embeddings, strict=True)}


def _digest(crop: np.ndarray) -> bytes:
    return hashlib.sha256(crop.tobytes()).digest()
