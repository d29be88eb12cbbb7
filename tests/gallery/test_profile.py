"""`embed --profile`: where a real run's time went, and what it says is to be changed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import mgn_deploy

from mgn_deploy.embedder import Embedder
from mgn_deploy.gallery import run as gallery_run
from mgn_deploy.gallery import sources, writer
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.profile import LOOP_STAGES, THREAD_STAGES, WAIT_FOR_ENGINE, Profile
from mgn_deploy.gallery.store import Store
from mgn_deploy.images.prefetch import decoding_threads


def profile_of(crops: Path, store: Path, embedder: Embedder) -> Profile:
    profile = embed_folder(crops, store, embedder, profile=True).profile
    assert profile is not None
    return profile


def test_the_loops_stages_add_up_to_its_wall_time(crops, embedder, tmp_path, monkeypatch):
    walls = []
    run = gallery_run.Run.embed

    def timed(*arguments):
        start = time.perf_counter()
        run(*arguments)
        walls.append(time.perf_counter() - start)

    monkeypatch.setattr(gallery_run.Run, "embed", timed)
    profile = profile_of(crops, tmp_path / "s", embedder)
    assert profile.seconds == pytest.approx(walls[0], rel=0.01, abs=0.005)
    told = profile.to_dict()
    assert sum(stage["share"] for stage in told["loop"].values()) == pytest.approx(1, abs=1e-3)
    assert set(told["loop"]) == set(LOOP_STAGES)
    assert told["loop"]["infer"]["seconds"] > 0
    assert told["loop"]["write"]["seconds"] > 0


def test_the_threads_stages_and_their_wait_add_up_to_all_threads(crops, embedder, tmp_path):
    profile = profile_of(crops, tmp_path / "s", embedder)
    threads = profile.threads()
    assert set(threads) == {*THREAD_STAGES, WAIT_FOR_ENGINE}
    assert sum(threads.values()) == pytest.approx(decoding_threads() * profile.seconds)
    assert all(threads[stage] > 0 for stage in THREAD_STAGES)


def test_a_slow_engine_is_the_bottleneck(crops, bundle_folder, tmp_path):
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    infer = embedder.backend.stream

    def slow(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for rows in infer(batches):
            time.sleep(0.1)
            yield rows

    embedder.backend.stream = slow
    profile = profile_of(crops, tmp_path / "s", embedder)
    assert profile.bottleneck == "infer"
    assert profile.loop()["infer"] >= 0.5  # five batches
    assert profile.advice.startswith("the engine is the bottleneck")


@pytest.mark.parametrize(
    "module, function, stage",
    [(sources, "file_bytes", "read"), (sources, "open_rgb", "decode"), (sources, "crop_of", "resize")],
)
def test_slow_threads_are_the_bottleneck(module, function, stage, crops, embedder, tmp_path, monkeypatch):
    quick = getattr(module, function)

    def slow(*arguments):
        time.sleep(0.06)
        return quick(*arguments)

    monkeypatch.setattr(module, function, slow)
    profile = profile_of(crops, tmp_path / "s", embedder)
    assert profile.bottleneck == stage
    assert profile.threads()[stage] >= 40 * 0.06
    assert profile.loop()["wait for images"] > 0.5 * profile.seconds


def test_a_slow_disk_is_the_bottleneck(crops, embedder, tmp_path, monkeypatch):
    add = writer.StoreWriter.add
    monkeypatch.setattr(writer.StoreWriter, "add", lambda *arguments: (time.sleep(2), add(*arguments)))
    assert profile_of(crops, tmp_path / "s", embedder).bottleneck == "write"


def test_a_profile_changes_no_byte_of_the_store(crops, embedder, tmp_path):
    profile_of(crops, tmp_path / "a", embedder)
    assert embed_folder(crops, tmp_path / "b", embedder).profile is None
    assert np.array_equal(Store.open(tmp_path / "a").embeddings(), Store.open(tmp_path / "b").embeddings())


def test_the_command_tells_it_in_json_and_as_a_table(crops, bundle_folder, tmp_path):
    given = ("--bundle", bundle_folder, "--backend", "onnxruntime", "--profile", "--json")
    done = mgn_deploy("embed", crops, "-o", tmp_path / "s", *given)
    told = json.loads(done.stdout)["profile"]
    assert told["bottleneck"] in (*LOOP_STAGES, *THREAD_STAGES)
    assert "wait for the engine" in done.stderr
    assert told["advice"] in done.stderr


def test_nothing_is_told_unless_asked(crops, bundle_folder, tmp_path):
    done = mgn_deploy(
        "embed", crops, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime", "--json"
    )
    assert "profile" not in json.loads(done.stdout)
    assert "bottleneck" not in done.stderr
