"""`mgn-deploy serve`: its limits, how it ends, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from mgn_deploy.errors import UserError
from mgn_deploy.serve.limits import Limits


@pytest.mark.parametrize("limit", ["batch", "queued", "body_bytes", "images", "body_seconds"])
def test_limits_are_above_zero(limit: str) -> None:
    with pytest.raises(UserError, match=limit):
        Limits(**{limit: 0})


def test_a_request_must_fit_the_queue() -> None:
    with pytest.raises(UserError, match="queue of 10"):
        Limits(queued=10, images=11)


def start_command(bundle: Path, *options: str, **environment: str) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "mgn_deploy", "serve", "--bundle", bundle, "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    return process, process.stdout.readline().strip()


def test_where_nobody_reads_the_address_it_ends_as_a_pipe_does(bundle_folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mgn_deploy", "serve", "--bundle", bundle_folder, "--port", "0"]
    done = subprocess.run(
        [*command, "--backend", "onnxruntime"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=100
    )
    os.close(write)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_once_what_was_taken_is_answered(bundle_folder: Path, crops: Path, number: int) -> None:
    process, address = start_command(bundle_folder, "--backend", "onnxruntime")
    paths = sorted(crops.rglob("*.jpg"))
    files = [("image", (path.name, path.read_bytes())) for path in paths]
    try:
        with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=address, timeout=60) as client:
            client.get("/healthz")
            asked = [pool.submit(client.post, "/embed", files=files) for _ in range(4)]
            while not float(metric(address, "mgn_queued_images")):
                time.sleep(0.002)
            process.send_signal(number)
            statuses = [one.result(60).status_code for one in asked]
        assert 200 in statuses
        assert set(statuses) <= {200, 503}
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/healthz")
    finally:
        process.kill()
        process.communicate()


def metric(address: str, name: str) -> str:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(line.split()[-1] for line in lines if line.startswith(f"{name} "))


def test_the_command_refuses_what_others_could_reach(bundle_folder: Path) -> None:
    process, address = start_command(bundle_folder, "--host", "0.0.0.0", MGN_DEPLOY_API_KEY="")
    _, errors = process.communicate(timeout=60)
    assert (address, process.returncode) == ("", 2)
    assert "MGN_DEPLOY_API_KEY" in errors.splitlines()[-1]


def test_every_limit_is_in_the_documentation_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/serve.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page, re.MULTILINE))
    defaults = {field.name: float(field.default) for field in dataclasses.fields(Limits)}
    assert {name: float(value) for name, value in documented.items()} == defaults
