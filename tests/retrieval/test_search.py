"""Who is nearest, and who is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_up_store import names, write_store

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.store import Store
from mgn_deploy.retrieval.queries import Queries
from mgn_deploy.retrieval.rank_list import verdict
from mgn_deploy.retrieval.rerank import rerank
from mgn_deploy.retrieval.search import search


@pytest.fixture(scope="module")
def crop_store(gallery_store) -> Store:
    return Store.open(gallery_store)


def test_no_similarity_is_above_1_and_no_distance_below_0_though_rows_are_no_unit_rows(tmp_path):
    rows = np.array([[1.0003, 0, 0], [1.0003, 0, 0], [0, 1, 0]], np.float32)
    store = write_store(tmp_path / "s", [(f"{n}.jpg", None, None) for n in range(3)], rows)
    queries = Queries.of_store(store)
    (best, _) = search(queries, store, 2)[0].results
    assert best.similarity == 1
    found = [result for ranked in search(queries, store, 2, rerank=True) for result in ranked.results]
    assert all(result.similarity <= 1 and result.distance >= 0 for result in found)


def queries_for(
    embedding: list[float], path: Path, identity: int = -2, camera: int = -2, bundle_id: str = "b" * 64
) -> Queries:
    return Queries(
        bundle_id,
        np.array([embedding], np.float32),
        [path],
        [path.name],
        np.array([identity]),
        np.array([camera]),
    )


EAST, NORTH_EAST, NORTH, WEST = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)


def test_results_are_the_nearest_first(tmp_path):
    store = write_store(
        tmp_path / "s",
        [("w", None, None), ("n", None, None), ("ne", None, None)],
        np.stack([WEST, NORTH, NORTH_EAST]),
    )
    (ranked,) = search(queries_for([1, 0], Path("/q.jpg")), store)
    assert names(ranked) == ["ne", "n", "w"]
    assert [result.similarity for result in ranked.results] == pytest.approx([0.6, 0, -1])
    assert (ranked.query.name, ranked.query.similarity, ranked.query.identity, ranked.query.camera) == (
        "q.jpg",
        None,
        None,
        None,
    )


def test_k_limits_the_results(tmp_path):
    store = write_store(
        tmp_path / "s",
        [("w", None, None), ("n", None, None), ("ne", None, None)],
        np.stack([WEST, NORTH, NORTH_EAST]),
    )
    assert names(search(queries_for([1, 0], Path("/q.jpg")), store, 1)[0]) == ["ne"]
    assert len(search(queries_for([1, 0], Path("/q.jpg")), store, 50)[0].results) == 3


@pytest.mark.parametrize(
    ("identity", "camera", "kept"),
    [
        (7, 1, True),  # the query's identity, another camera
        (7, 2, False),  # the query's identity and camera
        (8, 2, True),  # another identity, the query's camera
        (-1, 1, False),  # junk
        (0, 2, True),  # a distractor in the query's camera
        (None, None, True),  # a name that tells nothing
    ],
)
def test_what_the_protocol_leaves_out_is_left_out_where_it_is_asked_for(tmp_path, identity, camera, kept):
    store = write_store(tmp_path / "s", [("it", identity, camera), ("other", 9, 9)], np.stack([EAST, NORTH]))
    query = queries_for([1, 0], Path("/q.jpg"), identity=7, camera=2)
    (ranked,) = search(query, store, exclude_same_camera=True)
    assert names(ranked) == (["it", "other"] if kept else ["other"])
    assert sum(ranked.excluded.values()) == (not kept)
    (ranked,) = search(query, store)
    assert names(ranked) == ["it", "other"]
    assert ranked.excluded == {"own_file": 0}


def test_a_person_numbered_0_is_a_person(tmp_path):
    store = write_store(tmp_path / "s", [("it", 0, 2), ("other", 9, 9)], np.stack([EAST, NORTH]))
    query = queries_for([1, 0], Path("/q.jpg"), identity=0, camera=2)
    (ranked,) = search(query, store, exclude_same_camera=True)
    assert (names(ranked), ranked.excluded["same_camera"]) == (["other"], 1)
    (ranked,) = search(query, store)
    assert verdict(ranked.query, ranked.results[0]) == "same"


def test_a_date_in_a_name_hides_nobody(crops, embedder, tmp_path):
    """`20240315_c1_000001.jpg` is no camera 1 of a person 20240315 unless the user says that names are labels."""
    (tmp_path / "photos").mkdir()
    for minute in range(3):
        draw_crop(4, 1, minute).save(tmp_path / "photos" / f"20240315_c1_{minute:06d}.jpg")
    embed_folder(tmp_path / "photos", tmp_path / "store", embedder)
    query = tmp_path / "20240315_c1_999999.jpg"
    draw_crop(4, 1, 9).save(query)
    (ranked,) = search(Queries.of_images(query, embedder), Store.open(tmp_path / "store"))
    assert len(ranked.results) == 3
    assert (ranked.query.identity, ranked.query.camera) == (None, None)


def test_an_image_that_two_reasons_name_counts_once(tmp_path):
    store = write_store(
        tmp_path / "s",
        [("q.jpg", 7, 2), ("b.jpg", 7, 2), ("junk", -1, 2), ("other", 9, 9)],
        np.stack([EAST, EAST, EAST, NORTH]),
    )
    query = queries_for([1, 0], tmp_path / "images" / "q.jpg", identity=7, camera=2)
    (ranked,) = search(query, store, exclude_same_camera=True)
    assert ranked.excluded == {"own_file": 1, "same_camera": 1, "junk": 1}
    assert ranked.to_dict()["excluded"] == ranked.excluded
    assert names(ranked) == ["other"]


def test_what_was_left_out_is_told(tmp_path, said):
    store = write_store(tmp_path / "s", [("q.jpg", 7, 2), ("b.jpg", 7, 2)], np.stack([EAST, EAST]))
    query = queries_for([1, 0], tmp_path / "images" / "q.jpg", identity=7, camera=2)
    search(query, store, exclude_same_camera=True)
    assert "left out of the results (the query's own file: 1; same person and camera: 1), over 1 queries" in said


def test_re_ranking_orders_by_its_own_distance_and_still_tells_the_similarity(crop_store):
    queries = Queries.of_store(crop_store)
    lists = search(queries, crop_store, 5, rerank=True)
    rows = crop_store.embeddings()
    distances = rerank(rows, rows)
    np.fill_diagonal(distances, np.inf)
    for query, ranked in enumerate(lists):
        best = np.argsort(distances[query], kind="stable")[:5]
        assert names(ranked) == [crop_store.rows[index].name for index in best]
        assert [one.distance for one in ranked.results] == pytest.approx(distances[query, best].tolist(), abs=1e-6)
        similarities = (rows[best] @ rows[query]).tolist()
        assert [one.similarity for one in ranked.results] == pytest.approx(similarities, abs=1e-6)


def test_an_expanded_query_is_not_expanded_by_its_own_file(crop_store):
    queries = Queries.of_store(crop_store)
    rows = crop_store.embeddings()
    products = rows @ rows.T
    np.fill_diagonal(products, -np.inf)
    first = np.argsort(-products[0])[:3]
    mean = rows[0] + (np.maximum(products[0, first], 0)[:, None] ** 3 * rows[first]).sum(axis=0)
    mean /= np.linalg.norm(mean)
    found = search(queries, crop_store, 4, aqe=3)[0]
    expected = np.where(np.arange(40) == 0, -np.inf, rows @ mean)
    best = np.argsort(-expected, kind="stable")[:4]
    assert names(found) == [crop_store.rows[index].name for index in best]


def test_names_that_tell_nothing_leave_nobody_out(tmp_path):
    store = write_store(tmp_path / "s", [("it", None, None), ("other", 9, 9)], np.stack([EAST, NORTH]))
    assert names(search(queries_for([1, 0], Path("/q.jpg")), store)[0]) == ["it", "other"]


def test_the_querys_own_file_is_left_out_and_a_file_of_the_same_name_elsewhere_is_not(tmp_path):
    store = write_store(tmp_path / "s", [("a.jpg", None, None), ("sub/a.jpg", None, None)], np.stack([EAST, NORTH]))
    (ranked,) = search(queries_for([1, 0], tmp_path / "images" / "a.jpg"), store)
    assert names(ranked) == ["sub/a.jpg"]


def test_paths_are_made_of_results_and_not_of_the_whole_gallery(tmp_path, monkeypatch):
    store = write_store(tmp_path / "s", [(f"{n}.jpg", None, None) for n in range(9)], np.stack([EAST] * 9))
    asked: list[str] = []
    path = Store.path
    monkeypatch.setattr(Store, "path", lambda store, row: asked.append(row.name) or path(store, row))
    (ranked,) = search(queries_for([1, 0], tmp_path / "q.jpg"), store, 2)
    assert asked == ["", *names(ranked)]  # the first is the source itself


def test_a_store_whose_images_lie_elsewhere_is_searched_and_its_page_has_placeholders(tmp_path):
    rows = [("a.jpg", None, None), ("b.jpg", None, None)]
    store = write_store(tmp_path / "s", rows, np.stack([EAST, NORTH]), source="s3://bucket/photos")
    (first, second) = search(Queries.of_store(store), store)
    assert (names(first), names(second)) == (["b.jpg"], ["a.jpg"])
    assert not first.results[0].path.exists()


def test_a_query_whose_whole_gallery_is_left_out_has_an_empty_list(tmp_path):
    store = write_store(tmp_path / "s", [("junk", -1, 1)], np.stack([EAST]))
    assert search(queries_for([1, 0], Path("/q.jpg")), store, exclude_same_camera=True)[0].results == []


def test_the_queries_of_another_bundle_are_refused(tmp_path):
    store = write_store(tmp_path / "s", [("a", None, None)], np.stack([EAST]))
    with pytest.raises(UserError, match=r"was embedded by bundle bbbbbbbbbbbb and the queries by cccccccccccc"):
        search(queries_for([1, 0], Path("/q.jpg"), bundle_id="c" * 64), store)
