"""Multiple-query: pooled by hand, in `validate` and on the command line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import mgn_deploy
from PIL import Image

from mgn_deploy.datasets import Dataset, LabelledImage, open_data
from mgn_deploy.datasets.drawn import draw_crop, draw_market1501
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.retrieval.evaluation import score_embeddings
from mgn_deploy.retrieval.multi_query import needed_subsets, pool_queries, views_of_queries
from mgn_deploy.retrieval.truth import Truth
from mgn_deploy.retrieval.validate import validate

QUERIES = np.array([[1, 0, 0], [0, 1, 0], [0.6, 0.8, 0]], np.float32)
VIEWS = np.array([[0, 0, 1], [0.6, 0, 0.8], [0, -0.6, 0.8], [0, 1, 0]], np.float32)
MEMBERS = [[0, 1], [], [2]]


@pytest.mark.parametrize(("pooling", "first"), [("avg", [0.3, 0, 0.9]), ("max", [0.6, 0, 1])], ids=["avg", "max"])
def test_a_query_becomes_the_unit_length_pool_of_its_views(pooling, first):
    pooled = pool_queries(QUERIES, VIEWS, MEMBERS, pooling)
    assert pooled[0] == pytest.approx(np.array(first) / np.linalg.norm(first), abs=1e-6)
    assert pooled[2] == pytest.approx(VIEWS[2], abs=1e-6)
    assert np.linalg.norm(pooled, axis=1) == pytest.approx(1, abs=1e-6)
    assert (pooled.dtype, pooled.shape) == (np.float32, (3, 3))


def test_a_query_without_views_stands_for_itself():
    assert np.array_equal(pool_queries(QUERIES, VIEWS, MEMBERS, "max")[1], QUERIES[1])


def images(*labels: tuple[int, int]) -> list[LabelledImage]:
    return [LabelledImage(f"{index}.jpg", *label) for index, label in enumerate(labels)]


def test_views_are_of_the_querys_identity_and_camera(tmp_path):
    data = Dataset("x", tmp_path, [], images((5, 1), (5, 2), (6, 1)), [], images((5, 2), (7, 1), (5, 1), (5, 2)))
    views, members = views_of_queries(data)
    assert [(view.identity, view.camera) for view in views] == [(5, 2), (5, 1), (5, 2)]
    assert members == [[1], [0, 2], []]


def test_another_pooling_is_a_sentence():
    with pytest.raises(UserError, match="--multi-query mean: choose avg or max"):
        needed_subsets("mean")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Drawn people, with two more views of every query but the first."""
    folder = tmp_path_factory.mktemp("drawn") / "people"
    draw_market1501(folder, train_identities=1, test_identities=6)
    (folder / "gt_bbox").mkdir()
    for query in open_data(f"folder:{folder}").query[1:]:
        for frame in (1, 2):
            name = f"{query.identity:04d}_c{query.camera}s1_{frame:06d}_00.jpg"
            draw_crop(query.identity, query.camera, frame).save(folder / "gt_bbox" / name)
    draw_crop(1, 1, 0).save(folder / "gt_bbox" / "0001_c1s1_000000_00.jpg")  # a training person's
    return folder


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_the_figures_are_those_of_a_computation_by_hand(root, bundle_folder, pooling):
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    data = open_data(f"folder:{root}", needed_subsets(pooling))

    def embed(images: list[LabelledImage]) -> np.ndarray:
        return np.concatenate([embedder.backend(np.array(read_crop(one.path, 96, 32)[None])) for one in images])

    queries = []
    for query in data.query:
        same = [one for one in data.multi_query if (one.identity, one.camera) == (query.identity, query.camera)]
        rows = embed(same or [query]).astype(np.float64)
        pooled = rows.mean(axis=0) if pooling == "avg" else rows.max(axis=0)
        queries.append(pooled / np.linalg.norm(pooled))
    labels = [
        [getattr(one, name) for one in part] for part in (data.query, data.gallery) for name in ("identity", "camera")
    ]
    truth = Truth(*labels, junk=data.junk)
    expected = score_embeddings(np.array(queries, np.float32), embed(data.gallery), truth).metrics

    result = validate(data, embedder, embedder, multi_query=pooling)
    assert result.measured.to_dict() == pytest.approx(expected.to_dict(), abs=1e-9)
    assert result.reference.to_dict() == result.measured.to_dict()
    assert result.measured.mAP != pytest.approx(validate(data, embedder, None).measured.mAP, abs=1e-4)


def test_progress_counts_the_views_too(root, bundle_folder):
    data, seen = open_data(f"folder:{root}", needed_subsets("avg")), []
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    validate(data, embedder, None, multi_query="avg", progress=lambda *step: seen.append(step[1:]))
    total = len(data.query) + 2 * (len(data.query) - 1) + len(data.without_junk().gallery)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_the_command_pools_and_prints_what_it_did_and_the_notes(root, bundle_folder):
    arguments = ("validate", "--data", f"market1501:{root}", "--bundle", bundle_folder, "--backend", "onnxruntime")
    done = mgn_deploy(*arguments, "--no-reference", "--multi-query", "max", "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["multi_query"] == "max"
    assert [note.split()[0] for note in printed["notes"]] == ["query", "gallery"]
    assert all(note in done.stderr for note in printed["notes"])


def test_no_gt_bbox_is_a_sentence(root, tmp_path):
    shutil.copytree(root, tmp_path / "people", ignore=shutil.ignore_patterns("gt_bbox"))
    with pytest.raises(UserError, match="no folder 'gt_bbox': multiple-query takes its images from there"):
        open_data(f"market1501:{tmp_path / 'people'}", needed_subsets("avg"))


def test_a_gt_bbox_of_other_people_is_a_sentence(root, tmp_path, bundle_folder):
    shutil.copytree(root, tmp_path / "people", ignore=shutil.ignore_patterns("gt_bbox"))
    (tmp_path / "people" / "gt_bbox").mkdir()
    Image.new("RGB", (32, 64)).save(tmp_path / "people" / "gt_bbox" / "1400_c1s1_000000_00.jpg")
    data = open_data(f"folder:{tmp_path / 'people'}", needed_subsets("avg"))
    with pytest.raises(UserError, match="no further images of its queries' people"):
        validate(data, Embedder.open(bundle_folder, "onnxruntime"), None, multi_query="avg")


@pytest.mark.parametrize("kind", ["msmt17", "cuhk03-labeled"])
def test_a_dataset_without_multiple_queries_is_a_sentence(tmp_path, kind):
    with pytest.raises(UserError, match=f"{kind} has no multiple queries"):
        open_data(f"{kind}:{tmp_path}", needed_subsets("avg"))
