"""`validate`: the same figures as by hand, the reference beside them, and all that can be asked for."""

from __future__ import annotations

import json
import shutil
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import mgn_deploy
from validations import draw, spoilt

from mgn_deploy.datasets import open_data
from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.datasets.market1501 import open_market1501
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.retrieval.evaluation import Protocol, Scores
from mgn_deploy.retrieval.ranking import KEYS, RankingMetrics
from mgn_deploy.retrieval.validate import Validation, validate


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn") / "people")


@pytest.fixture(scope="module")
def wrong_bundle(bundle_folder, tmp_path_factory):
    return spoilt(bundle_folder, tmp_path_factory.mktemp("wrong") / "b")


def by_hand(embedder: Embedder, root) -> dict[str, float]:
    """Embed, sort and score one query after the other."""
    data = open_market1501(root, subsets=("query", "gallery"))

    def embed(images) -> np.ndarray:
        rows = [embedder.backend(np.array(read_crop(one.path, 96, 32)[None])) for one in images]
        return np.concatenate(rows).astype(np.float64)

    queries, gallery = embed(data.query), embed(data.gallery)
    first, precisions, penalties = [], [], []
    for query, embedding in zip(data.query, queries, strict=True):
        candidates = [
            (1 - embedding @ other, image)
            for other, image in zip(gallery, data.gallery, strict=True)
            if image.identity != -1 and not (image.identity == query.identity and image.camera == query.camera)
        ]
        ranked = [image.identity == query.identity for _, image in sorted(candidates, key=lambda pair: pair[0])]
        right = [rank for rank, hit in enumerate(ranked, start=1) if hit]
        first.append(right[0])
        precisions.append(np.mean([(index + 1) / rank for index, rank in enumerate(right)]))
        penalties.append(len(right) / right[-1])
    return {
        **{f"rank-{k}": float(np.mean([rank <= k for rank in first])) for k in (1, 5, 10)},
        "mAP": float(np.mean(precisions)),
        "mINP": float(np.mean(penalties)),
    }


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_the_figures_are_those_of_a_computation_by_hand(root, bundle_folder, backend):
    embedder = Embedder.open(bundle_folder, backend)
    result = validate(open_data(f"market1501:{root}"), embedder, None)
    expected = by_hand(embedder, root)
    assert {key: result.measured.to_dict()[key] for key in KEYS} == pytest.approx(expected, abs=1e-9)
    assert 0 < expected["mAP"] < 1
    assert result.reference is None
    assert result.differences() == {}
    assert result.worst() == 0


def test_an_engine_and_its_reference_differ_by_nothing(root, bundle_folder):
    result = validate(
        open_data(f"market1501:{root}"), Embedder.open(bundle_folder), Embedder.open(bundle_folder, "torch")
    )
    assert result.backend == "openvino"
    assert result.differences() == pytest.approx(dict.fromkeys(KEYS, 0), abs=1e-6)


def test_the_reference_is_compared_query_by_query(root, bundle_folder, wrong_bundle):
    right, wrong = (Embedder.open(path, "onnxruntime", allow_unproven=True) for path in (bundle_folder, wrong_bundle))
    data = open_data(f"market1501:{root}")
    paired = validate(data, right, right).paired()
    assert {one.p for one in paired.values()} == {1}
    result = validate(data, wrong, right)
    found = result.paired()["mAP"]
    assert found.mean == pytest.approx(result.differences()["mAP"])
    assert 0 < found.p <= 1
    assert found.interval[0] <= found.mean <= found.interval[1]
    printed = result.to_dict()
    assert printed["paired_test"]["mAP"]["p"] == found.p


def test_queries_that_are_nobody_or_alone_are_counted_and_named(root, bundle_folder, tmp_path, said):
    shutil.copytree(root, tmp_path / "people")
    query = sorted((tmp_path / "people" / "query").iterdir())[0]
    for name in ("0000_c1s1_000001_00.jpg", "-1_c1s1_000001_00.jpg", "0999_c1s1_000001_00.jpg"):
        shutil.copy(query, query.with_name(name))
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    result = validate(open_data(f"market1501:{tmp_path / 'people'}"), embedder, None)
    assert result.measured.queries_without_match == 3
    assert result.unmatched == [f"query/{name}_c1s1_000001_00.jpg" for name in ("-1", "0000", "0999")]
    total = result.measured.queries
    assert result.notes == [
        f"2 of {total} queries are nobody (junk, a distractor or without a label) and take no part in the figures: "
        "'query/-1_c1s1_000001_00.jpg', 'query/0000_c1s1_000001_00.jpg'",
        f"1 of {total} queries have no right answer in the gallery and take no part in the figures: "
        "'query/0999_c1s1_000001_00.jpg'",
    ]
    assert set(result.notes) <= set(said)


def test_person_0_of_a_folder_is_a_person(bundle_folder, tmp_path):
    """Own people numbered from 0: their queries take part."""
    for camera, folder in ((1, "query"), (2, "bounding_box_test")):
        (tmp_path / "people" / folder).mkdir(parents=True)
        for person in range(4):
            draw_crop(person, camera, 0).save(tmp_path / "people" / folder / f"{person}_c{camera}.jpg")
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    by_folder = validate(open_data(f"folder:{tmp_path / 'people'}"), embedder, None)
    assert (by_folder.measured.queries_without_match, by_folder.notes) == (0, [])
    as_market = validate(open_data(f"market1501:{tmp_path / 'people'}"), embedder, None)
    assert as_market.unmatched == ["query/0_c1.jpg"]


def test_everything_that_can_be_asked_for_is_in_the_table_in_json_and_in_parquet(root, bundle_folder, tmp_path):
    arguments = ["validate", "--data", f"market1501:{root}", "--bundle", bundle_folder, "--backend", "onnxruntime"]
    arguments += ["--rerank", "--roc", "--single-shot", "--ci", "--aqe", 2, "--dba", 2, "--metric", "euclidean"]
    done = mgn_deploy(*arguments, "--per-query", tmp_path / "queries.parquet")
    assert done.exit_code == 0, done.stderr
    for word in (
        "mAP, re-ranked",
        "rank-20, single-shot",
        "TPR at FPR 1e-05",
        "too few pairs",
        "EER",
        " to ",
        "1.0000",
    ):
        assert word in done.stdout, word

    printed = json.loads(mgn_deploy(*arguments, "--json").stdout)
    for side in ("measured", "reference"):
        assert {"reranked", "roc", "single_shot", "ci95"} <= set(printed[side])
    assert printed["protocol"]["aqe"] == 2

    table = pq.read_table(tmp_path / "queries.parquet").to_pydict()
    precision = [value for value in table["average_precision"] if value is not None]
    assert np.mean(precision) == pytest.approx(printed["measured"]["mAP"], abs=1e-9)
    assert np.mean([rank == 1 for rank in table["first_rank"] if rank]) == printed["measured"]["rank-1"]
    reranked = [value for value in table["reranked_average_precision"] if value is not None]
    assert np.mean(reranked) == pytest.approx(printed["measured"]["reranked"]["mAP"], abs=1e-9)
    assert {"reference_average_precision", "query", "identity", "right_answers"} <= set(table)


def test_data_of_one_camera_is_refused_before_the_embedding_and_ranked_without_cameras(bundle_folder, tmp_path):
    for frame, folder in enumerate(("query", "bounding_box_test")):
        (tmp_path / folder).mkdir()
        for person in (1, 2):
            draw_crop(person, 1, frame).save(tmp_path / folder / f"{person}_c1_{frame}.png")
    data, embedder = open_data(f"folder:{tmp_path}"), Embedder.open(bundle_folder, "onnxruntime")
    with pytest.raises(UserError, match="where one camera made all images, rank without cameras"):
        validate(data, embedder, None, progress=lambda *step: pytest.fail("embedded"))
    result = validate(data, embedder, None, protocol=Protocol(cameras=False))
    assert result.measured.queries_without_match == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "cuda"], "finds a CUDA device"),
        (["--per-query", "no-such-folder/q.parquet"], "give the name of a file in a folder that exists"),
    ],
)
def test_what_cannot_be_done_afterwards_is_refused_before_the_embedding(root, bundle_folder, options, sentence):
    with patch("mgn_deploy.retrieval.arrays._cuda", lambda: None):
        done = mgn_deploy("validate", "--data", f"market1501:{root}", "--bundle", bundle_folder, *options)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert "ranking " not in done.stderr


def test_a_folder_a_person_is_ranked_without_cameras(bundle_folder, tmp_path):
    for person in ("anna", "bert", "zoe"):
        (tmp_path / person).mkdir()
        for frame in range(3):
            draw_crop(ord(person[0]), 1, frame).save(tmp_path / person / f"{frame}.png")
    result = validate(open_data(f"identities:{tmp_path}"), Embedder.open(bundle_folder, "onnxruntime"), None)
    assert (result.measured.queries, result.measured.queries_without_match) == (3, 0)
    assert result.measured.scores.right_answers.tolist() == [2, 2, 2]


def test_the_worst_difference_is_of_rank_1_or_map_in_either_direction():
    def scores(rank_1: float, mean: float, minp: float) -> Scores:
        return Scores(RankingMetrics({1: rank_1, 5: 1.0, 10: 1.0}, mean, minp, 10, 0))

    assert Validation("x", scores(0.5, 0.4, 0.9), scores(0.5, 0.6, 0.1)).worst() == pytest.approx(0.2)
    assert Validation("x", scores(0.8, 0.6, 0.1), scores(0.5, 0.6, 0.1)).worst() == pytest.approx(0.3)


def test_progress_counts_queries_and_gallery_of_each_step(root, bundle_folder):
    data, seen = open_data(f"market1501:{root}"), []
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    validate(data, embedder, embedder, batch_size=16, progress=lambda *step: seen.append(step))
    total = len(data.query) + len(data.without_junk().gallery)
    for label in ("onnxruntime", "PyTorch reference"):
        steps = [done for name, done, whole in seen if name == label]
        assert steps == sorted(steps)
        assert steps[-1] == total
        assert {whole for _, _, whole in seen} == {total}
