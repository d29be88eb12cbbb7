"""A calibration: what it says, and the files that it is read from."""

import json
import shutil
import threading

import numpy as np
import pytest
from made_up_people import BUNDLE, calibrated, embeddings_of

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import UserError
from mgn_deploy.export.exporter import FILES
from mgn_deploy.files import atomic_folder
from mgn_deploy.identity.calibrate_embeddings import calibrate_embeddings
from mgn_deploy.identity.calibration import CALIBRATION, Calibration
from mgn_deploy.identity.pairs import genuine_and_impostor, to_means


@pytest.fixture(scope="module")
def made():
    return calibrated(100, images=10)


@pytest.fixture
def bundle(bundle_folder, tmp_path):
    return Bundle.open(shutil.copytree(bundle_folder, tmp_path / "bundle"))


def test_probabilities_and_rates_hold_on_other_people(made):
    genuine, impostor = (one.similarities for one in genuine_and_impostor(*embeddings_of(300, 6, seed=9)))
    p, q = made.probability(genuine), made.probability(impostor)
    for low, high in ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.95)):
        same, other = (np.mean((one >= low) & (one < high)) for one in (p, q))
        assert low - 0.06 <= same / (same + other) <= high + 0.06
    for far in (1e-2, 1e-3):
        assert np.mean(impostor >= made.decide(far).threshold) == pytest.approx(far, rel=0.35)


@pytest.mark.parametrize("images", [2, 4])
def test_rates_and_probabilities_of_means_over_images_hold_on_other_people(made, images):
    genuine, impostor = (one.similarities for one in to_means(*embeddings_of(300, 10, seed=9), images))
    for far in (1e-2, 1e-3):
        decision = made.decide(far, images)
        assert np.mean(impostor >= decision.threshold) == pytest.approx(far, rel=0.35)
        assert decision.threshold < made.decide(far).threshold
        assert decision.images == images
    same, other = (np.mean(np.abs(made.log_likelihood_ratio(one, images)) < 1) for one in (genuine, impostor))
    assert same / (same + other) == pytest.approx(0.5, abs=0.12)


def test_means_over_more_images_than_people_have_are_judged_by_those_over_fewer(made):
    assert [one.images for one in made.pooled] == [2, 4]  # of ten images five are by the other camera
    assert made.decide(1e-2, 100) == made.decide(1e-2, 4)
    assert made.decide(1e-2, 3) == made.decide(1e-2, 2)
    lowest = made.pooled[-1].tail[-1][0]
    assert made.decide(0.99 * lowest, 4).images < 4  # a rate that the means are too few for
    np.testing.assert_array_equal(made.log_likelihood_ratio(0.3, np.array([1, 3, 9])),
                                  [made.log_likelihood_ratio(0.3, one) for one in (1, 2, 4)])  # fmt: skip


def test_a_calibration_of_before_means_judges_them_as_pairs(made, bundle):
    older = made.model_copy(update={"bundle_id": bundle.id}).to_dict()
    del older["pooled"]
    (bundle.folder / CALIBRATION).write_text(json.dumps(older))
    assert Calibration.open(bundle).decide(1e-2, 4) == made.decide(1e-2)


def test_a_rate_between_two_others_has_a_threshold_between_theirs(made):
    thresholds = [made.decide(far).threshold for far in (1e-2, 3e-3, 1e-3, 3e-4)]
    assert thresholds == sorted(set(thresholds))
    (rate,) = [rate for rate in made.rates if rate.far == 1e-3]
    assert made.decide(1e-3).threshold == rate.threshold.value


def test_a_rate_that_the_pairs_do_not_support_gets_the_strictest_threshold_and_a_sentence(made):
    decision = made.decide(1e-7)
    assert decision.far == pytest.approx(3 / made.data.impostor)
    assert decision.threshold == made.tail[-1][1]
    assert "needs 30,000,000 impostor pairs and the calibration has 247,500" in decision.problem


def test_few_people_are_said_for_a_rate_that_the_pairs_alone_support(made):
    assert made.decide(1e-3).problem is None  # 100 people make 4950 pairs of people, of 3000 needed
    assert "100 people are few for so low a rate, 246 would be enough" in made.decide(1e-4).problem
    assert "174 would be enough" in made.decide(2e-4).problem  # any rate, not the three of the table alone
    assert any("100 people are few" in note for note in made.notes)


def test_few_people_are_said_of_means_over_several_images_too(made):
    for images in (2, 4):
        sentence = f"100 people, for means over {images} images, are few for so low a rate, 246 would be enough"
        (rates,) = (one.rates for one in made.pooled if one.images == images)
        assert [rate.problem is None for rate in rates] == [True, True, False]  # of 1e-2, 1e-3 and 1e-4
        assert sentence in rates[-1].problem
        assert rates[-1].problem == made.decide(1e-4, images).problem
        assert f"FAR 0.0001: {rates[-1].problem}" in made.notes
        assert rates[1].threshold.value == made.decide(1e-3, images).threshold


@pytest.mark.parametrize("far", [0, 1, -1e-3, float("nan")])
def test_a_rate_that_is_none_is_refused(made, far):
    with pytest.raises(UserError, match="a false-accept rate lies between 0 and 1"):
        made.decide(far)


def test_a_prior_that_is_none_is_refused(made):
    with pytest.raises(UserError, match="between 0 and 1"):
        made.probability(0.5, 1.0)


def test_the_two_methods_are_compared_and_the_better_one_is_taken(made):
    assert set(made.cross_validation) == {"platt", "isotonic"}
    assert made.cross_validation[made.method].log_loss == min(one.log_loss for one in made.cross_validation.values())
    assert sum(row.pairs for row in made.reliability) > 10_000


def test_each_pair_of_cameras_has_its_thresholds_where_it_has_pairs():
    made = calibrated(30, images=12, cameras=3)
    assert [pair.cameras for pair in made.camera_pairs] == [(0, 1), (0, 2), (1, 2)]
    assert sum(pair.impostor for pair in made.camera_pairs) == made.data.impostor
    assert [rate.far for rate in made.camera_pairs[0].rates] == [1e-2, 1e-3]  # 1e-4 needs more pairs


def test_few_pairs_of_a_rate_leave_it_out_and_say_so():
    made = calibrated(12, images=8)
    assert [rate.far for rate in made.rates] == [1e-2]
    assert any("no threshold for a false-accept rate of 0.001: it needs 3,000" in note for note in made.notes)


@pytest.mark.parametrize(
    "people, images, cameras, sentence",
    [(1, 40, 2, "1 people"), (9, 8, 2, "9 people"), (40, 1, 2, "0 pairs of one person"), (40, 8, 1, "by one camera")],
)
def test_too_few_people_or_pairs_or_one_camera_are_refused(people, images, cameras, sentence):
    rows, owners, places = embeddings_of(people, images, cameras=cameras)
    with pytest.raises(UserError, match=sentence):
        calibrate_embeddings(rows, owners, places, bundle_id=BUNDLE, backend="x", source="made up", replicates=2)


def test_one_camera_can_be_asked_for_and_is_noted():
    made = calibrated(20, cameras=1, same_camera=True)
    assert made.data.same_camera
    assert "pairs by one camera are in it, which are easier than those by two" in made.notes


def test_it_is_read_as_it_was_written_and_the_bundle_stays_whole(made, bundle):
    mine = made.model_copy(update={"bundle_id": bundle.id})
    assert Calibration.find(bundle) is None
    mine.write(bundle)
    assert Calibration.open(Bundle.open(bundle.folder)) == mine
    assert Bundle.open(bundle.folder).id == bundle.id
    assert json.loads(json.dumps(mine.to_dict())) == json.loads((bundle.folder / CALIBRATION).read_text())


def test_a_bundle_with_a_calibration_can_be_replaced_by_another_export(made, bundle):
    made.model_copy(update={"bundle_id": bundle.id}).write(bundle)
    with atomic_folder(bundle.folder, names=FILES) as new:
        (new / "manifest.json").touch()
    assert not (bundle.folder / CALIBRATION).exists()


def test_a_bundle_without_one_says_how_to_get_one(bundle):
    with pytest.raises(UserError, match=r"has no calibration.json: `mgn-deploy calibrate --data KIND:DIR --bundle"):
        Calibration.open(bundle)


def test_another_bundles_calibration_is_neither_written_nor_read(made, bundle):
    with pytest.raises(UserError, match="belongs to bundle aaaaaaaaaaaa"):
        made.write(bundle)
    assert not (bundle.folder / CALIBRATION).exists()
    (bundle.folder / CALIBRATION).write_text(made.model_dump_json())
    with pytest.raises(UserError, match=r"belongs to bundle aaaaaaaaaaaa and this one is .*: calibrate again"):
        Calibration.find(bundle)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda text: text[: len(text) // 2], "is not a calibration that"),
        (lambda text: "[]", "is not a calibration that"),
        (lambda text: '{"calibration": "of OpenCV"}', "is not a calibration that"),
        (lambda text: "[" * 100_000, "is not a calibration that"),
        (lambda text: text.replace('"schema_version":1', '"schema_version":2'), "schema_version: Input should be 1"),
        (lambda text: text.replace('"prior":0.5', '"prior":1.5'), "reads .prior: "),
        (lambda text: text.replace('"prior":0.5', '"prior":NaN'), "reads .prior: "),
        (lambda text: text.replace('"method":', '"way":'), "reads .method: "),
    ],
)
def test_a_broken_file_is_one_sentence(made, bundle, change, sentence):
    (bundle.folder / CALIBRATION).write_text(change(made.model_dump_json()))
    with pytest.raises(UserError, match=sentence):
        Calibration.find(bundle)


def test_threads_share_one(made):
    similarities = np.linspace(-1, 1, 1001)
    expected, wrong = made.probability(similarities), []

    def ask():
        for _ in range(50):
            if not (made.probability(similarities) == expected).all():
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
