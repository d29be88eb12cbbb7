"""Rank lists with probabilities."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from made_up_people import BUNDLE, calibrated, embeddings_of
from made_up_store import made_up_store

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import UserError
from mgn_deploy.identity.ranked import estimate_prior, judge, judge_by_bundle
from mgn_deploy.retrieval.rank_list import RankedImage, RankList


def ranked(*similarities):
    images = [RankedImage(Path(f"{n}.jpg"), f"{n}.jpg", one, None, None) for n, one in enumerate(similarities)]
    return RankList(RankedImage(Path("q.jpg"), "q.jpg", None, None, None), images)


@pytest.fixture(scope="module")
def calibration():
    return calibrated(100, images=6, noise=0.6)


def test_each_result_has_the_probability_of_its_pair_and_its_side_of_the_threshold(calibration):
    (judged,), by = judge([ranked(0.9, 0.5, None, -0.2)], calibration, far=1e-2, prior=0.1)
    assert (by.far, by.threshold, by.prior) == (1e-2, calibration.decide(1e-2).threshold, 0.1)
    first, second, none, last = judged.results
    assert first.probability == pytest.approx(float(calibration.probability(0.9, 0.1)))
    assert [first.same, second.same, last.same] == [one >= by.threshold for one in (0.9, 0.5, -0.2)]
    assert (none.probability, none.same) == (None, None)
    assert judged.to_dict()["results"][0]["same"] is True
    assert "probability" not in ranked(0.9).to_dict()["results"][0]


def test_the_share_of_pairs_of_one_person_is_estimated_without_labels(calibration):
    for people, images in ((10, 10), (60, 5), (150, 10)):
        rows, owners, _ = embeddings_of(people, images, noise=0.6, seed=7)
        same = owners[:, None] == owners
        true = (same.sum() - len(rows)) / (len(rows) * (len(rows) - 1))
        assert estimate_prior(rows, calibration, images=600) == pytest.approx(true, rel=0.5)


def test_an_estimate_is_never_below_one_pair_an_image_nor_above_a_half(calibration):
    assert estimate_prior(np.eye(20, dtype=np.float32), calibration) >= 1 / 20
    assert estimate_prior(np.ones((5, 1), np.float32), calibration) == 0.5
    assert estimate_prior(np.ones((1, 1), np.float32), calibration) == 0.5


def test_a_bundles_calibration_is_used_where_there_is_one(calibration, bundle_folder, tmp_path, caplog):
    caplog.set_level("INFO", "mgn_deploy")
    bundle = Bundle.open(shutil.copytree(bundle_folder, tmp_path / "bundle"))
    store = made_up_store(tmp_path, np.eye(20), [None] * 20, bundle_id=bundle.id)
    lists = [ranked(0.9, 0.1)]
    assert judge_by_bundle(lists, None, store) == (lists, None)
    assert judge_by_bundle(lists, bundle.folder, store) == (lists, None)
    calibration.model_copy(update={"bundle_id": bundle.id}).write(bundle)
    judged, by = judge_by_bundle(lists, bundle.folder, store, far=1e-2)
    assert by.prior == estimate_prior(store.embeddings(), calibration)
    assert (
        f"probabilities where {100 * by.prior:.2g}% of pairs are one person (estimated from the gallery)" in caplog.text
    )
    assert [one.same for one in judged[0].results] == [True, False]
    assert judge_by_bundle(lists, bundle.folder, store, expanded=True) == (lists, None)
    with pytest.raises(UserError, match="lies between 0 and 1"):
        judge_by_bundle(lists, None, store, far=0)


def test_of_a_gallery_only_the_images_that_are_drawn_are_read(calibration, tmp_path):
    """A gallery may be larger than memory."""
    rows, owners, _ = embeddings_of(20, 5, noise=0.6)
    store = made_up_store(tmp_path, rows, owners.tolist())
    expected = estimate_prior(store.embeddings(), calibration, images=40)
    store.embeddings = None  # nobody may call it
    assert estimate_prior(store, calibration, images=40) == expected


def test_a_gallery_of_another_bundle_is_refused(bundle_folder, tmp_path):
    store = made_up_store(tmp_path, np.eye(4), [None] * 4, bundle_id=BUNDLE)
    with pytest.raises(UserError, match="belongs to bundle aaaaaaaaaaaa"):
        judge_by_bundle([ranked(0.9)], bundle_folder, store)
