"""Uploaded bytes into crops: limits first, then pixels, then boxes."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.images.decode import MIN_SIDE, open_rgb, resize_crop
from mgn_deploy.serve.limits import Limits

# A progressive JPEG has about ten scans. Each costs a pass over all pixels and can be a few bytes long.
MAX_SCANS = 100
_START_OF_SCAN = b"\xff\xda"

# left, top, width, height in pixels of the image as it is shown, that is after its EXIF rotation.
Box = tuple[float, float, float, float]


class TooLarge(Exception):
    """More bytes, pixels or images than the limits allow: status 413."""


@dataclass(frozen=True)
class Upload:
    """One image of a request, not decoded yet.

    Attributes:
        name: the file's name as the client gave it, or its number.
        content: the file's bytes.
        boxes: what to cut out; None: the whole image is the crop.
    """

    name: str
    content: bytes
    boxes: tuple[Box, ...] | None = None

    @property
    def count(self) -> int:
        """Crops that it asks for."""
        return 1 if self.boxes is None else len(self.boxes)


@dataclass(frozen=True)
class Crop:
    """What an upload, or one of its boxes, became.

    Attributes:
        name: of the upload.
        box: the box as it was cut, clipped at the border; None of a whole image.
        pixels: uint8 `[height, width, 3]`; None where there is an error.
        error: why it cannot be embedded, or None.
    """

    name: str
    box: Box | None
    pixels: np.ndarray | None
    error: str | None


def image_hash(upload: Upload, box: Box | None) -> str:
    """Hex SHA-256 of an image's bytes, and of the box that is cut out of it."""
    return hashlib.sha256(upload.content + (b"" if box is None else json.dumps(box).encode())).hexdigest()


def check_count(uploads: Sequence[Upload], limits: Limits) -> int:
    """The crops of a request.

    Raises:
        TooLarge: more than the limit.
        UserError: none at all.
    """
    count = sum(upload.count for upload in uploads)
    if count > limits.images:
        raise TooLarge(f"{count} crops in one request, and the limit is {limits.images}: send several requests")
    if not count:
        raise UserError("the request holds no image: send its bytes as the body, or files in multipart fields `image`")
    return count


def decode(upload: Upload, height: int, width: int, limits: Limits) -> list[Crop]:
    """The crops of an upload: one, or one a box. What cannot be read or cut has an error instead of pixels.

    Raises:
        TooLarge: the image has more pixels than the limit.
    """
    try:
        _check_pixels(upload, limits)
        with open_rgb(upload.content) as image:
            if upload.boxes is None:
                return [Crop(upload.name, None, resize_crop(image, height, width), None)]
            return [_cut(upload.name, image, box, height, width) for box in upload.boxes]
    except UnreadableImage as error:
        return [Crop(upload.name, box, None, str(error)) for box in upload.boxes or [None]]


def _check_pixels(upload: Upload, limits: Limits) -> None:
    try:
        with Image.open(io.BytesIO(upload.content)) as image:
            pixels, kind = image.width * image.height, image.format
    except Image.DecompressionBombError:
        pixels, kind = limits.pixels + 1, None
    except Exception:
        return  # `open_rgb` says in its words what is wrong with it
    if pixels > limits.pixels:
        raise TooLarge(f"{upload.name}: the limit is {limits.pixels / 1e6:g} megapixels an image")
    if kind in ("JPEG", "MPO") and upload.content.count(_START_OF_SCAN) > MAX_SCANS:
        raise TooLarge(f"{upload.name}: a JPEG of more than {MAX_SCANS} scans")


def _cut(name: str, image: Image.Image, box: Box, height: int, width: int) -> Crop:
    left, top = max(0, round(box[0])), max(0, round(box[1]))
    right, bottom = min(image.width, round(box[0] + box[2])), min(image.height, round(box[1] + box[3]))
    if right - left < MIN_SIDE or bottom - top < MIN_SIDE:
        return Crop(name, box, None, f"the box {list(box)} has no {MIN_SIDE} pixels a side inside of the image")
    crop = resize_crop(image.crop((left, top, right, bottom)), height, width)
    return Crop(name, (left, top, right - left, bottom - top), crop, None)


def parse_boxes(text: str, images: int) -> list[tuple[Box, ...] | None]:
    """The boxes of a request, one entry an image: JSON, `[[left, top, width, height], ...]` for one image, or a list
    with such a list, or null for the whole image, for each of several.

    Raises:
        UserError: anything else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError("boxes is not JSON: send [[left, top, width, height], ...]") from None
    if images == 1 and isinstance(value, list) and not (len(value) == 1 and _is_list_of_boxes(value[0])):
        value = [value]
    if not isinstance(value, list) or len(value) != images:
        raise UserError(f"boxes must be one list of boxes, or null, for each of the {images} images")
    return [None if one is None else tuple(_box(box) for box in _boxes(one)) for one in value]


def _is_list_of_boxes(value: object) -> bool:
    return value is None or (isinstance(value, list) and bool(value) and isinstance(value[0], list))


def _boxes(value: object) -> list[object]:
    if not isinstance(value, list) or not value:
        raise UserError("the boxes of an image are a list that is not empty, or null for the whole image")
    return value


def _box(value: object) -> Box:
    numbers = isinstance(value, list) and len(value) == 4 and all(type(one) in (int, float) for one in value)
    if not numbers or not all(abs(one) < 1e6 for one in value) or value[2] <= 0 or value[3] <= 0:  # type: ignore[index, attr-defined]
        raise UserError("a box is [left, top, width, height] in pixels, width and height above 0")
    return tuple(value)  # type: ignore[arg-type, return-value]


def parse_crops(content: bytes, height: int, width: int, limits: Limits) -> np.ndarray:
    """Crops that a client has decoded: a `.npy` file of uint8 `[n, height, width, 3]`.

    Raises:
        UserError: it holds something else, or not as many bytes as it says.
        TooLarge: more crops than the limit.
    """
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception:  # a header is a Python literal: whatever it parses to can fail
        raise UserError("the body is no .npy file (version 1.0)") from None
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[1:] != (height, width, 3) or shape[0] < 1:
        raise UserError(
            f"the crops are {dtype} {list(shape)}, and this model takes uint8 [n, {height}, {width}, 3] in C order"
        )
    if shape[0] > limits.images:
        raise TooLarge(f"{shape[0]} crops in one request, and the limit is {limits.images}: send several requests")
    size = shape[0] * height * width * 3
    if len(content) - file.tell() != size:
        raise UserError(f"the .npy file has {len(content) - file.tell()} bytes of pixels instead of {size}")
    return np.frombuffer(content, np.uint8, offset=file.tell()).reshape(shape)
