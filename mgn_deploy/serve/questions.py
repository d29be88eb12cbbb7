"""Questions about images: `/embed`, `/search` and `/compare`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response

from mgn_deploy.backends.remote import NPY, npy
from mgn_deploy.errors import UserError
from mgn_deploy.identity.calibration import DEFAULT_FAR, Calibration, Decision
from mgn_deploy.identity.compare import compare
from mgn_deploy.serve.answers import CROPS, CompareAnswer, EmbedAnswer, Far, SearchAnswer, asks
from mgn_deploy.serve.gallery import Hit
from mgn_deploy.serve.service import Service
from mgn_deploy.serve.uploads import parse_crops
from mgn_deploy.serve.wire import (
    all_readable,
    crop_fields,
    json_answer,
    read_uploads,
    refuse_fields,
    shown,
    timing,
)


def add_questions(app: FastAPI, service: Service, run: Callable[..., Any]) -> None:
    embedder, limits = service.embedder, service.limits
    bundle_id = embedder.bundle.id

    @app.post("/embed", summary="Embeddings of images, or of boxes in them", **asks(EmbedAnswer, CROPS))
    async def embed(request: Request) -> Response:
        if request.headers.get("content-type") == NPY:
            crops = parse_crops(await request.body(), embedder.height, embedder.width, limits)
            answer = await run(lambda: service.embed_crops(list(crops)))
            return Response(npy(answer.rows), media_type=NPY, headers=timing(answer) | {"mgn-bundle-id": bundle_id})
        uploads, fields = await read_uploads(request, limits)
        refuse_fields(fields)

        def answer_json() -> Response:
            answer = service.embed(uploads)
            rows = iter(answer.rows.tolist())
            crops = [{**crop_fields(crop), "embedding": None if crop.error else next(rows)} for crop in answer.crops]
            return json_answer({"bundle_id": bundle_id, "crops": crops}, answer)

        return await run(answer_json)

    @app.post("/search", summary="The nearest gallery images", **asks(SearchAnswer))
    async def search(
        request: Request,
        k: Annotated[int, Query(description="Most results.", ge=1)] = 10,
        camera: Annotated[list[int] | None, Query(description="Results of these cameras alone.")] = None,
        after: Annotated[float | None, Query(description="From this second of the video on.")] = None,
        before: Annotated[float | None, Query(description="Before this second of the video.")] = None,
        far: Far = DEFAULT_FAR,
    ) -> Response:
        service.require_gallery()
        uploads, fields = await read_uploads(request, limits)
        refuse_fields(fields)

        def answer_json() -> Response:
            decision = None if service.calibration is None else service.calibration.decide(far)
            answer = service.embed(uploads)
            lists = iter(service.search(answer, k, cameras=camera, after=after, before=before))
            gallery = service.require_gallery()
            prior = None if service.calibration is None else gallery.prior(service.calibration)
            crops = [
                {**crop_fields(crop), "results": None if crop.error else _hits(next(lists), service.calibration, prior)}
                for crop in answer.crops
            ]
            drawn = _drawn(decision)
            notes = filter(None, (gallery.unfit_filter(camera, after, before), drawn["note"]))
            return json_answer(
                {"bundle_id": bundle_id, "crops": crops, "prior": prior, **drawn, "note": "; ".join(notes) or None},
                answer,
            )

        return await run(answer_json)

    @app.post("/compare", summary="Whether two images show one person", **asks(CompareAnswer))
    async def compare_two(request: Request, far: Far = DEFAULT_FAR) -> Response:
        uploads, fields = await read_uploads(request, limits)
        refuse_fields(fields)
        if sum(upload.count for upload in uploads) != 2:
            raise UserError("compare takes two images, or one image with two boxes")

        def answer_json() -> Response:
            answer = all_readable(service.embed(uploads))
            found = compare(answer.rows[0], answer.rows[1], service.calibration, far=far)
            return json_answer({"bundle_id": bundle_id, **found.to_dict()}, answer)

        return await run(answer_json)


def _hits(hits: list[Hit], calibration: Calibration | None, prior: float | None) -> list[dict[str, Any]]:
    similarities = np.array([hit.similarity for hit in hits])
    probabilities = [None] * len(hits) if calibration is None else calibration.probability(similarities, prior).tolist()
    return [
        {
            "rank": rank,
            "name": shown(hit.row.name),
            "similarity": round(hit.similarity, 6),
            "probability": probability,
            "identity": hit.row.identity,
            "camera": hit.row.camera,
            "time_s": hit.row.time_s,
            "thumbnail": f"/thumbs/{hit.key}",
        }
        for rank, (hit, probability) in enumerate(zip(hits, probabilities, strict=True), 1)
    ]


def _drawn(decision: Decision | None) -> dict[str, Any]:
    """A threshold as the answers give it."""
    if decision is None:
        return {"far": None, "threshold": None, "note": None}
    return {"far": decision.far, "threshold": decision.threshold, "note": decision.problem}
