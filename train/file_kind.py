"""What a file is that was given as weights: a web page, a pointer, an archive, another format, or what it should be."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from mgn_deploy.errors import UserError
from mgn_deploy.files import BROKEN_ZIP

HEAD = 512  # bytes that are looked at

AGAIN = "download or copy it again"
STATE_DICT = "save `model.state_dict()` with torch.save where it was made"

# First bytes that are nothing that could be read, what that is, and what to do about it.
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not what it stands for: run `git lfs pull` in its folder",
    ),
    (b"\x1f\x8b", "compressed by gzip: unpack it with gunzip, or with tar -xzf where it is a .tar.gz"),
    (b"BZh", "compressed by bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed by xz: unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it with unzstd"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"\x89HDF", f"an HDF5 file, as Keras writes it, not PyTorch's: {STATE_DICT}"),
    (b"\x93NUMPY", f"a NumPy array, not a state dict: {STATE_DICT}"),
    (b"%PDF", f"a PDF: {AGAIN}"),
)
_WEB_PAGE = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|\?xml|!--|script)", re.IGNORECASE)
# torch.save's before 1.6, and with _use_new_zipfile_serialization=False: a pickle of this number comes first.
_LEGACY = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
# A pickle of protocol 0 is text: it begins with a dict, or with the name of what it would call.
_TEXT_PICKLE = re.compile(rb"\(dp\d+\n|c[\w.]+\n[\w.]+\n(?:p\d+\n)?[(.]")
_SAFETENSORS = re.compile(rb".{5}\0{3}\s*\{", re.DOTALL)  # the length of a JSON header, and the header


def is_safetensors(path: Path) -> bool:
    """Tell whether a file is safetensors, by its first bytes; a zip of torch.save or a pickle is not.

    Raises:
        UserError: it is neither, as far as its first bytes and a zip's directory and checksums tell; the sentence says
            what it is, and how to get what is wanted.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{path} is empty: {AGAIN}")
    if _SAFETENSORS.match(head):
        return True
    kind = next((kind for first, kind in _FOREIGN if head.startswith(first)), None)
    if _WEB_PAGE.match(head):
        kind = f"a web page, which a server sent in place of the file: {AGAIN}, in a browser if it asks for a login"
    elif head[257:262] == b"ustar":
        kind = "a tar archive: unpack it"
    elif head.startswith(b"PK"):
        kind = _problem_of_zip(path)
    elif (head.startswith(b"\x80") and len(head) > 3 and _LEGACY not in head) or _TEXT_PICKLE.match(head):
        kind = f"a Python pickle that torch.save did not write, and reading it could run code: {STATE_DICT}"
    elif not kind and _is_text(head):
        kind = f"text, {head[:40].decode(errors='replace').strip()!r}: {AGAIN}"
    if kind:
        raise UserError(f"{path} is {kind}")
    return path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))  # of a truncated one, name it so


def _is_text(head: bytes) -> bool:
    text = head.decode("utf-8", "replace").rstrip("\ufffd" if len(head) == HEAD else "")  # cut within a letter
    return "\ufffd" not in text and all(letter.isprintable() or letter.isspace() for letter in text)


def _problem_of_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inner = {name.partition("/")[2] for name in names}
            if any(name.startswith("code/") for name in inner):
                return f"a TorchScript archive, which holds code: {STATE_DICT}"
            if "archive_format" in inner or any(name.startswith("models/") for name in inner):
                return f"a program of torch.export, not a state dict: {STATE_DICT}"
            if "data.pkl" not in inner:
                return f"a zip archive of other files ({', '.join(names[:3]) or 'none'}): unpack it"
            broken = archive.testzip()
    except BROKEN_ZIP as error:
        return f"damaged, or ends too early ({error}): {AGAIN}"
    return f"damaged, as the checksum of {broken} in it says: {AGAIN}" if broken else None
