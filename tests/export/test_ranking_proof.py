"""What a ranking proves, and an export whose engines fail."""

from __future__ import annotations

import json

import onnx
import pytest
from conftest import mgn_deploy
from wrong_graphs import swap_red_and_blue

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import Quantisation, Ranking
from mgn_deploy.datasets import open_data
from mgn_deploy.datasets.drawn import draw_market1501
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.export.exporter import export_bundle
from mgn_deploy.export.proof.proof import with_ranking
from mgn_deploy.export.proof.prove import allowed_map
from mgn_deploy.retrieval.validate import validate


@pytest.mark.parametrize(
    ("precision", "measured", "allowed", "missed"),
    [
        ("fp32", (0.5, 0.4), 0, []),
        ("fp32", (0.6, 0.6), 0, []),  # better is no loss
        ("fp16", (0.5, 0.3997), 0, []),
        ("fp16", (0.5, 0.3995), 0, ["mAP"]),
        ("fp16", (0.495, 0.4), 0, []),  # one query of 200
        ("fp16", (0.49, 0.4), 0, ["rank-1"]),
        ("int8", (0.495, 0.3961), 0, []),
        ("int8", (0.48, 0.39), 0, ["mAP", "rank-1"]),
        ("int8", (0.48, 0.39), 0.02, []),
    ],
)
def test_a_ranking_keeps_its_share_of_the_references(bundle_folder, precision, measured, allowed, missed):
    proof = Bundle.open(bundle_folder).manifest.proofs["onnxruntime"]
    rank1, mean_ap = measured
    ranking = Ranking(
        data="d", queries=200, gallery=7, rank1=rank1, mAP=mean_ap, reference_rank1=0.5, reference_mAP=0.4
    )
    ranked = with_ranking(proof, ranking, precision, allowed)
    assert [miss.split()[0] for miss in ranked.misses] == missed
    assert ranked.passed == (not missed)
    assert ranked.ranking == ranking


def test_a_budget_of_neighbours_allows_no_loss_of_map():
    budget = {"engine": "openvino", "method": "max", "errors": {}, "images": 1, "image_source": "", "images_sha256": ""}
    of_neighbours = Quantisation(**budget, max_drop=20, drop=1, drop_of="top-10 agreement")
    assert allowed_map(of_neighbours) == 0
    assert allowed_map(of_neighbours.model_copy(update={"drop_of": "mAP"})) == 0.2
    assert allowed_map(None) == 0


@pytest.mark.slow
def test_export_ranks_labelled_people_with_every_engine_beside_the_reference(weights, tmp_path):
    draw_market1501(tmp_path / "people", train_identities=1, test_identities=6)
    done = mgn_deploy("export", weights, "-o", tmp_path / "b", "--data", f"market1501:{tmp_path / 'people'}")
    assert done.exit_code == 0, done.stderr
    assert "12 queries" in done.stdout
    rankings = {name: proof.ranking for name, proof in Bundle.open(tmp_path / "b").manifest.proofs.items()}
    assert set(rankings) == {"openvino", "onnxruntime", "torch"}
    data = open_data(f"market1501:{tmp_path / 'people'}")
    expected = validate(data, Embedder.open(tmp_path / "b", "torch"), None).measured
    for ranking in rankings.values():
        assert (ranking.data, ranking.queries, ranking.gallery) == ("market1501", 12, len(data.gallery))
        assert (ranking.reference_rank1, ranking.reference_mAP) == (expected.rank[1], expected.mAP)
        assert ranking.mAP == pytest.approx(expected.mAP, abs=1e-4)


@pytest.mark.slow
def test_a_wrong_export_exits_1_is_marked_and_is_not_run_unless_allowed(
    weights, bundle_folder, crops, tmp_path, monkeypatch
):
    """The whole way with an exporter that is wrong: it takes BGR for RGB."""
    wrong = onnx.load(bundle_folder / "graph.onnx")
    swap_red_and_blue(wrong)
    monkeypatch.setattr("mgn_deploy.export.precision.convert.build_graph", lambda model, flip: wrong)
    done = mgn_deploy("export", weights, "-o", tmp_path / "b", "--proof-images", crops, "--json")
    assert done.exit_code == 1
    assert "is not proven for openvino (worst cosine" in done.stderr
    expected = {"openvino": False, "onnxruntime": False, "torch": True}
    assert {name: proof["passed"] for name, proof in json.loads(done.stdout)["proofs"].items()} == expected
    assert {name: proof.passed for name, proof in Bundle.open(tmp_path / "b").manifest.proofs.items()} == expected
    assert Embedder.open(tmp_path / "b").backend.name == "torch"

    embed = ("embed", crops, "-o", tmp_path / "store", "--bundle", tmp_path / "b", "--backend", "onnxruntime")
    refused = mgn_deploy(*embed)
    assert refused.exit_code == 2
    assert "is not proven for onnxruntime (worst cosine" in refused.stderr
    assert not (tmp_path / "store").exists()
    allowed = mgn_deploy(*embed, "--allow-unproven", "--json")
    assert allowed.exit_code == 0, allowed.stderr
    assert json.loads(allowed.stdout)["embedded"] == 40


def test_a_backend_that_fails_while_it_is_proven_costs_only_its_own_proof(weights, tmp_path, monkeypatch, said):
    def full(bundle, *, fused_heads):
        raise UserError("the GPU has too little free memory")

    monkeypatch.setattr(ENGINES["openvino"].load(), "open", full)
    bundle = export_bundle(weights, tmp_path / "b")
    assert set(bundle.manifest.proofs) == {"onnxruntime", "torch"}
    assert "no proof for openvino: the GPU has too little free memory" in said


def test_where_every_engine_fails_the_sentence_says_why(weights, tmp_path, monkeypatch):
    def full(bundle, *, fused_heads):
        raise UserError("the memory is full")

    for name in ("openvino", "onnxruntime"):
        monkeypatch.setattr(ENGINES[name].load(), "open", full)
    with pytest.raises(UserError, match=r"openvino: the memory is full \| onnxruntime: the memory is full"):
        export_bundle(weights, tmp_path / "b")
