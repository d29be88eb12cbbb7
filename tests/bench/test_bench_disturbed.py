"""What disturbs a bench, and what a machine does not tell of itself."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mgn_deploy.bench import contenders, environment, speed
from mgn_deploy.bench.environment import Meter
from mgn_deploy.bench.speed import measure
from mgn_deploy.cuda.management import Management


def test_a_busy_loop_beside_is_reported_as_noise(bundle_folder, crops):
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        result = measure(
            [bundle_folder], engines=["onnxruntime"], batches=[1], images=crops, count=4, minutes=0.08, reference=False
        )
    finally:
        busy.kill()
        busy.wait()
    (row,) = result.rows
    assert row.noise.disturbed
    assert row.noise.others > 0.25
    assert any("other processes used" in flag for flag in row.noise.flags)


@pytest.mark.parametrize(
    ("busy", "steal", "own", "flags"),
    [
        (1.02, 0.0, 1.0, []),
        (1.9, 0.0, 1.0, ["other processes used 0.90 CPUs"]),
        (1.0, 0.5, 1.0, ["the hypervisor took 50.0% of the time"]),
    ],
)
def test_work_of_others_and_theft_are_told_and_our_own_work_is_not(monkeypatch, busy, steal, own, flags):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    meter = Meter()
    meter.grown = np.array([1.0, busy, steal, own, 0])
    noise = meter.noise(0.01)
    assert (noise.flags, noise.disturbed) == (flags, bool(flags))


@pytest.mark.parametrize("named", ["Event", "Throttle"])  # by drivers since 535, and by older ones
def test_clocks_that_are_held_down_are_told_by_any_driver(monkeypatch, named):
    def reasons(device, value):
        value._obj.value = 0x4 | 0x40
        return 0

    calls = {"nvmlInit_v2": lambda: 0, "nvmlDeviceGetHandleByIndex_v2": lambda *_: 0}
    calls[f"nvmlDeviceGetCurrentClocks{named}Reasons"] = reasons
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(**calls))
    assert Management().slowed() == ["power cap", "thermal"]
    assert Management().joules() is None


def test_images_come_again_where_a_run_is_longer_than_they_are(embedder, tmp_path):
    paths = [tmp_path / f"{name}.jpg" for name in "abcde"]
    for path in paths:
        path.write_text(path.stem)
    images = contenders.Images(paths, [], np.arange(5).reshape(5, 1, 1, 1))
    contender = contenders.Contender(SimpleNamespace(batch=2, images=6, engine="onnxruntime"), embedder, images, ())
    contender.copy_files(tmp_path / "files")
    assert "".join(path.read_text() for path in sorted((tmp_path / "files").iterdir())) == "abcdab"  # whole batches
    assert [contender._batch(at).ravel().tolist() for at in (0, 2, 4)] == [[0, 1], [2, 3], [0, 1]]


def test_energy_is_not_counted_where_the_counter_began_again(embedder, monkeypatch):
    readings = iter([10.0, 25.0, 262_000.0, 5.0])
    monkeypatch.setattr(contenders, "joules", lambda: (next(readings), "CPU package-0"))
    images = contenders.Images([Path()], [b""], np.zeros((1, embedder.height, embedder.width, 3), np.uint8))
    contender = contenders.Contender(SimpleNamespace(batch=1, images=1), embedder, images, ())
    for _ in range(2):
        assert contender._offline() > 0
    assert (contender.energy, contender.embedded) == (15.0, 1)


def test_a_copy_that_somebody_elses_repository_does_not_track_has_no_commit(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "environment.py").touch()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    assert environment._commit() is None
    git("add", ".")
    git("commit", "-m", "with it")
    assert environment._commit() == git("rev-parse", "HEAD")


def test_where_cupti_shows_no_kernel_a_gpus_time_is_not_zero(embedder, monkeypatch):
    monkeypatch.setattr("torch.profiler.profile", lambda **_: nullcontext(SimpleNamespace(events=list)))
    row = SimpleNamespace(batch=1, not_measured={})
    images = SimpleNamespace(crops=np.zeros((1, embedder.height, embedder.width, 3), np.uint8))
    speed._gpu_times(SimpleNamespace(row=row, images=images, embedder=embedder), calls=1)
    assert "CUPTI" in row.not_measured["gpu_ms"]


def test_rounds_that_vary_are_told_and_disturb_nothing():
    noise = Meter().noise(0.2)
    assert (noise.flags, noise.disturbed) == (["the rounds vary by 20.0%"], False)
