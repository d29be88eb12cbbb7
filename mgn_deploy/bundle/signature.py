"""Signatures of bundles: who made them. A manifest's hash says that nothing changed by accident; whoever can write a
bundle can write that hash, and a proof, anew.

Ed25519 (RFC 8032) over the bytes of `manifest.json`, which holds every file's SHA-256 and the proofs, in
`manifest.sig`, 64 bytes. Keys are PEM files as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write
them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mgn_deploy.bundle.manifest import MANIFEST
from mgn_deploy.choices import VERIFY_KEY
from mgn_deploy.errors import UserError
from mgn_deploy.files import write_bytes
from mgn_deploy.packages import require

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "manifest.sig"
PASSPHRASE = "MGN_DEPLOY_KEY_PASSPHRASE"  # of an encrypted private key


def sign(folder: str | os.PathLike[str], key: str | os.PathLike[str]) -> None:
    """Sign a bundle's manifest.

    Args:
        folder: the bundle.
        key: a PEM file of an Ed25519 private key; the environment's MGN_DEPLOY_KEY_PASSPHRASE opens an encrypted one.

    Raises:
        CannotRun: cryptography is not installed.
        UserError: no such key, a key of another kind, or no manifest there.
    """
    private = read_private_key(key)
    folder = Path(folder)
    write_bytes(folder / SIGNATURE, private.sign(_content(folder / MANIFEST, most=-1)))


def require_signature(folder: Path, manifest: bytes, key: str | os.PathLike[str]) -> None:
    """Raise UserError unless the manifest's bytes are signed by the private half of a public key's PEM file."""
    from cryptography.exceptions import InvalidSignature

    public = _read_public_key(key)
    if not (folder / SIGNATURE).exists():
        raise UserError(f"{folder} is not signed, and {key} is the trusted key: `mgn-deploy export --sign KEY` signs")
    try:
        public.verify(_content(folder / SIGNATURE), manifest)
    except InvalidSignature:
        raise UserError(f"{folder} is not signed by the trusted key {key}, or was changed since: beware") from None


def trusted_key() -> str | None:
    """The public key's file that the environment names."""
    return os.environ.get(VERIFY_KEY) or None


def read_private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """Read the key of `sign`.

    Raises:
        CannotRun: cryptography is not installed.
        UserError: no such file, or no Ed25519 private key.
    """
    require("cryptography", "sign", "signatures need cryptography")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    passphrase = os.environ.get(PASSPHRASE)
    try:
        key = load_pem_private_key(_content(path), passphrase.encode() if passphrase else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path} is no private key that can be read ({error}): {PASSPHRASE} opens one") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path} is no Ed25519 private key: `openssl genpkey -algorithm ed25519` makes one")
    return key


def _read_public_key(path: str | os.PathLike[str]) -> Ed25519PublicKey:
    require("cryptography", "sign", "signatures need cryptography")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_content(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path} is no public key in PEM ({error})") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{path} is no Ed25519 public key: `openssl pkey -in key.pem -pubout` writes one")
    return key


def _content(path: str | os.PathLike[str], most: int = 2**16) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be read: {error.strerror}") from None
