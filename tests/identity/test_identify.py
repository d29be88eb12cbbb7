"""Two embeddings compared, and enrolled people named or not."""

import numpy as np
import pytest
from made_up_people import BUNDLE, calibrated, embeddings_of

from mgn_deploy.errors import UserError
from mgn_deploy.identity.compare import compare
from mgn_deploy.identity.identify import (
    decide_for_list,
    far_of_a_comparison,
    identify,
    posteriors,
    similarities_to_people,
)
from mgn_deploy.identity.people import Enrolled
from mgn_deploy.identity.person import Person

ROWS, OWNERS, _ = embeddings_of(60, 8, seed=5, noise=0.6)


def enrolled_of(people, images=3, bundle_id=BUNDLE):
    found = (Person(f"person {p}", ROWS[p == OWNERS][:images], ("a",) * images, "") for p in people)
    return Enrolled(bundle_id, tuple(found))


@pytest.fixture(scope="module")
def calibration():
    return calibrated(100, images=6, noise=0.6)


def test_two_images_of_a_person_are_the_same_and_two_peoples_are_not(calibration):
    same, other = compare(ROWS[0], ROWS[1], calibration), compare(ROWS[0], ROWS[8], calibration)
    assert (same.same, other.same) == (True, False)
    assert same.similarity == pytest.approx(float(ROWS[0] @ ROWS[1]))
    assert same.threshold == calibration.decide(1e-3).threshold
    assert same.probability > 0.95 > 0.1 > other.probability
    assert same.to_dict()["prior"] == 0.5


def test_without_a_calibration_there_is_a_similarity_alone():
    result = compare(ROWS[0], ROWS[1], None)
    assert result.similarity == pytest.approx(float(ROWS[0] @ ROWS[1]))
    assert (result.probability, result.same, result.threshold) == (None, None, None)


@pytest.mark.parametrize("other, sentence", [(ROWS[0, :5], "shapes"), (ROWS[0] * np.nan, "not finite")])
def test_embeddings_that_cannot_be_compared_are_refused(calibration, other, sentence):
    with pytest.raises(UserError, match=sentence):
        compare(ROWS[0], other, calibration)


def test_a_similarity_to_a_person_is_the_mean_over_the_images():
    enrolled = enrolled_of([0, 1, 2], images=3)
    expected = [[np.mean(ROWS[p == OWNERS][:3] @ query) for p in range(3)] for query in ROWS[:5]]
    np.testing.assert_allclose(similarities_to_people(ROWS[:5], enrolled), expected, atol=1e-6)


def test_enrolled_people_are_named_and_strangers_are_unknown(calibration):
    enrolled = enrolled_of(range(20))
    mine = np.concatenate([ROWS[p == OWNERS][3:] for p in range(20)])
    truth = np.repeat([f"person {p}" for p in range(20)], 5)
    answers = identify(mine, enrolled, calibration, far=1e-2)
    named = [answer.name for answer in answers]
    assert np.mean([name == true for name, true in zip(named, truth, strict=True)]) > 0.7
    assert not any(name not in (None, true) for name, true in zip(named, truth, strict=True))
    strangers = identify(ROWS[OWNERS >= 20], enrolled, calibration, far=1e-2)
    assert np.mean([answer.known for answer in strangers]) <= 0.02
    assert all(answer.name is None for answer in strangers if not answer.known)


def test_images_together_are_one_answer_that_is_surer(calibration):
    enrolled = enrolled_of(range(10))
    alone = identify(ROWS[OWNERS == 4][3:], enrolled, calibration)
    (together,) = identify(ROWS[OWNERS == 4][3:], enrolled, calibration, together=True, names=list("abcde"))
    assert (together.name, together.queries) == ("person 4", tuple("abcde"))
    assert together.candidates[0].similarity == pytest.approx(np.mean([one.candidates[0].similarity for one in alone]))
    enrolled_images = len(enrolled.people[4].embeddings)
    assert (alone[0].candidates[0].pairs, together.candidates[0].pairs) == (enrolled_images, 5 * enrolled_images)
    assert together.to_dict()["calibrated_for"] == 2  # people of the calibration have three images by each camera


def test_who_has_more_images_is_named_at_a_lower_threshold_at_the_same_rate(calibration):
    few, many = enrolled_of(range(20), images=1), enrolled_of(range(20), images=3)
    for far in (0.3, 1e-2):
        one, mean = (identify(ROWS[OWNERS >= 20], some, calibration, far=far) for some in (few, many))
        assert mean[0].threshold == decide_for_list(calibration, far, 20, 3).threshold < one[0].threshold
        assert (one[0].calibrated_for, mean[0].calibrated_for) == (1, 2)
    assert [answer.known for answer in mean].count(True) <= 0.02 * len(mean)


def test_a_name_says_where_the_people_of_its_threshold_were_few(calibration):
    for images, people in ((1, "100 people"), (3, "100 people, for means over 2 images,")):
        answer = identify(ROWS[:1], enrolled_of(range(20), images), calibration, far=1e-2)[0]
        assert answer.far == 1e-2
        assert answer.note.startswith(f"{people} are few for so low a rate, 110 would be enough")
    assert identify(ROWS[:1], enrolled_of(range(2), 3), calibration, far=1e-2)[0].note is None


def test_people_with_different_numbers_of_images_are_ordered_by_how_far_they_are_above_their_thresholds(calibration):
    one, three = Person("one", ROWS[:1], ("a",), ""), Person("three", ROWS[8:11], ("a",) * 3, "")
    wanted = [
        decide_for_list(calibration, 1e-2, 2, images).threshold + above for images, above in ((1, 0.01), (3, 0.02))
    ]
    query = np.linalg.lstsq(np.stack([ROWS[0], ROWS[8:11].mean(0)]), wanted, rcond=None)[0].astype(np.float32)
    (answer,) = identify(query[None], Enrolled(BUNDLE, (one, three)), calibration, far=1e-2)
    assert answer.name == "three"
    assert answer.candidates[0].similarity < answer.candidates[1].similarity


def test_probabilities_of_everybody_and_nobody_sum_to_one_and_fall_with_the_list(calibration):
    similarities = np.array([0.5, 0.1, 0.0])
    people, nobody = posteriors(similarities, calibration, 0.5)
    assert people.sum() + nobody == pytest.approx(1)
    assert people.argmax() == 0
    longer, _ = posteriors(np.append(similarities, np.zeros(50)), calibration, 0.5)
    assert longer[0] < people[0]
    (alone,), _ = posteriors(similarities[:1], calibration, 0.3)
    assert alone == pytest.approx(float(calibration.probability(0.5, 0.3)))


def test_a_longer_list_has_a_higher_threshold_for_the_same_rate(calibration):
    assert far_of_a_comparison(1e-2, 1) == pytest.approx(1e-2)
    assert far_of_a_comparison(1e-2, 100) == pytest.approx(1e-4, rel=0.01)
    one, ten = decide_for_list(calibration, 1e-2, 1), decide_for_list(calibration, 1e-2, 10)
    assert (one.far, ten.far) == (1e-2, 1e-2)
    assert one.threshold == calibration.decide(1e-2).threshold
    assert ten.threshold == calibration.decide(far_of_a_comparison(1e-2, 10)).threshold > one.threshold


def test_a_list_too_long_for_the_calibration_says_the_rate_that_it_has(calibration):
    decision = decide_for_list(calibration, 1e-3, 1000)
    supported = 3 / calibration.data.impostor
    assert decision.far == pytest.approx(1 - (1 - supported) ** 1000)
    assert "for a list of 1000 people" in decision.problem
    assert "names a stranger at a rate of" in decision.problem


def test_without_a_calibration_the_most_similar_are_listed_and_nobody_is_named():
    (answer,) = identify(ROWS[3:4], enrolled_of(range(5)), None)
    assert (answer.name, answer.known, answer.probability) == (None, None, None)
    assert answer.candidates[0].name == "person 0"
    assert answer.to_dict()["candidates"][0]["probability"] is None


def test_of_one_image_under_two_names_both_are_said(calibration):
    people = enrolled_of(range(5))
    twice = Person("other name", people.people[0].embeddings, people.people[0].images, "")
    for learned in (calibration, None):
        (answer,) = identify(ROWS[3:4], Enrolled(BUNDLE, (*people.people, twice)), learned)
        assert "'other name' is as near as 'person 0'" in answer.note
        assert "as near" not in (identify(ROWS[3:4], people, learned)[0].note or "")


@pytest.mark.parametrize(
    "queries, enrolled, sentence",
    [
        (ROWS[:1], Enrolled(BUNDLE, ()), "nobody is enrolled"),
        (ROWS[:1, :5], enrolled_of([1]), "do not fit embeddings of 32"),
        (ROWS[:1] * np.nan, enrolled_of([1]), "not finite"),
        (ROWS[:1], enrolled_of([1], bundle_id="b" * 64), "the calibration belongs to bundle aaaaaaaaaaaa"),
    ],
)
def test_what_cannot_be_identified_is_one_sentence(calibration, queries, enrolled, sentence):
    with pytest.raises(UserError, match=sentence):
        identify(queries, enrolled, calibration)
