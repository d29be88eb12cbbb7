"""A store in two dimensions, and its table for other tools."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up_people import embeddings_of
from made_up_store import made_up_store

from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.identity.embedding_map import map_store, write_map_table

ROWS, OWNERS, CAMERAS = embeddings_of(6, 10, noise=0.3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made_up_store(tmp_path_factory.mktemp("people"), ROWS, OWNERS.tolist(), CAMERAS.tolist())


@pytest.mark.parametrize("count", [60, 20])  # more images than dimensions, and fewer
def test_pca_is_that_of_a_singular_value_decomposition(tmp_path, count):
    made = map_store(made_up_store(tmp_path, ROWS[:count], [None] * count))
    centred = ROWS[:count] - ROWS[:count].mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(made.points), np.abs(left[:, :2] * values[:2]), atol=1e-4)
    assert made.explained == pytest.approx((values[:2] ** 2).sum() / (values**2).sum(), abs=1e-4)
    assert (made.points[np.abs(made.points).argmax(axis=0), [0, 1]] > 0).all()


@pytest.mark.slow  # numba compiles it
def test_umap_keeps_people_together_and_is_the_same_every_time(store):
    pytest.importorskip("umap", reason="umap-learn is not installed (the extra `umap`)")
    made, again = map_store(store, "umap"), map_store(store, "umap")
    assert (made.points == again.points).all()
    distances = np.linalg.norm(made.points[:, None] - made.points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert np.mean(OWNERS[distances.argmin(axis=1)] == OWNERS) > 0.9


def test_without_umap_it_says_what_to_install(store, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(CannotRun, match=r"pip install 'mgn-deploy\[umap\]'"):
        map_store(store, "umap")


def test_the_table_has_points_vectors_paths_and_groups(store, tmp_path):
    made = map_store(store)
    write_map_table(made, tmp_path / "map.parquet", OWNERS)
    table = pq.read_table(tmp_path / "map.parquet")
    assert table.column_names == ["id", "path", "x", "y", "vector", "identity", "camera", "group"]
    assert (np.array(table["vector"].to_pylist(), np.float32) == ROWS).all()
    assert (np.stack([table["x"], table["y"]], axis=1) == made.points).all()
    assert table["path"][3].as_py() == str(store.path(store.rows[3]))
    assert table["group"].to_pylist() == OWNERS.tolist()


def test_a_store_too_small_or_not_finite_is_refused(tmp_path):
    with pytest.raises(UserError, match="a map needs at least 3"):
        map_store(made_up_store(tmp_path / "two", ROWS[:2], [1, 1]))
    with pytest.raises(UserError, match="not finite"):
        map_store(made_up_store(tmp_path / "nan", ROWS[:4] * np.inf, [1] * 4))
    with pytest.raises(UserError, match="no projection 'tsne'"):
        map_store(made_up_store(tmp_path / "four", ROWS[:4], [1] * 4), "tsne")
