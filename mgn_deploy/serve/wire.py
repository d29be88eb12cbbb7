"""What goes over the wire: the requests' bodies into uploads, and the answers' shapes."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator
from dataclasses import replace

import numpy as np
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from mgn_deploy.errors import UserError
from mgn_deploy.serve.limits import Limits
from mgn_deploy.serve.uploads import Box, TooLarge, Upload, parse_boxes

NPY = "application/x-npy"
MAX_FIELD = 256 << 10  # bytes of a form's text field: boxes are the longest


class Problem(BaseModel):
    """Any answer that is no success."""

    error: str = Field(description="One sentence: what is wrong, and how to fix it.")


class CropAnswer(BaseModel):
    """An image, or one of its boxes."""

    image: str = Field(description="The file's name as it was sent, or its number.")
    box: Box | None = Field(description="left, top, width, height as it was cut; null of a whole image.")
    error: str | None = Field(description="Why it could not be embedded; null where it was.")


class EmbeddedCrop(CropAnswer):
    embedding: list[float] | None = Field(description="A unit vector; null where there is an error.")


class EmbedAnswer(BaseModel):
    bundle_id: str
    crops: list[EmbeddedCrop]


class Result(BaseModel):
    rank: int
    name: str = Field(description="Below the gallery's source folder; bytes that are not UTF-8 as \\xNN.")
    similarity: float = Field(description="Cosine.")
    probability: float | None = Field(description="That it is one person with the image; null without a calibration.")
    identity: int | None
    camera: int | None
    thumbnail: str = Field(description="Path of its thumbnail on this server.")


class SearchedCrop(CropAnswer):
    results: list[Result] | None = Field(description="The nearest first; null where there is an error.")


class SearchAnswer(BaseModel):
    bundle_id: str
    crops: list[SearchedCrop]
    far: float | None = Field(description="The false-accept rate of the threshold; null without a calibration.")
    threshold: float | None = Field(description="At or above it a result is called the same person.")
    note: str | None = Field(description="What a reader must know of the threshold.")


class CompareAnswer(BaseModel):
    bundle_id: str
    similarity: float = Field(description="Cosine of the two embeddings.")
    probability: float | None = Field(description="That it is one person; null without a calibration, as all below.")
    prior: float | None
    same: bool | None = Field(description="Whether the similarity reaches the threshold.")
    far: float | None
    threshold: float | None
    note: str | None


class CandidateAnswer(BaseModel):
    name: str
    similarity: float
    probability: float | None


class IdentityAnswer(BaseModel):
    queries: list[str] = Field(description="The images, by their names.")
    name: str | None = Field(description="Null for somebody who is not enrolled, and without a calibration.")
    probability: float | None
    known: bool | None = Field(description="Null without a calibration.")
    threshold: float | None
    far: float | None
    candidates: list[CandidateAnswer] = Field(description="The most similar people, best first.")
    note: str | None


class IdentifyAnswer(BaseModel):
    bundle_id: str
    crops: list[CropAnswer]
    answers: list[IdentityAnswer] = Field(
        description="One for each crop without an error; with `together` one for all."
    )


class PersonAnswer(BaseModel):
    name: str
    images: int
    enrolled: str = Field(description="When first, UTC in ISO 8601.")


class EnrolAnswer(PersonAnswer):
    added: int = Field(description="Images that were not enrolled as this person before.")


class PeopleAnswer(BaseModel):
    people: list[PersonAnswer]


class StoreAnswer(BaseModel):
    name: str
    images: int
    failures: int
    found: int | None = Field(description="Images in the folder that is being embedded, counted once a minute.")
    cameras: dict[int, int] = Field(description="Images of each camera.")


class About(BaseModel):
    version: str
    bundle_id: str
    model: str
    backend: str
    backend_version: str
    device: str
    height: int
    width: int
    dim: int
    preprocessing: str
    batch: int
    max_images: int
    max_body_bytes: int
    gallery: bool
    people: bool
    calibrated: bool


class _InMemory(MultiPartParser):
    """Starlette's without its temporary files: the body's size is bounded, and the disk may be read-only."""

    spool_max_size = 1 << 40


async def read_uploads(request: Request, limits: Limits) -> tuple[list[Upload], dict[str, str]]:
    """The images of a request, with their boxes, and its other text fields. The image is the body itself, or images are
    the files of a form's fields `image`; boxes come as the field, or the query parameter, `boxes`.

    Raises:
        UserError: a broken form, fields that are not known, or boxes that are none.
        TooLarge: more files than the limit.
    """
    fields: dict[str, str] = {}
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
        uploads, fields = await _read_form(request, limits)
    else:
        body = await request.body()
        uploads = [Upload("0", body)] if body else []
    boxes = fields.pop("boxes", None) or request.query_params.get("boxes")
    if boxes and uploads:
        uploads = [
            replace(upload, boxes=one) for upload, one in zip(uploads, parse_boxes(boxes, len(uploads)), strict=True)
        ]
    return uploads, fields


async def _read_form(request: Request, limits: Limits) -> tuple[list[Upload], dict[str, str]]:
    parser = _InMemory(
        request.headers, _stream(request), max_files=limits.images + 1, max_fields=16, max_part_size=MAX_FIELD
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise TooLarge(f"the limit is {limits.images} images a request: send several requests") from None
        raise UserError(f"the form cannot be read: {error.message}") from None
    except (ValueError, LookupError) as error:  # header values that are no text
        raise UserError(f"the form cannot be read: {error}") from None
    uploads: list[Upload] = []
    fields: dict[str, str] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, str):
                fields[name] = value
            elif name == "image":
                uploads.append(await _read_file(value, len(uploads)))
            else:
                raise UserError(f"the form has a file in the field {name!r}: images go into fields `image`")
    finally:
        await form.close()
    return uploads, fields


async def _read_file(file: UploadFile, number: int) -> Upload:
    return Upload(file.filename or str(number), await file.read())


async def _stream(request: Request) -> AsyncGenerator[bytes, None]:
    yield await request.body()


def npy(array: np.ndarray) -> bytes:
    """The bytes of a `.npy` file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()
