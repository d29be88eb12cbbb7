"""An index in Milvus, by milvus-lite: what it finds, that it survives a stop, and what is refused."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import mgn_deploy
from made_up_store import made_up_store

from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.gallery.maintain import prune
from mgn_deploy.gallery.store import Store
from mgn_deploy.index import milvus, milvus_client
from mgn_deploy.index.build import build_index, open_index
from mgn_deploy.retrieval.queries import Queries
from mgn_deploy.retrieval.search import search

if "PYTEST_XDIST_WORKER" in os.environ:
    pytest.skip(
        "milvus-lite's server needs a process of its own: `make test` runs these after the rest",
        allow_module_level=True,
    )
pytest.importorskip("pymilvus", reason="the extra milvus is not installed")
pytest.importorskip("milvus_lite", reason="the extra milvus is not installed")

ROWS, DIM = 300, 16
NAMES = ["it's.jpg", '") or 1==1 or path in (".jpg', *(f"{row}.jpg" for row in range(2, ROWS))]


def unit(rows: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, DIM))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def gallery(folder: Path, rows: int = ROWS, **options) -> Store:
    cameras: list[int | None] = [row % 3 for row in range(rows)]
    times: list[float | None] = [row / 2 if row % 2 else None for row in range(rows)]
    people: list[int | None] = [row // 4 for row in range(rows)]
    return made_up_store(folder, unit(rows), people, cameras, names=NAMES[:rows], times=times, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return gallery(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def database(store, tmp_path_factory) -> str:
    target = f"{tmp_path_factory.mktemp('milvus')}/index.db"
    made = build_index(store, target)
    assert (made.kind, made.rows, made.recall_queries) == ("milvus", ROWS, ROWS)
    return target


def refuse(target: str, store: Store, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence), open_index(target, store):
        pass


def entries(target: str, store: Store) -> int:
    with milvus.opened(target, store) as index:
        index.check()
        return len(index._digests())


def told(caplog: pytest.LogCaptureFixture) -> str:
    return next(message for message in reversed(caplog.messages) if "upserted" in message).partition(".db: ")[2]


def test_search_by_milvus_gives_the_exact_neighbours_with_their_exact_similarities(store, database) -> None:
    with open_index(database, store) as candidates:
        by_index = search(Queries.of_store(store), store, 5, candidates=candidates)
    exactly = search(Queries.of_store(store), store, 5)
    pairs = [
        (one, other)
        for mine, exact in zip(by_index, exactly, strict=True)
        for one, other in zip(mine.results, exact.results, strict=True)
    ]
    assert np.mean([one.name == other.name for one, other in pairs]) > 0.95
    assert [one.similarity for one, other in pairs if one.name == other.name] == pytest.approx(
        [other.similarity for one, other in pairs if one.name == other.name], abs=1e-6
    )


def test_only_rows_of_the_camera_that_is_asked_for_are_found(store, database) -> None:
    with open_index(database, store, camera=2) as candidates:
        lists = search(Queries.of_store(store), store, 5, candidates=candidates)
    assert {result.camera for one in lists for result in one.results} == {2}


def test_only_rows_of_the_seconds_that_are_asked_for_are_found(store, database) -> None:
    with open_index(database, store, camera=2, since=20, until=60) as candidates:
        lists = search(Queries.of_store(store), store, 5, candidates=candidates)
    asked_for = {row.name for row in store if row.camera == 2 and row.time_s is not None and 20 <= row.time_s <= 60}
    assert {result.name for one in lists for result in one.results} == asked_for
    assert all(len(one.results) == 5 for one in lists)


def test_a_build_that_was_stopped_is_refused_and_goes_on(tmp_path, store, monkeypatch, caplog) -> None:
    target = f"{tmp_path}/index.db"
    monkeypatch.setattr(milvus, "BATCH_ROWS", 100)
    call, batches = milvus.MilvusIndex._call, []

    def stopped(self, method, *arguments, **options):
        if method == "upsert" and len(batches) == 2:
            raise KeyboardInterrupt
        batches.extend([method] * (method == "upsert"))
        return call(self, method, *arguments, **options)

    monkeypatch.setattr(milvus.MilvusIndex, "_call", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_index(store, target)
    monkeypatch.setattr(milvus.MilvusIndex, "_call", call)
    refuse(target, store, "was not finished: .* which goes on")
    with caplog.at_level(logging.INFO, "mgn_deploy"):
        build_index(store, target)
    assert told(caplog) == "100 rows upserted, 0 deleted, 200 were there"
    assert entries(target, store) == ROWS


def test_rows_that_are_gone_are_deleted_also_by_names_with_quotes(tmp_path, caplog) -> None:
    target = f"{tmp_path}/index.db"
    store = gallery(tmp_path, 40)
    build_index(store, target)
    prune(store.folder, NAMES[2:40])
    fewer = Store.open(store.folder)
    refuse(target, fewer, "has changed since")
    with caplog.at_level(logging.INFO, "mgn_deploy"):
        build_index(fewer, target)
    assert told(caplog) == "0 rows upserted, 2 deleted, 38 were there"
    assert entries(target, fewer) == 38


def test_a_call_that_fails_by_what_may_pass_is_made_again(caplog, monkeypatch) -> None:
    from grpc import StatusCode
    from pymilvus import MilvusException

    monkeypatch.setattr(milvus_client, "PAUSES", (0.0, 0.0))
    away = MilvusException(StatusCode.UNAVAILABLE, "away")
    answers = [away, MilvusException(2, "starting", retriable=True), "done", away, away, away]

    def call() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert milvus_client.retried(call, "http://host") == "done"
    assert caplog.messages == [
        "Milvus at http://host failed (away): trying again in 0 s",
        "Milvus at http://host failed (starting): trying again in 0 s",
    ]
    with pytest.raises(UserError, match=r"failed 3 times \(away\): run the same command again"):
        milvus_client.retried(call, "http://host")


def test_what_milvus_refuses_is_asked_once(store, database, caplog) -> None:
    with milvus.opened(database, store) as index, pytest.raises(UserError, match=r"refuses: .*'gone' does not exist"):
        index._call("get", "gone", ids=["manifest"])
    assert not caplog.messages


def test_a_recall_below_the_floor_leaves_the_index_unfinished(tmp_path, store, monkeypatch) -> None:
    monkeypatch.setattr(milvus.MilvusIndex, "candidates", lambda self, asked, n: np.zeros((len(asked), n), np.int64))
    with pytest.raises(GateFailed, match=r"recall@10 of milvus over 300 rows is 0\.\d+, below --recall 0.95"):
        build_index(store, f"{tmp_path}/index.db")
    refuse(f"{tmp_path}/index.db", store, "was not finished")


def test_an_index_of_another_bundle_is_refused(tmp_path, database) -> None:
    refuse(database, gallery(tmp_path, bundle_id="c" * 64), "embeddings of bundle bbbbbbbbbbbb")


def test_a_database_that_is_not_there_is_refused(tmp_path, store) -> None:
    refuse(f"{tmp_path}/none.db", store, "is not there: `mgn-deploy index build")


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path, store) -> None:
    (tmp_path / "notes.db").write_text("mine")
    refuse(f"{tmp_path}/notes.db", store, "is no Milvus database")
    with pytest.raises(UserError, match="is no Milvus database"):
        build_index(store, f"{tmp_path}/notes.db")
    assert (tmp_path / "notes.db").read_text() == "mine"


def test_a_server_that_is_not_there_is_one_sentence(store) -> None:
    with pytest.raises(UserError, match=r"Milvus cannot be reached at http://127.0.0.1:1: "):
        build_index(store, "http://127.0.0.1:1")


def test_a_broken_url_is_one_sentence(store) -> None:
    refuse("http://[host", store, r"Milvus cannot be reached at http://\[host: Invalid IPv6 URL")


def test_a_password_in_the_url_is_refused(store) -> None:
    refuse("http://root:secret@host:19530", store, "set MILVUS_TOKEN")


def test_a_kind_and_a_target_that_do_not_fit_are_refused(tmp_path, store) -> None:
    with pytest.raises(UserError, match=r"Milvus takes a name that ends with .db"):
        build_index(store, tmp_path / "index", "milvus")
    with pytest.raises(UserError, match=r"--kind hnsw into .*x.db"):
        build_index(store, tmp_path / "x.db", "hnsw")


def test_the_command_line_builds_and_searches(tmp_path, store) -> None:
    target = tmp_path / "index.db"
    made = json.loads(mgn_deploy("index", "build", store.folder, "-o", target, "--json").stdout)
    assert made["kind"] == "milvus"
    asked = ("search", store.folder, store.folder, "-k", 3, "--json", "--index", target)
    assert len(json.loads(mgn_deploy(*asked).stdout)) == ROWS
    assert "defined on exact neighbours" in mgn_deploy(*asked, "--rerank").stderr
