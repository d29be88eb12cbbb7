"""Open-set figures: equal to plain loops, and what they leave out."""

import numpy as np
import pytest
from made_up_people import calibrated, embeddings_of

from mgn_deploy.errors import UserError
from mgn_deploy.identity.open_set import measure_open_set

ROWS, OWNERS, CAMERAS = embeddings_of(30, 6, noise=1.3, cameras=3)
IS_QUERY = np.arange(len(ROWS)) % 6 < 2
QUERY = ROWS[IS_QUERY], OWNERS[IS_QUERY], CAMERAS[IS_QUERY]
GALLERY = ROWS[~IS_QUERY], OWNERS[~IS_QUERY], CAMERAS[~IS_QUERY]


def measured(query=QUERY, gallery=GALLERY, **options):
    return measure_open_set(query[0], gallery[0], query[1], query[2], gallery[1], gallery[2], **options)


def by_loops(half, threshold):
    """FPIR and DIR of one half of the people at a threshold, search by search."""
    alarms, strangers, hits, mated = 0, 0, 0, 0
    for row, person, camera in zip(*QUERY, strict=True):
        means = {}
        for candidate in half:
            images = [g for g, p, c in zip(*GALLERY, strict=True) if p == candidate and c != camera]
            means[candidate] = np.mean([row @ image for image in images])
        best = max(means, key=means.get)
        if person in half:
            mated += 1
            hits += best == person and means[best] >= threshold
        else:
            strangers += 1
            alarms += means[best] >= threshold
    return alarms / strangers, hits / mated


def test_rates_are_those_of_plain_loops():
    result = measured(draws=1, fpirs=(0.1,), seed=4)
    half = set(np.random.default_rng(4).permutation(30)[:15].tolist())
    (point,) = result.points
    fpir, rate = by_loops(half, point.threshold[0] + 1e-6)  # sums differ in their last bit
    assert point.fpir == pytest.approx((fpir,) * 3)
    assert point.dir == pytest.approx((rate,) * 3)
    assert fpir <= 0.1
    assert (result.people, result.enrolled, result.mated, result.non_mated) == (30, 15, 30, 30)


def test_a_lower_rate_finds_fewer_people():
    strict, loose = measured(fpirs=(0.04, 0.3), draws=20).points
    assert strict.threshold[0] > loose.threshold[0]
    assert strict.dir[0] < loose.dir[0]
    assert "needs 75 searches by strangers, and there are 30" in strict.problem
    assert loose.problem is None


def test_a_calibrations_threshold_for_the_list_is_tried():
    calibration = calibrated(100, images=6, noise=1.3)
    *_, point = measured(calibration=calibration, fars=(0.05,), draws=20).points
    assert point.name == "calibration, FAR 0.05"
    assert point.threshold[0] == point.threshold[2]
    assert point.fpir[0] <= 0.05  # means of several images reach a threshold of pairs less often


def test_people_who_are_in_no_gallery_are_strangers_in_every_draw():
    others = embeddings_of(5, 2, noise=1.3, seed=9)
    query = tuple(
        np.concatenate([mine, theirs])
        for mine, theirs in zip(QUERY, (others[0], others[1] + 900, others[2]), strict=True)
    )
    assert measured(query, draws=3).non_mated == 40


def test_a_query_whose_person_has_only_images_by_its_camera_is_not_searched():
    only = GALLERY[2] == np.where(GALLERY[1] == 0, CAMERAS[0], GALLERY[2])  # of person 0 the images by camera 0
    gallery = tuple(column[only] for column in GALLERY)
    first = np.flatnonzero((QUERY[1] == 0) & (QUERY[2] == CAMERAS[0]))
    assert len(first) == 1
    result = measured(gallery=gallery, draws=10)
    assert result.mated + result.non_mated == len(QUERY[0]) - 1


@pytest.mark.parametrize(
    "gallery, sentence",
    [
        (tuple(column[:12] for column in GALLERY), "at least 4 people"),
        ((GALLERY[0], GALLERY[1] + 500, GALLERY[2]), "no query shows anybody"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(gallery, sentence):
    with pytest.raises(UserError, match=sentence):
        measured(gallery=gallery)
