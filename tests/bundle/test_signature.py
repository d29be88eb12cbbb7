"""With a trusted key only bundles that it signed are opened; a hash alone is no signature."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import mgn_deploy
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import hash_line
from mgn_deploy.bundle.signature import sign
from mgn_deploy.choices import VERIFY_KEY
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.export.options import ExportOptions


def write_keys(folder: Path, name: str, passphrase: bytes | None = None) -> tuple[Path, Path]:
    key = ed25519.Ed25519PrivateKey.generate()
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def bundle(bundle_folder, tmp_path) -> Path:
    return Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))


def refusal(folder: Path, key: Path) -> str:
    with pytest.raises(UserError) as refused:
        Bundle.open(folder, verify_key=key)
    return str(refused.value)


def test_signed_bundle_opens_and_an_unsigned_one_does_not(bundle, tmp_path):
    private, public = write_keys(tmp_path, "ours")
    assert "is not signed, and" in refusal(bundle, public)
    sign(bundle, private)
    assert Bundle.open(bundle, verify_key=public).id == Bundle.open(bundle).id


def test_forged_proof_with_a_right_hash_is_refused(bundle, tmp_path):
    private, public = write_keys(tmp_path, "ours")
    sign(bundle, private)
    content = json.loads((bundle / "manifest.json").read_text())
    content["proofs"]["openvino"]["worst_cosine"] = 1.0
    forged = json.dumps(content).encode()
    (bundle / "manifest.json").write_bytes(forged)
    (bundle / "manifest.sha256").write_bytes(hash_line(forged))
    Bundle.open(bundle)  # the hash is right
    assert "or was changed since: beware" in refusal(bundle, public)


def test_signature_of_another_key_is_refused(bundle, tmp_path):
    private, _ = write_keys(tmp_path, "theirs")
    _, public = write_keys(tmp_path, "ours")
    sign(bundle, private)
    assert "is not signed by the trusted key" in refusal(bundle, public)


def test_trusted_key_of_the_environment_holds_for_every_command(bundle, crops, tmp_path, monkeypatch):
    private, public = write_keys(tmp_path, "ours")
    arguments = ("embed", crops, "-o", tmp_path / "s", "--bundle", bundle)
    done = mgn_deploy("--verify-key", public, *arguments)
    assert done.exit_code == 2
    assert "is not signed" in done.stderr
    monkeypatch.setenv(VERIFY_KEY, str(public))
    with pytest.raises(UserError, match="is not signed"):
        Embedder.open(bundle)
    sign(bundle, private)
    assert mgn_deploy(*arguments).exit_code == 0


def test_new_proofs_need_a_new_signature(bundle, tmp_path):
    private, public = write_keys(tmp_path, "ours")
    sign(bundle, private)
    done = mgn_deploy("prove", "--bundle", bundle)
    assert "is no longer signed: --sign KEY signs it again" in done.stderr
    assert "is not signed" in refusal(bundle, public)
    assert mgn_deploy("prove", "--bundle", bundle, "--sign", private).exit_code == 0
    Bundle.open(bundle, verify_key=public)


def test_encrypted_key_is_opened_by_the_environment(bundle, tmp_path, monkeypatch):
    private, public = write_keys(tmp_path, "ours", b"secret")
    with pytest.raises(UserError, match="MGN_DEPLOY_KEY_PASSPHRASE opens one"):
        sign(bundle, private)
    monkeypatch.setenv("MGN_DEPLOY_KEY_PASSPHRASE", "secret")
    sign(bundle, private)
    Bundle.open(bundle, verify_key=public)


def test_what_is_no_key_is_refused_before_any_work(tmp_path):
    (tmp_path / "letter").write_text("a letter")
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "rsa.pem").write_bytes(other)
    for name, expected in (
        ("letter", "is no private key that can be read"),
        ("rsa.pem", "is no Ed25519 private key"),
        ("none", "cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=expected):
            ExportOptions(sign=tmp_path / name)


# Of secp224k1, as `openssl genpkey -algorithm EC` wrote it: a curve that cryptography does not have.
ODD_CURVE = """-----BEGIN PUBLIC KEY-----
ME4wEAYHKoZIzj0CAQYFK4EEACADOgAE5XeD0Vpk14gmxRwhFhPf88dlFbr1EMFE
uji7Z7BkVaS9ZoJ5Fug9INEZh5fJHBvO6gdkR/mOMuU=
-----END PUBLIC KEY-----
"""


def test_a_key_of_a_curve_that_is_not_known_is_one_sentence(bundle, tmp_path):
    private, public = write_keys(tmp_path, "ours")
    sign(bundle, private)
    public.write_text(ODD_CURVE)
    assert "is no public key in PEM" in refusal(bundle, public)


def test_a_signature_that_cannot_be_read_and_a_folder_without_a_manifest_are_one_sentence(bundle, tmp_path):
    private, public = write_keys(tmp_path, "ours")
    (bundle / "manifest.sig").mkdir()
    assert "manifest.sig cannot be read: Is a directory" in refusal(bundle, public)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read: No such file"):
        sign(tmp_path, private)


@pytest.fixture(autouse=True)
def _no_trusted_key(monkeypatch) -> None:
    monkeypatch.setenv(VERIFY_KEY, "")  # which is undone, also where a command set it
