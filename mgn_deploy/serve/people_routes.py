"""Questions about people: `/identify`, `/enrol` and `/people`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response

from mgn_deploy.identity.calibration import DEFAULT_FAR
from mgn_deploy.identity.enrol import enrol_embeddings
from mgn_deploy.identity.identify import identify
from mgn_deploy.identity.person import check_name
from mgn_deploy.serve.answers import NAMED, EnrolAnswer, Far, IdentifyAnswer, PeopleAnswer, PersonAnswer, asks, only
from mgn_deploy.serve.service import Service
from mgn_deploy.serve.uploads import image_hash
from mgn_deploy.serve.wire import all_readable, crop_fields, json_answer, read_uploads, refuse_fields, shown


def add_people(app: FastAPI, service: Service, run: Callable[..., Any]) -> None:
    limits, bundle_id = service.limits, service.embedder.bundle.id

    @app.post("/identify", summary="Who of the enrolled people it is, or nobody", **asks(IdentifyAnswer))
    async def identify_crops(
        request: Request,
        far: Far = DEFAULT_FAR,
        together: Annotated[bool, Query(description="All images show one person.")] = False,
    ) -> Response:
        people = service.require_people()
        uploads, fields = await read_uploads(request, limits)
        refuse_fields(fields)

        def answer_json() -> Response:
            enrolled = people.load()
            answer = service.embed(uploads)
            names = [shown(crop.name) for crop in answer.crops if not crop.error]
            answers = (
                identify(answer.rows, enrolled, service.calibration, names=names, far=far, together=together)
                if len(answer.rows) and enrolled.people
                else []
            )
            found = {
                "crops": [crop_fields(crop) for crop in answer.crops],
                "answers": [one.to_dict() for one in answers],
            }
            return json_answer({"bundle_id": bundle_id, **found}, answer)

        return await run(answer_json)

    @app.post(
        "/enrol",
        summary="Enrol a person by images; one that cannot be read and nothing is changed",
        **asks(EnrolAnswer, NAMED),
    )
    async def enrol(request: Request) -> Response:
        people = service.require_people()
        uploads, fields = await read_uploads(request, limits)
        name = check_name(fields.pop("name", ""))
        refuse_fields(fields)

        def answer_json() -> Response:
            answer = all_readable(service.embed(uploads))
            crops = [(upload, box) for upload in uploads for box in upload.boxes or [None]]
            hashes, titles = [image_hash(*crop) for crop in crops], [upload.name for upload, _ in crops]
            with enrolling:
                done = enrol_embeddings(name, answer.rows, hashes, titles, people.folder, service.calibration)
            return json_answer(done.to_dict(), answer)

        return await run(answer_json)

    enrolling = threading.Lock()  # for the number of new images alone: the folder has a lock of its own

    @app.get("/people", summary="Who is enrolled", responses=only(422))
    async def list_people() -> PeopleAnswer:
        enrolled = await run(service.require_people().load)
        return PeopleAnswer(people=[PersonAnswer(**person.to_dict()) for person in enrolled.people])

    @app.delete("/people", summary="Forget a person", responses=only(422))
    async def forget(name: str) -> PersonAnswer:
        people = service.require_people()
        return PersonAnswer(**(await run(lambda: people.folder.remove(name))).to_dict())
