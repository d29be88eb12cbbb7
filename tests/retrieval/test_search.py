"""Who is nearest, and who is left out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import mgn_deploy
from made_up_store import write_store

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.store import UNKNOWN, Store
from mgn_deploy.gallery.writer import StoreWriter
from mgn_deploy.retrieval.queries import Queries
from mgn_deploy.retrieval.rank_list import RankList, verdict
from mgn_deploy.retrieval.rerank import rerank
from mgn_deploy.retrieval.search import search


@pytest.fixture(scope="module")
def crop_store(crops, embedder, tmp_path_factory) -> Store:
    """The crops with the labels that their names give."""
    folder = tmp_path_factory.mktemp("store") / "crops"
    embed_folder(crops, folder, embedder, labels="market1501")
    return Store.open(folder)


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


def names(ranked: RankList) -> list[str]:
    return [result.name for result in ranked.results]


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


def test_a_store_against_itself_finds_by_identity_and_never_itself(crop_store):
    lists = search(Queries.of_store(crop_store), crop_store, 5, exclude_same_camera=True)
    assert len(lists) == 40
    for ranked in lists:
        assert len(ranked.results) == 5
        for result in ranked.results:
            assert result.name != ranked.query.name
            assert (result.identity, result.camera) != (ranked.query.identity, ranked.query.camera)
        similarities = [result.similarity for result in ranked.results]
        assert similarities == sorted(similarities, reverse=True)


def test_an_image_query_is_the_same_image_as_a_store_query(crop_store, crops, embedder):
    row = 7
    (ranked,) = search(
        Queries.of_images(crop_store.path(crop_store.rows[row]), embedder, labels="market1501"), crop_store
    )
    expected = search(Queries.of_store(crop_store), crop_store)[row]
    assert names(ranked) == names(expected)
    assert [one.similarity for one in ranked.results] == pytest.approx(
        [one.similarity for one in expected.results], abs=1e-5
    )
    assert (ranked.query.identity, ranked.query.camera) == (expected.query.identity, expected.query.camera)


def test_a_folder_of_images_is_all_below_it(crop_store, crops, embedder):
    queries = Queries.of_images(crops / "camera 2", embedder, labels="market1501")
    assert len(queries.names) == 20
    assert set(queries.cameras) == {2}
    np.testing.assert_allclose(queries.embeddings, crop_store.embeddings()[crop_store.cameras() == 2], atol=1e-5)


def test_a_table_says_who_is_on_queries_in_the_gallerys_numbers(crops, embedder, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("path,identity,camera\n0001_c2s1_000000_00.jpg,7,2\n")
    queries = Queries.of_images(crops / "camera 2", embedder, labels=table)
    at = queries.names.index("0001_c2s1_000000_00.jpg")
    assert (queries.identities[at], queries.cameras[at]) == (7, 2)
    assert sum(queries.identities != UNKNOWN) == 1


def test_labels_of_queries_that_are_a_store_are_said_not_to_be_read(crop_store):
    done = mgn_deploy("search", crop_store.folder, crop_store.folder, "--labels", "market1501", "--json")
    assert done.exit_code == 0, done.stderr
    assert f"warning: --labels market1501 is not read: {crop_store.folder} is a store" in done.stderr


@pytest.mark.parametrize("kind", ["folder", "names.csv"])
def test_labels_that_number_people_anew_are_refused(kind, crops, embedder, tmp_path):
    (tmp_path / "names.csv").write_text("path,identity\ncamera 2/0001_c2s1_000000_00.jpg,Anna\n")
    with pytest.raises(UserError, match="numbers the people of these images anew"):
        Queries.of_images(crops, embedder, labels=kind if kind == "folder" else tmp_path / kind)


def test_a_relative_path_is_the_same_file(crop_store, crops, embedder, monkeypatch):
    monkeypatch.chdir(crops)
    name = crop_store.rows[0].name
    (ranked,) = search(Queries.of_images(name, embedder), crop_store, 40)
    assert name not in names(ranked)


@pytest.fixture
def found(crop_store, bundle_folder):
    def run(query: object, *options: object) -> list[dict]:
        done = mgn_deploy("search", query, crop_store.folder, "--json", *options)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_the_command_prints_rank_lists_as_json(found, crop_store):
    printed = found(crop_store.folder, "-k", 3)
    assert len(printed) == 40
    assert [result["rank"] for result in printed[0]["results"]] == [1, 2, 3]
    expected = search(Queries.of_store(crop_store), crop_store, 3)
    assert [[result["name"] for result in one["results"]] for one in printed] == [names(one) for one in expected]


def test_the_command_embeds_an_image_with_the_bundle_and_writes_the_page(
    found, crop_store, crops, bundle_folder, tmp_path
):
    query = tmp_path / "who is it?.jpg"
    draw_crop(4, 3, 5).save(query)
    (printed,) = found(query, "--bundle", bundle_folder, "--backend", "onnxruntime", "--html", tmp_path / "page.html")
    assert (printed["query"], printed["identity"], len(printed["results"])) == (query.name, None, 10)
    assert printed["excluded"] == {"own_file": 0}
    assert "who is it?.jpg" in (tmp_path / "page.html").read_text()


def test_an_image_is_embedded_by_the_bundle_that_the_gallery_names(crop_store, crops, bundle_folder):
    image = next(crops.rglob("*.jpg"))
    found = mgn_deploy("search", image, crop_store.folder, "--json")
    given = mgn_deploy("search", image, crop_store.folder, "--bundle", bundle_folder, "--json")
    assert json.loads(found.stdout)[0]["results"] == json.loads(given.stdout)[0]["results"]
    assert f"embedding the queries by the gallery's bundle, {bundle_folder}" in found.stderr


@pytest.mark.parametrize(
    "path, expected", [(None, "give its folder by --bundle"), ("/none", "is no longer in /none: give --bundle")]
)
def test_an_image_without_a_bundle_is_a_sentence_that_says_which(crop_store, crops, tmp_path, path, expected):
    shutil.copytree(crop_store.folder, tmp_path / "s")
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    (tmp_path / "s/manifest.json").write_text(json.dumps({**manifest, "bundle_path": path}))
    done = mgn_deploy("search", next(crops.rglob("*.jpg")), tmp_path / "s")
    assert done.exit_code == 2
    assert f"was embedded by bundle {crop_store.manifest.bundle_id[:12]}" in done.stderr
    assert expected in done.stderr


def test_an_image_that_cannot_be_read_is_a_sentence(crop_store, bundle_folder, tmp_path):
    (tmp_path / "q.jpg").write_bytes(b"nothing")
    done = mgn_deploy("search", tmp_path / "q.jpg", crop_store.folder, "--bundle", bundle_folder)
    assert done.exit_code == 2
    assert "q.jpg' cannot be embedded: not an image" in done.stderr


def test_a_store_of_failed_images_only_is_refused(crop_store, embedder, tmp_path):
    empty = tmp_path / "s"
    manifest = crop_store.manifest
    with StoreWriter(empty, manifest) as writer:
        writer.add([Row("a.jpg", 1, 1, "broken", None, None)], np.full((1, manifest.dim), np.nan, np.float32))
    with pytest.raises(UserError, match="holds no embedded image"):
        search(Queries.of_store(crop_store), Store.open(empty))


def test_a_moved_gallery_is_still_searched(crop_store, crops, embedder, tmp_path):
    shutil.copytree(crops, tmp_path / "crops")
    embed_folder(tmp_path / "crops", tmp_path / "store", embedder)
    os.rename(tmp_path / "crops", tmp_path / "elsewhere")
    assert len(search(Queries.of_store(Store.open(tmp_path / "store")), crop_store)) == 40


def test_the_embedder_of_another_bundle_is_refused(crop_store, crops, embedder, tmp_path):
    other = write_store(tmp_path / "s", [("a", None, None)], np.eye(1, embedder.dim, dtype=np.float32))
    with pytest.raises(UserError, match="embed both with one bundle"):
        search(Queries.of_images(next(crops.rglob("*.jpg")), embedder), other)
    assert isinstance(embedder, Embedder)
