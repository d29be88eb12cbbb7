"""CUHK03's single-shot protocol against a plain loop over the same draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.ranking import evaluate
from mgn_deploy.retrieval.single_shot import single_shot
from mgn_deploy.retrieval.truth import Truth


def by_plain_loop(distances, query_ids, query_cams, gallery_ids, gallery_cams, repeats, seed) -> list[list[int]]:
    """Each draw's ranks, a query after the other."""
    people = sorted({person for person in gallery_ids if person != -1})
    draws = np.random.default_rng(seed).random((repeats, len(people)))
    ranks = []
    for draw in draws:
        of_draw = []
        for q, row in enumerate(distances):
            gallery = []
            for u, person in zip(draw, people, strict=True):
                images = [g for g, one in enumerate(gallery_ids) if one == person]
                if person == query_ids[q]:
                    images = [g for g in images if gallery_cams[g] != query_cams[q]]
                if images:
                    gallery.append(images[int(u * len(images))])
            order = sorted(gallery, key=lambda g: (row[g], g))
            right = [rank for rank, g in enumerate(order, 1) if gallery_ids[g] == query_ids[q]]
            of_draw += right
        ranks.append(of_draw)
    return ranks


@settings(max_examples=80, deadline=None)
@given(
    queries=st.integers(1, 12),
    images=st.integers(1, 30),
    identities=st.integers(1, 6),
    levels=st.sampled_from([2, 10**6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_matrix_scores_as_a_plain_loop_scores_it(queries, images, identities, levels, seed):
    rng = np.random.default_rng(seed)
    distances = (rng.integers(0, levels, (queries, images)) / levels).astype(np.float32)
    labels = (
        rng.integers(1, identities + 1, queries),
        rng.integers(0, 2, queries),
        rng.integers(-1, identities + 1, images),
        rng.integers(0, 2, images),
    )
    truth = Truth(*labels, junk={-1})
    tiles = [(slice(s, min(s + 5, queries)), distances[s : s + 5]) for s in range(0, queries, 5)]
    ranks = by_plain_loop(distances.tolist(), *(values.tolist() for values in labels), 9, seed)
    if not ranks[0]:
        with pytest.raises(UserError, match="no query has a right answer"):
            single_shot(tiles, truth, repeats=9, seed=seed)
        return
    found = single_shot(tiles, truth, repeats=9, seed=seed)
    for k in (1, 5, 10, 20):
        share = [np.mean([rank <= k for rank in draw]) for draw in ranks]
        assert found.rank[k] == pytest.approx(np.mean(share))
        assert found.deviation[k] == pytest.approx(np.std(share), abs=1e-12)


def test_a_gallery_of_one_image_a_person_is_ranked_as_ever():
    rng = np.random.default_rng(0)
    distances = rng.random((40, 40)).astype(np.float32)
    people, cameras = np.arange(40), np.ones(40, int)
    truth = Truth(people, cameras, people, cameras + 1)
    found = single_shot([(slice(0, 40), distances)], truth, ranks=(1, 5, 10))
    assert found.rank == pytest.approx(evaluate(distances, people, cameras, people, cameras + 1).rank)
    assert list(found.deviation.values()) == pytest.approx([0, 0, 0], abs=1e-12)
    assert (found.repeats, found.people) == (100, 40)
