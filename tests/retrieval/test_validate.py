"""`validate`: the same figures as by hand, the reference beside them, and a gate."""

from __future__ import annotations

import hashlib
import json
import shutil
from unittest.mock import patch

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from conftest import mgn_deploy
from onnx import numpy_helper

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import FileEntry, write_manifest
from mgn_deploy.datasets import open_data
from mgn_deploy.datasets.drawn import draw_crop, draw_market1501
from mgn_deploy.datasets.market1501 import open_market1501
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.store import Store
from mgn_deploy.images.decode import read_crop
from mgn_deploy.retrieval.evaluation import Protocol, Scores
from mgn_deploy.retrieval.ranking import KEYS, RankingMetrics
from mgn_deploy.retrieval.validate import Validation, validate, validation_store


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "people"
    draw_market1501(folder, train_identities=1, test_identities=8)
    return folder


@pytest.fixture(scope="module")
def wrong_bundle(bundle_folder, tmp_path_factory):
    """The bundle with noise on its heads, which changes rankings; proven by nobody."""
    place = tmp_path_factory.mktemp("wrong") / "b"
    shutil.copytree(bundle_folder, place)
    graph = onnx.load(place / "graph.onnx")
    (tensor,) = [one for one in graph.graph.initializer if one.name == "heads.weight"]
    values = numpy_helper.to_array(tensor)
    noise = 2 * values.std() * np.random.default_rng(0).normal(size=values.shape)
    tensor.CopyFrom(numpy_helper.from_array((values + noise).astype(np.float32), tensor.name))
    content = graph.SerializeToString()
    (place / "graph.onnx").write_bytes(content)
    manifest = Bundle.open(bundle_folder).manifest
    files = {
        **manifest.files,
        "graph.onnx": FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content)),
    }
    write_manifest(place, manifest.model_copy(update={"files": files, "proofs": {}}))
    return place


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


def test_the_command_prints_json_and_passes(root, bundle_folder):
    done = mgn_deploy("validate", "--data", f"market1501:{root}", "--bundle", bundle_folder, "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["passed"] is True
    assert printed["backend"] == "openvino"
    assert set(KEYS) <= set(printed["measured"]) == set(printed["reference"])
    assert printed["difference"] == pytest.approx(dict.fromkeys(KEYS, 0), abs=1e-6)


def test_the_command_without_reference_judges_nothing(root, bundle_folder):
    done = mgn_deploy(
        "validate",
        "--data",
        f"market1501:{root}",
        "--bundle",
        bundle_folder,
        "--no-reference",
        "--tolerance",
        0,
        "--json",
    )
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["reference"], printed["difference"], printed["passed"]) == (None, None, None)


def test_a_difference_past_the_tolerance_exits_1(root, wrong_bundle):
    arguments = (
        "validate",
        "--data",
        f"market1501:{root}",
        "--bundle",
        wrong_bundle,
        "--backend",
        "onnxruntime",
        "--allow-unproven",
        "--json",
    )
    done = mgn_deploy(*arguments, "--tolerance", 0)
    assert done.exit_code == 1
    printed = json.loads(done.stdout)
    assert printed["passed"] is False
    worst = max(abs(printed["difference"][key]) for key in ("rank-1", "mAP"))
    assert worst > 0
    assert f"differs by {100 * worst:.2f} points from the reference, more than 0" in done.stderr
    assert mgn_deploy(*arguments, "--tolerance", 100).exit_code == 0


def test_an_unproven_engine_is_not_validated_by_accident(root, wrong_bundle):
    done = mgn_deploy("validate", "--data", f"market1501:{root}", "--bundle", wrong_bundle, "--backend", "onnxruntime")
    assert done.exit_code == 2
    assert "--allow-unproven" in done.stderr


def test_a_table_for_people_tells_percent_and_the_difference(root, bundle_folder):
    done = mgn_deploy("validate", "--data", f"market1501:{root}", "--bundle", bundle_folder)
    assert done.exit_code == 0, done.stderr
    for word in ("rank-1", "mAP", "mINP", "openvino", "PyTorch", "difference", "+0.00", "percent"):
        assert word in done.stdout


def test_an_unreadable_image_is_named(root, bundle_folder, tmp_path):
    shutil.copytree(root, tmp_path / "people")
    broken = sorted((tmp_path / "people" / "query").iterdir())[2]
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=f"{broken.name}' cannot be embedded: the file is empty"):
        validate(open_data(f"market1501:{tmp_path / 'people'}"), Embedder.open(bundle_folder, "onnxruntime"), None)


# Kept embeddings


def test_a_run_that_was_stopped_goes_on_from_its_store(root, bundle_folder, tmp_path):
    data = open_data(f"market1501:{root}")
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    total = len(data.query) + len(data.without_junk().gallery)

    def stop(step, done, whole):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(data, embedder, None, store=tmp_path / "kept", progress=stop)
    [folder] = (tmp_path / "kept").iterdir()
    assert folder.name == f"onnxruntime-{embedder.bundle.id[:12]}"
    before = len(Store.open(folder))
    assert total // 2 <= before < total
    done = []
    result = validate(data, embedder, None, store=tmp_path / "kept", progress=lambda _, at, whole: done.append(whole))
    assert done[0] == total - before
    plain = validate(data, embedder, None)
    assert result.measured.to_dict() == pytest.approx(plain.measured.to_dict(), abs=1e-9)


def test_a_cache_that_cannot_be_written_is_told_and_stops_nobody(root, bundle_folder, tmp_path, monkeypatch, said):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert validation_store(Bundle.open(bundle_folder), open_data(f"market1501:{root}")) is None
    assert "no embedding is kept for another run: " in said[-1]
    assert "cannot be made (Not a directory)" in said[-1]


def test_junk_is_never_embedded_and_changes_no_figure(root, bundle_folder, tmp_path, said):
    data = open_data(f"market1501:{root}")
    junk = [image for image in data.gallery if image.identity == -1]
    assert junk
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    validate(data, embedder, None, store=tmp_path / "kept")
    [folder] = (tmp_path / "kept").iterdir()
    names = {row.name for row in Store.open(folder)}
    assert len(names) == len(data.query) + len(data.gallery) - len(junk)
    assert f"{len(junk)} junk images of the gallery are never ranked, and not embedded" in said


def test_the_reference_runs_on_a_sample_of_people(root, bundle_folder, said):
    data = open_data(f"market1501:{root}")
    embedder, reference = Embedder.open(bundle_folder, "onnxruntime"), Embedder.open_reference(bundle_folder)
    result = validate(data, embedder, reference, reference_sample=20)
    assert result.sample is not None
    assert result.reference is None
    assert result.measured.queries == len(data.query)
    assert result.sample.measured.queries < len(data.query)
    assert result.differences() == pytest.approx(dict.fromkeys(KEYS, 0), abs=1e-6)
    assert result.passes()
    assert "the difference is about them" in " ".join(said)


def test_an_image_that_cannot_be_read_is_named(root, bundle_folder, tmp_path):
    shutil.copytree(root, tmp_path / "people")
    victim = sorted((tmp_path / "people/query").iterdir())[0]
    victim.write_bytes(b"")
    data = open_data(f"market1501:{tmp_path / 'people'}")
    with pytest.raises(UserError, match=f"{victim.name}' cannot be embedded: the file is empty"):
        validate(data, Embedder.open(bundle_folder, "onnxruntime"), None, store=tmp_path / "kept")
