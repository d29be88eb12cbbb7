"""Indexes by FAISS: what they find, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import mgn_deploy
from made_up_store import made_up_store

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.gallery.store import Store
from mgn_deploy.identity.people import People
from mgn_deploy.index.build import build_index, open_index
from mgn_deploy.index.faiss_folder import FaissIndex
from mgn_deploy.retrieval.queries import Queries
from mgn_deploy.retrieval.search import search

ROWS, DIM = 600, 32


def unit(rows: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    people: list[int | None] = [row // 4 for row in range(ROWS)]
    cameras: list[int | None] = [row % 3 for row in range(ROWS)]
    times: list[float | None] = [row / 2 if row % 2 else None for row in range(ROWS)]
    return made_up_store(tmp_path_factory.mktemp("gallery"), unit(ROWS), people, cameras, times=times)


@pytest.fixture(scope="module", params=["flat", "hnsw"])
def index(request, store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index") / request.param
    build_index(store, folder, request.param)
    return folder


def found(store: Store, **options) -> list[list[tuple[str, float]]]:
    lists = search(Queries.of_store(store), store, 5, **options)
    return [[(result.name, result.similarity) for result in one.results] for one in lists]


def found_by_index(store: Store, index: Path) -> list[list[tuple[str, float]]]:
    with open_index(index, store) as candidates:
        return found(store, candidates=candidates)


def refuse(index: Path, store: Store, sentence: str, **options) -> None:
    with pytest.raises(UserError, match=sentence), open_index(index, store, **options):
        pass


def test_search_by_an_index_gives_the_exact_neighbours_with_their_exact_similarities(store, index) -> None:
    by_index, exactly = found_by_index(store, index), found(store)
    same = [
        one == other
        for mine, exact in zip(by_index, exactly, strict=True)
        for (one, _), (other, _) in zip(mine, exact, strict=True)
    ]
    assert np.mean(same) > 0.95
    similarities = dict(exactly[7])
    assert all(value == pytest.approx(similarities.get(name, value), abs=1e-6) for name, value in by_index[7])


def test_an_index_may_lie_in_a_folder_whose_name_is_no_utf8(store, tmp_path) -> None:
    build_index(store, tmp_path / "M\udce4rz", "flat")
    nearest = [[name for name, _ in one] for one in found_by_index(store, tmp_path / "M\udce4rz")]
    assert nearest == [[name for name, _ in one] for one in found(store)]


def test_a_querys_own_file_is_left_out_and_made_up_for(store, index) -> None:
    by_index = found_by_index(store, index)
    assert all(len(one) == 5 for one in by_index)
    assert not any(f"{row}.jpg" == name for row, one in enumerate(by_index) for name, _ in one)


def test_only_rows_of_the_camera_that_is_asked_for_are_found(store, index) -> None:
    with open_index(index, store, camera=2) as candidates:
        lists = search(Queries.of_store(store), store, 5, candidates=candidates)
    assert {result.camera for one in lists for result in one.results} == {2}
    assert all(len(one.results) == 5 for one in lists)


def test_only_rows_of_the_seconds_that_are_asked_for_are_found(store, index) -> None:
    with open_index(index, store, camera=2, since=20, until=60) as candidates:
        lists = search(Queries.of_store(store), store, 5, candidates=candidates)
    asked_for = {row.name for row in store if row.camera == 2 and row.time_s is not None and 20 <= row.time_s <= 60}
    assert {result.name for one in lists for result in one.results} == asked_for
    assert all(len(one.results) == 5 for one in lists)


def test_k_over_the_gallery_gives_what_there_is(tmp_path) -> None:
    small = made_up_store(tmp_path, unit(3), [1, 2, 3])
    build_index(small, tmp_path / "index", "hnsw")
    with open_index(tmp_path / "index", small) as candidates:
        lists = search(Queries.of_store(small), small, 50, candidates=candidates)
    assert [len(one.results) for one in lists] == [2, 2, 2]


def test_the_recall_is_one_where_the_only_row_has_no_neighbour(tmp_path) -> None:
    assert build_index(made_up_store(tmp_path, unit(1), [1]), tmp_path / "index").recall_at_10 == 1.0


def test_ivf_pq_reaches_the_recall_on_people_and_finds_by_camera(tmp_path) -> None:
    centres = np.repeat(unit(1000), 10, axis=0)
    rows = centres + 0.1 * unit(10_000, seed=1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cameras: list[int | None] = [row % 2 for row in range(10_000)]
    people = made_up_store(tmp_path, rows, [row // 10 for row in range(10_000)], cameras)
    made = build_index(people, tmp_path / "index", "ivf-pq", recall=0.9)
    assert (made.kind, made.rows) == ("ivf-pq", 10_000)
    assert made.recall_at_10 >= 0.9
    with open_index(tmp_path / "index", people, camera=1) as candidates:
        rows_found = candidates(people.embeddings()[:5], 10)
    assert (rows_found % 2 == 1).all()


def test_a_recall_below_the_floor_writes_nothing(tmp_path, store, monkeypatch) -> None:
    from mgn_deploy.index import faiss_folder

    monkeypatch.setitem(faiss_folder.EFFORTS, "hnsw", (1,))
    monkeypatch.setattr(faiss_folder, "LINKS", 2)  # a graph that loses its way
    monkeypatch.setattr(faiss_folder, "CONSTRUCTION", 1)
    with pytest.raises(GateFailed, match=r"recall@10 of hnsw over 600 rows is 0\.\d+ .*below --recall 1"):
        build_index(store, tmp_path / "index", "hnsw", recall=1.0)
    assert list(tmp_path.iterdir()) == []


def test_the_rows_beside_the_index_are_those_of_the_store(store, index) -> None:
    table = pq.read_table(index / "rows.parquet").to_pylist()
    assert table[5] == {"path": "5.jpg", "identity": 1, "camera": 2}
    assert len(table) == ROWS


def test_an_index_of_another_store_is_refused(tmp_path, index) -> None:
    other = made_up_store(tmp_path, unit(ROWS, seed=3), [1] * ROWS)
    refuse(index, other, r"is of .*gallery.*: build it again")


def test_an_index_of_another_bundle_is_refused(tmp_path, index) -> None:
    other = made_up_store(tmp_path, unit(ROWS), [1] * ROWS, bundle_id="c" * 64)
    refuse(index, other, r"bundle bbbbbbbbbbbb and .* holds those of cccccccccccc")


def test_an_index_of_a_store_that_changed_since_is_refused(tmp_path) -> None:
    build_index(made_up_store(tmp_path, unit(20), [1] * 20), tmp_path / "index")
    more = made_up_store(tmp_path, unit(2, seed=1), [1] * 2, names=["x.jpg", "y.jpg"])  # two rows more
    refuse(tmp_path / "index", more, "has changed since")


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda folder: (folder / "index.faiss").write_bytes(b"IxFI"), "index.faiss is damaged"),
        (lambda folder: (folder / "index.faiss").unlink(), "is not an index"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not an index that this mgn-deploy reads"),
        (shutil.rmtree, "is not an index: `mgn-deploy index build"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, store, index, damage, sentence) -> None:
    broken = tmp_path / "index"
    shutil.copytree(index, broken)
    damage(broken)
    refuse(broken, store, sentence)


def test_each_kind_of_folder_given_for_another_is_told(tmp_path, store, index, bundle_folder) -> None:
    people = People.create(tmp_path / "people", "b" * 64, 8).folder
    open_as = {
        "a bundle": (bundle_folder, Bundle.open),
        "an embedding store": (store.folder, Store.open),
        "a search index": (index, lambda folder: FaissIndex.open(folder, store)),
        "a folder of enrolled people": (people, People.open),
    }
    for wanted, (_, opener) in open_as.items():
        for kind, (folder, _) in open_as.items():
            if kind != wanted:
                with pytest.raises(UserError, match=f"{folder} is {kind}, not {wanted}$"):
                    opener(folder)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_embeddings_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, kind) -> None:
    rows = unit(20)
    rows[13, 2] = np.nan
    store = made_up_store(tmp_path / "gallery", rows, [1] * 20)
    with pytest.raises(UserError, match="13"):
        build_index(store, tmp_path / "index", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["gallery"]


def test_an_empty_store_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no embedded image"):
        build_index(made_up_store(tmp_path, np.empty((0, DIM)), []), tmp_path / "index")


def test_ivf_pq_of_too_few_rows_is_refused(tmp_path, store) -> None:
    with pytest.raises(UserError, match=r"ivf-pq needs 9,984 rows .* choose --kind flat or hnsw"):
        build_index(store, tmp_path / "index", "ivf-pq")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, store) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="holds what this command did not write"):
        build_index(store, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("option", [{"rerank": True}, {"aqe": 3}])
def test_what_is_defined_on_exact_neighbours_is_refused_through_an_index(store, index, option) -> None:
    with open_index(index, store) as candidates, pytest.raises(UserError, match="defined on exact neighbours"):
        found(store, candidates=candidates, **option)


def test_a_camera_that_took_nothing_is_refused(store, index) -> None:
    refuse(index, store, "no image by camera 9", camera=9)


def test_a_time_at_which_nothing_was_taken_is_refused(store, index, tmp_path) -> None:
    refuse(index, store, "no image by camera 1 of that time: its rows are of 0.5 to", camera=1, since=1000)
    refuse(index, made_up_store(tmp_path, unit(2), [1, 2]), "no image with a time: only rows of videos", until=3)


def test_the_command_line_builds_and_searches(tmp_path, store) -> None:
    made = json.loads(mgn_deploy("index", "build", store.folder, "-o", tmp_path / "index", "--json").stdout)
    assert (made["kind"], made["recall_at_10"], made["recall_queries"]) == ("flat", 1.0, ROWS)
    asked = ("search", store.folder, store.folder, "-k", 3, "--json")
    by_index = json.loads(mgn_deploy(*asked, "--index", tmp_path / "index").stdout)
    exactly = json.loads(mgn_deploy(*asked).stdout)
    assert [names(one) for one in by_index] == [names(one) for one in exactly]


def names(ranked: dict) -> list[str]:
    return [result["name"] for result in ranked["results"]]
