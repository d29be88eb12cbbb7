"""Query expansion and database-side augmentation against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.expansion import augment_gallery, expand_queries


def unit_rows(n: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)) + 0.3
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_a_query_is_the_mean_of_itself_and_its_neighbours_weighted_by_similarity(alpha):
    query, gallery = unit_rows(7, 6, 0), unit_rows(30, 6, 1)
    expanded = expand_queries(query, gallery, 4, alpha=alpha)
    for row, asked in zip(expanded, query.astype(np.float64), strict=True):
        similarity = gallery.astype(np.float64) @ asked
        total = asked.copy()
        for index in sorted(range(30), key=lambda i: -similarity[i])[:4]:
            total += max(similarity[index], 0) ** alpha * gallery[index]
        assert row == pytest.approx(total / np.linalg.norm(total), abs=1e-6)


def test_neighbours_that_are_excluded_do_not_expand():
    query, gallery = unit_rows(1, 6, 0), unit_rows(30, 6, 1)
    nearest = int(np.argmax(gallery @ query[0]))
    without = np.delete(gallery, nearest, axis=0)
    found = expand_queries(query, gallery, 3, excluded=lambda rows: (np.array([0]), np.array([nearest])))
    assert found == pytest.approx(expand_queries(query, without, 3), abs=1e-6)


def test_opposite_neighbours_weigh_nothing():
    query = np.array([[1, 0]], np.float32)
    assert expand_queries(query, -query, 1) == pytest.approx(query)


def by_fast_reid(images: np.ndarray, k: int, alpha: float) -> np.ndarray:
    """github.com/JDAI-CV/fast-reid, fastreid/evaluation/query_expansion.py: all images, one after the other."""
    rows = []
    for image in images.astype(np.float64):
        similarity = images.astype(np.float64) @ image
        nearest = np.argsort(-similarity, kind="stable")[:k]
        mean = sum(similarity[i] ** alpha * images[i] for i in nearest) / k
        rows.append(mean / np.linalg.norm(mean))
    return np.array(rows)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_queries_and_gallery_together_are_expanded_as_fast_reid_does(k):
    images = np.abs(unit_rows(40, 8, 2))  # similarities of at least 0
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    assert augment_gallery(images, k) == pytest.approx(by_fast_reid(images, k, 3.0), abs=1e-5)


def test_rows_are_of_unit_length_and_float16_is_read():
    gallery = unit_rows(30, 6, 1).astype(np.float16)
    augmented = augment_gallery(gallery, 5)
    assert augmented.dtype == np.float32
    assert np.linalg.norm(augmented, axis=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("k", "alpha", "sentence"), [(0, 3.0, "at least 1 neighbour"), (2, -1.0, "alpha is -1")])
def test_what_is_out_of_range_is_refused(k, alpha, sentence):
    rows = unit_rows(3, 4, 0)
    with pytest.raises(UserError, match=sentence):
        expand_queries(rows, rows, k, alpha=alpha)
    with pytest.raises(UserError, match=sentence):
        augment_gallery(rows, k, alpha=alpha)
