"""The answers' shapes, and what OpenAPI is told of the requests."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel, Field

from mgn_deploy.backends.remote import NPY
from mgn_deploy.serve.uploads import Box

Far = Annotated[float, Query(description="False-accept rate at which the threshold is drawn.", gt=0, lt=1)]


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
    time_s: float | None = Field(description="Seconds from the video's start.")
    thumbnail: str = Field(description="Path of its thumbnail on this server.")


class SearchedCrop(CropAnswer):
    results: list[Result] | None = Field(description="The nearest first; null where there is an error.")


class SearchAnswer(BaseModel):
    bundle_id: str
    crops: list[SearchedCrop]
    prior: float | None = Field(
        description="The share of pairs of one person that probabilities assume, estimated from the gallery."
    )
    far: float | None = Field(description="The false-accept rate of the threshold; null without a calibration.")
    threshold: float | None = Field(description="At or above it a result is called the same person.")
    note: str | None = Field(description="What a reader must know of the threshold and the filters.")


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
    pairs: int = Field(description="Of images, whose mean cosine the similarity is.")


class IdentityAnswer(BaseModel):
    queries: list[str] = Field(description="The images, by their names.")
    name: str | None = Field(description="Null for somebody who is not enrolled, and without a calibration.")
    probability: float | None
    known: bool | None = Field(description="Null without a calibration.")
    threshold: float | None
    far: float | None
    candidates: list[CandidateAnswer] = Field(description="The most similar people, best first.")
    calibrated_for: int | None = Field(
        description="Images of a person whose mean similarity the threshold was learned of; null without a calibration."
    )
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
    notes: list[str] = Field(description="What looks like a mistake: an image of two people, somebody who looks alike.")


class PeopleAnswer(BaseModel):
    people: list[PersonAnswer]


class StoreAnswer(BaseModel):
    name: str
    images: int
    failures: int
    found: int | None = Field(description="Images in the folder that is being embedded, counted once a minute.")
    cameras: dict[int, int] = Field(description="Images of each camera.")
    seconds: tuple[float, float] | None = Field(description="The first and the last time of images of videos.")


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


_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_FORM: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
            "boxes": {
                "type": "string",
                "description": "JSON: [[left, top, width, height], ...], one such list an image.",
            },
        },
    }
}
_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"image/*": _IMAGE, "multipart/form-data": _FORM}}
}
CROPS: dict[str, Any] = {"requestBody": {"required": True, "content": {**_BODY["requestBody"]["content"], NPY: _IMAGE}}}
NAMED: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    **_FORM["schema"],
                    "required": ["name", "image"],
                    "properties": {**_FORM["schema"]["properties"], "name": {"type": "string"}},
                }
            }
        },
    }
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": why}
    for status, why in {
        401: "The API key is missing or wrong.",
        408: "The body did not arrive in time.",
        413: "More bytes, pixels or images than the limits.",
        422: "No image of the request can be read, or a parameter is wrong.",
        503: "The queue is full; Retry-After says for how long, in seconds.",
        507: "This machine cannot write to its folder of people.",
    }.items()
}


def asks(answer: type[BaseModel], body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What OpenAPI is told of a route that takes images."""
    return {"response_model": answer, "responses": _PROBLEMS, "openapi_extra": body or _BODY}


def only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Those of a route that takes no image."""
    return {status: _PROBLEMS[status] for status in statuses}
