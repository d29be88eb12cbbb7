"""Images, folders and stores as queries, and the command that searches."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from conftest import mgn_deploy
from made_up_store import names, write_store

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.store import UNKNOWN, Store
from mgn_deploy.gallery.writer import StoreWriter
from mgn_deploy.retrieval.queries import Queries
from mgn_deploy.retrieval.search import search


@pytest.fixture(scope="module")
def crop_store(gallery_store) -> Store:
    return Store.open(gallery_store)


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
