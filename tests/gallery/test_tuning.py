"""`embed --batch auto`: sizes are tried on the run's own images, and the choice is told."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import mgn_deploy

from mgn_deploy.backends.base import Backend, BatchLimits
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery import tuning as tuning_module
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.store import Store
from mgn_deploy.gallery.tuning import SIZES, candidates, choose_batch, choose_threads, smallest_of_the_best


@pytest.fixture
def own(bundle_folder: Path) -> Embedder:
    """An embedder whose engine a test may change."""
    return Embedder.open(bundle_folder, "onnxruntime")


@pytest.fixture
def pixels(own: Embedder) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return list(generator.integers(0, 256, (4, own.height, own.width, 3), np.uint8))


def timed_calls(backend: Backend, seconds: float, an_image: float = 0.0) -> list[int]:
    """Let each call take so long and compute nothing, whatever else the machine does; the sizes of the calls."""
    calls: list[int] = []

    def stream(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in batches:
            calls.append(len(batch))
            time.sleep(seconds + an_image * len(batch))
            yield np.zeros((len(batch), 1), np.float32)

    backend.stream = stream  # type: ignore[method-assign]
    return calls


def test_an_engine_whose_calls_cost_the_same_gets_the_largest_batch(own, pixels):
    timed_calls(own.backend, 0.03)
    tuning = choose_batch(own.backend, pixels)
    assert tuning.chosen == max(SIZES)
    assert list(tuning.images_per_second) == list(SIZES)


def test_of_sizes_that_are_as_fast_the_smallest_is_chosen():
    assert smallest_of_the_best({1: 90.0, 2: 97.5, 4: 99.0, 8: 100.0}) == 2
    assert smallest_of_the_best({1: 90.0, 2: 96.5, 4: 96.0, 8: 100.0}) == 8


def test_a_slow_engine_is_not_tried_for_longer(own, pixels, monkeypatch):
    monkeypatch.setattr(tuning_module, "SECONDS", 1.0)
    calls = timed_calls(own.backend, 0.0, an_image=0.1)
    tuning = choose_batch(own.backend, pixels)
    assert max(calls) <= 4
    assert tuning.seconds < 2
    assert tuning.chosen in tuning.images_per_second


def test_an_engine_gets_no_size_that_it_was_not_compiled_for(own, pixels, monkeypatch):
    monkeypatch.setattr(tuning_module, "SECONDS", 0.5)
    own.backend.batch_limits = BatchLimits(2, 4, 8)
    calls = timed_calls(own.backend, 0.0)
    assert set(choose_batch(own.backend, pixels).images_per_second) == {2, 4, 8}
    assert set(calls) == {2, 4, 8}


@pytest.mark.parametrize(
    "limits, sizes", [(None, SIZES), (BatchLimits(3, 3, 3), (3,)), (BatchLimits(64, 128, 256), (128,))]
)
def test_sizes_are_within_the_engines_limits(limits, sizes):
    assert candidates(limits) == sizes


def test_the_choice_is_said_and_makes_the_store_that_its_number_makes(crops, own, tmp_path, said):
    report = embed_folder(crops, tmp_path / "auto", own, batch_size="auto")
    assert report.batch_size == report.tuning["batch_size"].chosen
    assert any(sentence.startswith(f"--batch auto chose {report.batch_size} (") for sentence in said)
    assert report.embedded == 40
    embed_folder(crops, tmp_path / "given", own, batch_size=report.batch_size)
    assert np.array_equal(Store.open(tmp_path / "auto").embeddings(), Store.open(tmp_path / "given").embeddings())


def test_the_command_has_the_choice_in_its_json(crops, bundle_folder, tmp_path):
    given = ("--bundle", bundle_folder, "--backend", "onnxruntime", "--batch", "auto", "--threads", "auto", "--json")
    told = json.loads(mgn_deploy("embed", crops, "-o", tmp_path / "s", *given).stdout)
    assert told["batch_size"] == told["tuning"]["batch_size"]["chosen"]
    assert str(told["batch_size"]) in told["tuning"]["batch_size"]["images_per_second"]
    again = json.loads(mgn_deploy("embed", crops, "-o", tmp_path / "s", *given).stdout)
    assert (again["unchanged"], again["tuning"]["batch_size"]["images_per_second"]) == (40, {})
    assert told["threads"] == told["tuning"]["threads"]["chosen"]
    assert str(told["threads"]) in told["tuning"]["threads"]["images_per_second"]


def test_images_that_come_slowly_get_more_threads(own, pixels):
    """As from a server that takes its time for each; the engine takes none."""
    timed_calls(own.backend, 0.0)

    def decode(threads: int) -> Iterator[np.ndarray]:
        for number in range(16):
            if number % threads == 0:
                time.sleep(0.01)
            yield pixels[0]

    tuning = choose_threads(decode, own.backend, 8)
    assert tuning.chosen == max(tuning.images_per_second)
    assert 1 in tuning.images_per_second


def test_the_number_of_threads_that_is_given_decodes(crops, own, tmp_path):
    report = embed_folder(crops, tmp_path / "s", own, threads=3, profile=True)
    assert (report.threads, report.to_dict()["profile"]["decoding_threads"]) == (3, 3)
    with pytest.raises(UserError, match="0 threads: give auto or a number from 1 to 1024"):
        embed_folder(crops, tmp_path / "s", own, threads=0)


def test_any_other_word_is_refused(crops, own, tmp_path):
    with pytest.raises(UserError, match="batch_size"):
        embed_folder(crops, tmp_path / "s", own, batch_size=0)
    done = mgn_deploy("embed", crops, "-o", tmp_path / "s", "--bundle", "b", "--batch", "fast")
    assert done.exit_code == 2
    assert "give auto or a number from 1 to 4096, not 'fast'" in done.stderr
