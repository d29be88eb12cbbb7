"""Photos decoded and resized by nvImageCodec, and the proof that their embeddings are those of Pillow's pixels."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from mgn_deploy.choices import Precision
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import GateFailed, UnreadableImage
from mgn_deploy.gallery.profile import Profile
from mgn_deploy.gallery.sources import Decoded, Source, clipped, file_bytes, is_unlike_crop, photos_of
from mgn_deploy.images.listing import ImageFile
from mgn_deploy.images.memory import reading
from mgn_deploy.images.nvimagecodec import NvImageCodec
from mgn_deploy.images.prefetch import batched, decoding_threads, in_order

if TYPE_CHECKING:
    from torch import Tensor

PHOTOS = 16  # that are decoded together
PROVEN = 32  # crops that are compared
# How far embeddings may move (1 - cosine): as far as an engine's may lie from PyTorch's in FP32, and in FP16.
FARTHEST: dict[Precision, float] = {"fp32": 1e-5, "fp16": 1e-4, "bf16": 1e-4, "int8": 1e-4}
_log = logging.getLogger("mgn_deploy")


@dataclass
class DecoderProof:
    """A decoder's crops beside Pillow's, and the same engine's embeddings of both.

    Attributes:
        preprocessing: the id of the decoder's pixels, which the store has.
        images: that were compared, the run's first.
        changed_values: the share of their pixels' values that differ.
        largest_change: of a value, of 255.
        largest_distance: 1 - cosine of an image's two embeddings.
        by_pillow: images of the run that Pillow decoded, as they are no whole JPEG.
    """

    preprocessing: str
    images: int = 0
    changed_values: float = 0.0
    largest_change: int = 0
    largest_distance: float = 0.0
    by_pillow: int = 0


def decode_on(
    codec: NvImageCodec,
    files: Sequence[ImageFile],
    height: int,
    width: int,
    profile: Profile | None = None,
    threads: int | None = None,
) -> Iterator[Decoded]:
    """What `Source.decode` gives of photos, by a codec: in order, ahead of the caller, a photo once for its boxes.

    The threads read files, and wait for each other at the device, which has one call at a time.
    """
    device, workers = Lock(), threads or decoding_threads()
    profile = profile or Profile()

    def crops(photos: list[list[ImageFile]]) -> list[Decoded]:
        with ExitStack() as held:
            held.enter_context(reading(sum(photo[0].size or 0 for photo in photos)))
            with profile.on_thread("read"):
                contents = [_content(photo[0]) for photo in photos]
            held.enter_context(device)
            with profile.on_thread("decode"):
                decoded = codec.decode([content for content in contents if isinstance(content, bytes)])
                images = [next(decoded) if isinstance(content, bytes) else content for content in contents]
            with profile.on_thread("resize"):
                return [
                    _crop(codec, file, image, content, height, width)
                    for photo, content, image in zip(photos, contents, images, strict=True)
                    for file in photo
                ]

    groups = batched(photos_of(files), PHOTOS)
    for group in in_order(crops, groups, ahead=2 * workers, threads=workers):
        yield from group


def prove_codec(codec: NvImageCodec, source: Source, embedder: Embedder) -> DecoderProof:
    """Compare the codec's first crops of a source with Pillow's, by an engine's embeddings of both.

    Raises:
        UserError: the embedder has no bundle, whose precision says how far embeddings may move.
        GateFailed: they move farther than `FARTHEST` allows.
    """
    precision = embedder.bundle.manifest.precision
    first, size = source.files[: 2 * PROVEN], (embedder.height, embedder.width)
    both = zip(source.decode(first, *size), decode_on(codec, first, *size), strict=True)
    pairs = [(one.pixels, other.pixels) for one, other in both if one.pixels is not None and other.pixels is not None][
        :PROVEN
    ]
    proof = DecoderProof(codec.preprocessing, len(pairs))
    if not pairs:
        return proof
    pillow, ours = (np.stack(pixels) for pixels in zip(*pairs, strict=True))
    change = np.abs(pillow.astype(np.int16) - ours)
    proof.changed_values, proof.largest_change = float((change > 0).mean()), int(change.max())
    one, other = (embedder.embed(pixels).astype(np.float64) for pixels in (pillow, ours))
    proof.largest_distance = max(0.0, 1 - float((one * other).sum(axis=1).min()))
    told = (
        f"{codec.preprocessing} beside Pillow on {len(pairs)} images: {proof.changed_values:.2%} of the values differ, "
        f"by at most {proof.largest_change} of 255; embeddings by at most {proof.largest_distance:.1e} (1 - cosine)"
    )
    if not proof.largest_distance <= FARTHEST[precision]:
        raise GateFailed(f"{told}, which may be {FARTHEST[precision]:.0e} in {precision}: use --decoder pillow")
    _log.info(told)
    codec.by_pillow = 0
    return proof


def _content(file: ImageFile) -> bytes | UnreadableImage:
    try:
        return file_bytes(file)
    except UnreadableImage as problem:
        return problem


def _crop(
    codec: NvImageCodec,
    file: ImageFile,
    image: Tensor | UnreadableImage,
    content: bytes | UnreadableImage,
    height: int,
    width: int,
) -> Decoded:
    if isinstance(image, UnreadableImage):
        return Decoded(file, error=str(image).encode("utf-8", "backslashreplace").decode())
    assert isinstance(content, bytes)
    tall, wide = image.shape[:2]
    try:
        left, top, right, bottom = clipped(file.box, wide, tall)
    except UnreadableImage as problem:
        return Decoded(file, error=str(problem))
    pixels = codec.resize(image[top:bottom, left:right], height, width)
    return Decoded(file, pixels, None, hashlib.sha256(content).digest(), is_unlike_crop(file, wide, tall))
