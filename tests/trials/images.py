"""Damaged images: drawn crops in every format that is read, damaged at random; none may crash, hang or be lost.

    python -m tests.trials.images --count 3000

Each file is decoded in a process that is watched, then `mgn-deploy embed` runs over the folder of them all. Right is
that the process lives, each gives pixels or one reason within `SECONDS`, the process never holds more than `MIB`, and
`embed` embeds what was decoded and counts the others with their reasons.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UnreadableImage
from mgn_deploy.images.decode import load_rgb
from mgn_deploy.images.formats import readable_formats
from tests.trials.small import export_small

SECONDS = 30.0  # for the largest image that is allowed, on a busy machine
MIB = 1536  # 512 of pixels at once (images/memory.py), Pillow's working copies and the interpreter
# Extreme values of the widths, lengths and offsets that headers hold.
NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)

Damage = Callable[[bytes, bytes, random.Random], bytes]


def originals() -> list[tuple[str, bytes]]:
    """Whole files, each with its extension."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description" * 20
    crop, other = (draw_crop(person, 1, 0).resize((64, 128)) for person in (1, 2))
    deep = Image.frombytes("I;16", (64, 128), bytes(range(256)) * 64)
    frames: dict[str, Any] = {"save_all": True, "append_images": [other, crop]}
    made: list[tuple[str, Image.Image, str, dict[str, Any]]] = [
        (".jpg", crop, "JPEG", {"exif": exif.tobytes()}),
        (".jpg", crop, "JPEG", {"progressive": True}),
        (".jpg", crop.convert("CMYK"), "JPEG", {}),
        (".jpg", crop.convert("L"), "JPEG", {"icc_profile": b"profile" * 99}),
        (".jpg", crop, "MPO", frames),
        (".png", crop, "PNG", {"exif": exif.tobytes()}),
        (".png", deep, "PNG", {}),
        (".png", crop.quantize(64), "PNG", {"transparency": 3}),
        (".png", crop, "PNG", frames),
        (".bmp", crop, "BMP", {}),
        (".bmp", crop.quantize(16), "BMP", {}),
        (".dib", crop, "DIB", {}),
        (".webp", crop, "WEBP", {"exif": exif.tobytes()}),
        (".webp", crop, "WEBP", {"lossless": True}),
        (".webp", crop, "WEBP", frames),
        (".ppm", crop, "PPM", {}),
        (".gif", crop, "GIF", frames),
        *(
            (".tif", crop, "TIFF", {"compression": name})
            for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        ),
        (".tif", deep, "TIFF", {}),
    ]
    if "AVIF" in readable_formats():
        made.append((".avif", crop, "AVIF", {}))
    if "HEIF" in readable_formats():
        made.append((".heic", crop, "HEIF", {}))
    return [(extension, _encoded(image, kind, options)) for extension, image, kind, options in made]


def _encoded(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flipped(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """A few bytes changed anywhere."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 8, 40))):
        changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
    return bytes(changed)


def truncated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return content[: rng.randrange(len(content))]


def spliced(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """A section replaced by one of another file, of any length."""
    start, end = sorted(rng.randrange(len(content)) for _ in range(2))
    first, last = sorted(rng.randrange(len(other)) for _ in range(2))
    return content[:start] + other[first:last] + content[end:]


def renumbered(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Numbers in the header set to extreme values."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        code = rng.choice("BHI")
        number = struct.pack(rng.choice("<>") + code, rng.choice(NUMBERS) & (256 ** struct.calcsize(code) - 1))
        at = rng.randrange(max(1, min(len(changed), rng.choice((64, 400))) - len(number)))
        changed[at : at + len(number)] = number
    return bytes(changed)


def repeated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """A section that comes many times."""
    start, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:end] + content[start:end] * rng.choice((1, 3, 50)) + content[end:]


def rechecked(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Damage that a PNG's checksums do not notice: they are those of the damaged chunks. Other formats: `flipped`."""
    if not content.startswith(b"\x89PNG"):
        return flipped(content, other, rng)
    chunks = list(_png_chunks(content))
    at = rng.randrange(len(chunks))
    kind, data = chunks[at]
    chunks[at] = (kind, rng.choice((flipped, truncated, renumbered))(data, other, rng) if data else other[:99])
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        yield content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        at += 12 + length


DAMAGES: tuple[Damage, ...] = (flipped, truncated, spliced, renumbered, repeated, rechecked)


def write_damaged(folder: Path, count: int, seed: int) -> list[Path]:
    """Damaged files, each named after its number, its damage and its format."""
    rng, whole, paths = random.Random(seed), originals(), []
    for number in range(count):
        extension, content = whole[number % len(whole)]
        damage = DAMAGES[number // len(whole) % len(DAMAGES)]
        path = folder / f"{number:05d}-{damage.__name__}{extension}"
        path.write_bytes(damage(content, rng.choice(whole)[1], rng))
        paths.append(path)
    return paths


def decode(paths: list[Path], results: Any) -> None:
    """In a process of its own: each file's index, reason or None, seconds, and the most MiB the process held so far."""
    for index, path in enumerate(paths):
        start, reason = time.monotonic(), None
        try:
            load_rgb(path)
        except UnreadableImage as error:
            reason = str(error)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        results.send((index, reason, time.monotonic() - start, peak))


def decode_watched(paths: list[Path]) -> tuple[dict[str, str | None], list[str], float, int]:
    """Each name's reason or None, the faults, the slowest file's seconds and the most MiB."""
    reasons: dict[str, str | None] = {}
    faults, slowest, most = [], 0.0, 0
    while len(reasons) < len(paths):
        waiting = paths[len(reasons) :]
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=decode, args=(waiting, theirs))
        process.start()
        theirs.close()
        done = 0
        try:
            while done < len(waiting) and ours.poll(SECONDS):
                index, reason, seconds, peak = ours.recv()
                done, reasons[waiting[index].name] = index + 1, reason
                slowest, most = max(slowest, seconds), max(most, peak)
        except EOFError:
            process.join()
        if done < len(waiting):
            name = waiting[done].name
            faults.append(f"{name}: {'no end' if process.is_alive() else f'died with {process.exitcode}'}")
            reasons[name] = "a fault"
        process.kill()
        process.join()
    if most > MIB:
        faults.append(f"{most} MiB while decoding")
    return reasons, faults, slowest, most


def embed(folder: Path, work: Path, reasons: dict[str, str | None]) -> list[str]:
    """The faults of one `mgn-deploy embed` over the folder."""
    export_small(work / "weights", work / "bundle")
    command = f"embed {folder} -o {work}/store --bundle {work}/bundle --json"
    done = subprocess.run(
        [sys.executable, "-m", "mgn_deploy", *command.split()], capture_output=True, text=True, check=False
    )
    if done.returncode or "Traceback" in done.stderr:
        return [f"embed ended with {done.returncode}: {done.stderr[-500:]}"]
    report = json.loads(done.stdout)
    rows = pd.concat(map(pd.read_parquet, (work / "store").glob("*.parquet")))
    stored = {
        name: error if isinstance(error, str) else None for name, error in zip(rows.path, rows.error, strict=True)
    }
    print(f"embed: {report['embedded']} embedded, {report['failed']} failed")
    faults = [
        f"{name}: {reason!r} by the decoder, {stored.get(name, 'not there')!r} in the store"
        for name, reason in reasons.items()
        if stored.get(name, "not there") != reason
    ]
    embedded = sum(reason is None for reason in reasons.values())
    if (report["embedded"], report["failed"]) != (embedded, len(reasons) - embedded):
        faults.append(f"embed counted {report}, the decoder {embedded} of {len(reasons)}")
    return faults


def main() -> None:
    """Make the files, decode and embed them, and print what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mgn-images-") as top:
        folder = Path(top) / "damaged"
        folder.mkdir()
        paths = write_damaged(folder, options.count, options.seed)
        reasons, faults, slowest, most = decode_watched(paths)
        by_format = Counter(path.suffix for path in paths)
        print(
            f"{len(paths)} files: {dict(by_format)}; {sum(reason is None for reason in reasons.values())} gave pixels, "
            f"the slowest took {slowest:.1f} s, at most {most} MiB were held"
        )
        faults += embed(folder, Path(top), reasons)
    print("\n".join([*faults, f"{len(faults)} faults"]))
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
