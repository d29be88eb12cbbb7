"""Pairs of images: which there are, and which are drawn."""

from itertools import combinations

import numpy as np
import pytest
from made_up_people import embeddings_of

from mgn_deploy.errors import UserError
from mgn_deploy.identity.pairs import count_impostor, genuine_and_impostor, to_means


def by_loops(rows, people, cameras, same_camera):
    """Sorted similarities of each kind, pair by pair."""
    found = {True: [], False: []}
    for i, j in combinations(range(len(rows)), 2):
        if same_camera or cameras[i] != cameras[j]:
            found[bool(people[i] == people[j])].append(float(rows[i] @ rows[j]))
    return [sorted(found[kind], reverse=True) for kind in (True, False)]


@pytest.mark.parametrize("same_camera", [False, True])
def test_all_pairs_of_both_kinds_are_found(same_camera):
    rows, people, cameras = embeddings_of(6, 5, cameras=3)
    shuffled = np.random.default_rng(1).permutation(len(rows))
    rows, people, cameras = rows[shuffled], people[shuffled], cameras[shuffled]
    pairs = genuine_and_impostor(rows, people, cameras, same_camera=same_camera)
    for made, expected in zip(pairs, by_loops(rows, people, cameras, same_camera), strict=True):
        np.testing.assert_allclose(made.similarities, expected, atol=1e-6)
        assert made.total == len(expected)
    assert (pairs[0].first == pairs[0].second).all()
    assert (pairs[1].first != pairs[1].second).all()
    assert count_impostor(people, cameras, same_camera) == pairs[1].total


def test_a_draw_of_many_pairs_has_their_distribution_and_no_pair_twice():
    rows, people, cameras = embeddings_of(60, 10)
    _, drawn = genuine_and_impostor(rows, people, cameras, max_pairs=20_000, seed=3)
    _, every = genuine_and_impostor(rows, people, cameras)
    assert (len(drawn), drawn.total) == (20_000, every.total)
    for quantile in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(drawn.similarities, quantile) == pytest.approx(
            np.quantile(every.similarities, quantile), abs=0.01
        )
    assert (
        len(
            {
                (s, a, b)
                for s, a, b in zip(
                    *map(np.ndarray.tolist, (drawn.similarities, drawn.first, drawn.second)), strict=True
                )
            }
        )
        > 19_900
    )


def test_means_are_over_a_persons_images_by_other_cameras():
    rows, people, cameras = (column[1:] for column in embeddings_of(6, 6))  # person 0 has two by camera 0, others three
    genuine, impostor = to_means(rows, people, cameras, 3)
    expected = {True: [], False: []}
    for row, person, camera in zip(rows, people, cameras, strict=True):
        for other in range(6):
            theirs = rows[(people == other) & (cameras != camera)]
            if len(theirs) == 3:
                expected[bool(other == person)].append(float(np.mean(theirs @ row)))
    for made, mine in ((genuine, expected[True]), (impostor, expected[False])):
        np.testing.assert_allclose(made.similarities, sorted(mine, reverse=True), atol=1e-6)
    assert (genuine.first == genuine.second).all()
    assert (impostor.first != impostor.second).all()


def test_no_image_is_in_the_mean_that_it_is_compared_with():
    rows, people, cameras = np.eye(40, dtype=np.float32), np.repeat(np.arange(5), 8), np.arange(40) % 2
    genuine, impostor = to_means(rows, people, cameras, 3, same_camera=True)
    assert len(genuine) >= 5 * (8 - 2 * 3)
    assert not genuine.similarities.any()
    assert not impostor.similarities.any()
    drawn = to_means(rows, people, cameras, 3, same_camera=True, max_pairs=50)[1]
    assert 30 <= len(drawn) <= 70 < len(impostor)


def test_the_same_seed_draws_the_same_pairs():
    rows, people, cameras = embeddings_of(40, 10)
    first, second, third = (genuine_and_impostor(rows, people, cameras, max_pairs=5000, seed=s)[1] for s in (1, 1, 2))
    assert (first.similarities == second.similarities).all()
    assert (first.similarities != third.similarities).any()


def test_embeddings_that_are_not_finite_are_counted_and_refused():
    rows, people, cameras = embeddings_of(4)
    rows[3, 0] = np.nan
    with pytest.raises(UserError, match="1 of 32 embeddings are not finite"):
        genuine_and_impostor(rows, people, cameras)
