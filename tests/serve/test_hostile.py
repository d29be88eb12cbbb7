"""Three hundred of the requests of `hostile_requests.py`; 10,000 were sent by hand (docs/how-to/serve.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hostile_requests import attack, resident_mib
from serving import open_service, running

from mgn_deploy.serve.server import HttpServer


@pytest.fixture
def server(bundle_folder: Path, gallery_store: Path, tmp_path: Path) -> Iterator[HttpServer]:
    service = open_service(bundle_folder, gallery_store, tmp_path / "people", header_seconds=0.3, body_seconds=0.3)
    with running(service) as server:
        yield server


def test_hostile_requests_are_answered_or_cut_off_and_leave_nothing_behind(server: HttpServer, crops: Path) -> None:
    photo = next(crops.rglob("*.jpg")).read_bytes()
    attack(server.address, photo, 100)  # what is allocated once
    before, threads = resident_mib(os.getpid()), len(os.listdir("/proc/self/task"))
    endings = attack(server.address, photo, 200, seed=1)
    assert sum(endings.values()) == 200
    statuses = {ending.rpartition(" ")[2] for ending in endings}
    assert statuses <= {"200", "400", "401", "403", "404", "405", "408", "411", "413", "421", "422", "up"}, endings
    assert resident_mib(os.getpid()) < before + 100
    assert len(os.listdir("/proc/self/task")) <= threads + 8
    with httpx.Client(base_url=server.address) as client:
        assert client.get("/readyz").status_code == 200
        assert client.post("/embed", content=photo).status_code == 200
        assert client.get("/people").json()["people"] == []
