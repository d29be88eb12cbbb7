"""JPEG decoders beside Pillow on real crops: `python -m mgn_deploy.bench.decoders --images DIR [--bundle B]`.

Those that are installed take turns in every round, so that other work on the machine meets all of them: `cpu` is the
median over rounds of a decoder's seconds of CPU, to an image that Pillow resizes, over those of `load_rgb`, which is
Pillow. `draft` is Pillow at a scale of JPEG's DCT that leaves at least twice the network's size: its CPU with the
resizing over that of the whole crop, and how far it moves a bundle's embeddings (1 - cosine).
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mgn_deploy.console import in_one_sentence
from mgn_deploy.embedder import Embedder
from mgn_deploy.images.decode import load_rgb, resize_crop
from mgn_deploy.images.listing import list_images
from mgn_deploy.images.prefetch import batched
from mgn_deploy.machine import usable_cpus

Decoder = Callable[[bytes], Image.Image]


def torchvision() -> Decoder:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    mode, uint8 = ImageReadMode.RGB, torch.uint8
    return lambda content: Image.fromarray(
        decode_jpeg(torch.frombuffer(bytearray(content), dtype=uint8), mode).permute(1, 2, 0).numpy()
    )


def simplejpeg() -> Decoder:
    import simplejpeg

    return lambda content: Image.fromarray(simplejpeg.decode_jpeg(content, "RGB"))


def pyvips() -> Decoder:
    import pyvips

    return lambda content: Image.fromarray(pyvips.Image.new_from_buffer(content, "", access="sequential").numpy())


def compare(
    decoders: Mapping[str, Callable[[bytes], Any]], contents: list[bytes], rounds: int, threads: int = 1
) -> dict[str, Any]:
    """Each decoder's CPU over the first one's, and its milliseconds of CPU an image; medians over rounds in turns."""
    taken = defaultdict(list)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            for name, decode in decoders.items():
                start = time.process_time()
                list(pool.map(lambda some, decode=decode: [decode(c) for c in some], batched(contents, 16)))
                taken[name].append((time.process_time() - start) / len(contents))
    first = next(iter(taken.values()))
    return {
        name: {"cpu": round(np.median(np.divide(s, first)), 3), "cpu_ms": round(np.median(s) * 1e3, 4)}
        for name, s in taken.items()
    }


def enlarged(content: bytes, times: int) -> bytes:
    image, out = load_rgb(content), io.BytesIO()
    image.resize((image.width * times, image.height * times)).save(out, "JPEG", quality=90)
    return out.getvalue()


def draft(embedder: Embedder, contents: list[bytes], rounds: int) -> dict[str, Any]:
    def whole(content: bytes) -> np.ndarray:
        return resize_crop(load_rgb(content), embedder.height, embedder.width)

    def scaled(content: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            image.draft("RGB", (2 * embedder.width, 2 * embedder.height))
            return resize_crop(image.convert("RGB"), embedder.height, embedder.width)

    one, other = (embedder.embed([way(content) for content in contents]).astype(float) for way in (whole, scaled))
    moved = 1 - np.sum(one * other, axis=1)
    moves = {"moved_median": float(np.median(moved)), "moved_worst": float(moved.max())}
    return compare({"whole": whole, "draft": scaled}, contents, rounds) | moves


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="folder whose first --count JPEG files are decoded")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--enlarge", type=int, default=1, help="the crops, bicubically so many times as large")
    parser.add_argument("--bundle", type=Path, help="whose embeddings tell what draft changes")
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    files = [file.path.read_bytes() for file in list_images(asked.images).files[: asked.count] if file.path]
    contents = [enlarged(content, asked.enlarge) if asked.enlarge > 1 else content for content in files]
    pixels = [np.asarray(load_rgb(content)) for content in contents]
    size = np.median([array.shape[1::-1] for array in pixels], axis=0).tolist()
    result: dict[str, Any] = {"Pillow": Image.__version__, "images": len(contents), "median_size": size}
    decoders: dict[str, Decoder] = {"load_rgb": load_rgb}
    for make in (torchvision, simplejpeg, pyvips):
        try:
            decoders[make.__name__] = make()
        except ImportError as error:
            result[make.__name__] = f"not installed: {error}"
    result["equal_pixels"] = {
        name: sum(map(np.array_equal, map(np.asarray, map(decode, contents)), pixels))
        for name, decode in decoders.items()
    }
    for threads in {1, usable_cpus()}:
        result[f"{threads} threads"] = compare(decoders, contents, asked.rounds, threads)
    if asked.bundle:
        result["draft"] = draft(Embedder.open(asked.bundle), contents, asked.rounds)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    with in_one_sentence():
        main()
