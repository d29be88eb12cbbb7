"""What goes over the wire: bodies of requests into uploads, and answers into bodies."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi.responses import JSONResponse, Response
from pydantic_core import to_json
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from mgn_deploy.errors import UserError
from mgn_deploy.serve.limits import Limits
from mgn_deploy.serve.service import Answer
from mgn_deploy.serve.uploads import Crop, TooLarge, Upload, parse_boxes

MAX_FIELD = 256 << 10  # bytes of a form's text field: boxes are the longest


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
        uploads = [Upload("the image", body)] if body else []
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


def json_answer(content: dict[str, Any], answer: Answer) -> Response:
    """The answer; 422 where not one image of the request could be read."""
    if not len(answer.rows):
        crop = answer.crops[0]
        more = f" (and {len(answer.crops) - 1} more)" if len(answer.crops) > 1 else ""
        return JSONResponse({"error": f"{shown(crop.name)} cannot be read: {crop.error}{more}"}, 422)
    # Python's own json takes 2 ms for 2048 numbers, this one a tenth of it.
    return Response(to_json(content), media_type="application/json", headers=timing(answer))


def timing(answer: Answer) -> dict[str, str]:
    """What took how long, in ms, as the header Server-Timing."""
    return {"server-timing": ", ".join(f"{step};dur={1000 * took:.2f}" for step, took in answer.seconds.items())}


def crop_fields(crop: Crop) -> dict[str, Any]:
    """What every answer says of a crop."""
    return {"image": shown(crop.name), "box": crop.box, "error": crop.error and shown(crop.error)}


def shown(text: str) -> str:
    """As UTF-8 can carry it."""
    return text.encode("utf-8", "backslashreplace").decode()


def refuse_fields(fields: dict[str, str]) -> None:
    """Raise UserError where a form had text fields that nobody has taken."""
    for name in fields:
        raise UserError(f"the form has a field {name!r} that is not known: image and boxes are")


def all_readable(answer: Answer) -> Answer:
    """The answer, where every crop was embedded; else raises UserError with the first reason."""
    for crop in answer.crops:
        if crop.error:
            raise UserError(f"{shown(crop.name)} cannot be read: {shown(crop.error)}")
    return answer
