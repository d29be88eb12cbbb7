"""Groups of images: who they are, how they agree with labels, and the file that holds them."""

from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up_people import embeddings_of
from made_up_store import made_up_store

from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.identity import clusters as module
from mgn_deploy.identity.clusters import (
    NOBODY,
    agreement,
    appearances,
    cluster_store,
    read_clusters,
    write_clusters,
)

pytest.importorskip("sklearn", reason="scikit-learn is not installed (the extra `identity`)")
ROWS, OWNERS, CAMERAS = embeddings_of(12, 8, noise=0.3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made_up_store(tmp_path_factory.mktemp("people"), ROWS, OWNERS.tolist(), (CAMERAS + 1).tolist())


@pytest.mark.parametrize("distance, eps", [("jaccard", None), ("cosine", 0.25)])
def test_well_separated_people_are_one_group_each(store, distance, eps):
    made = cluster_store(store, distance=distance, eps=eps)
    assert len(made) == 12
    for group in range(12):
        assert len({OWNERS[row] for row in made.members(group)}) == 1
        assert len(made.members(group)) == 8
    assert made.agreement.ari == made.agreement.f1 == pytest.approx(1)
    assert appearances(made, 0) == "camera 1: 4, camera 2: 4"


def test_groups_come_by_size_and_an_image_like_no_other_is_in_none(tmp_path):
    axes = np.eye(8, dtype=np.float32)
    rows = axes[[0, 1, 1, 1, 2, 2]]
    made = cluster_store(made_up_store(tmp_path, rows, [None] * 6), distance="cosine")
    assert made.labels.tolist() == [NOBODY, 0, 0, 0, 1, 1]
    assert made.to_dict() == {
        "images": 6, "clusters": 2, "in_none": 1, "largest": 3, "distance": "cosine", "eps": 0.08, "min_images": 2,
        "agreement": None,
    }  # fmt: skip


def test_images_farther_than_eps_are_apart(tmp_path):
    angles = np.array([0, 0.3, 0.6])  # neighbours are 1 - cos 0.3 = 0.0447 apart
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    store = made_up_store(tmp_path, rows, [None] * 3)
    assert cluster_store(store, distance="cosine", eps=0.045).labels.tolist() == [0, 0, 0]
    assert cluster_store(store, distance="cosine", eps=0.044).labels.tolist() == [NOBODY] * 3
    assert cluster_store(store, distance="cosine", eps=0.045, min_images=4).labels.tolist() == [NOBODY] * 3


def test_the_graph_is_that_of_all_distances(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 7)
    offsets, columns, values = module._near(ROWS, "cosine", 0.5, None)
    dense = np.maximum(1 - ROWS @ ROWS.T, 0)
    np.fill_diagonal(dense, 0)
    assert offsets.tolist() == [0, *np.cumsum((dense <= 0.5).sum(axis=1)).tolist()]
    assert columns.tolist() == np.nonzero(dense <= 0.5)[1].tolist()
    np.testing.assert_allclose(values, dense[dense <= 0.5], atol=1e-6)


def test_agreement_of_pairs_is_that_of_plain_loops():
    generator = np.random.default_rng(0)
    people, labels = generator.integers(0, 4, 40), generator.integers(-1, 3, 40)
    both = together = same = 0
    for i, j in combinations(range(40), 2):
        one_group = labels[i] == labels[j] != NOBODY
        both += one_group and people[i] == people[j]
        together += one_group
        same += people[i] == people[j]
    result = agreement(people, labels)
    assert result.precision == pytest.approx(both / together)
    assert result.recall == pytest.approx(both / same)
    assert result.f1 == pytest.approx(2 * both / (together + same))
    assert (result.images, result.people) == (40, 4)


def test_images_of_nobody_do_not_count_in_the_agreement():
    assert agreement(np.array([1, 1, -1, -2, 2, 2]), np.array([0, 0, 0, 0, 1, 1])).ari == 1
    assert agreement(np.array([-2, -1, 3]), np.array([0, 0, 0])) is None


def test_the_file_has_a_row_an_image_and_is_read_back(store, tmp_path):
    made = cluster_store(store)
    write_clusters(made, tmp_path / "groups.parquet")
    table = pq.read_table(tmp_path / "groups.parquet").to_pydict()
    assert list(table) == ["path", "cluster", "identity", "camera"]
    assert table["path"][:2] == ["0.jpg", "1.jpg"]
    assert table["cluster"] == made.labels.tolist() == read_clusters(tmp_path / "groups.parquet", store).tolist()


def test_a_file_of_something_else_or_of_another_store_is_one_sentence(store, tmp_path):
    path = tmp_path / "groups.parquet"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_clusters(path, store)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match="is not what `mgn-deploy cluster -o` writes"):
        read_clusters(path, store)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError, match="is not what `mgn-deploy cluster -o` writes"):
        read_clusters(path, store)
    pq.write_table(pa.table({"path": ["0.jpg"], "cluster": [0]}), path)
    with pytest.raises(UserError, match=r"has no cluster for '1.jpg' of"):
        read_clusters(path, store)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"eps": 0}, "eps is a distance between 0 and 1"),
        ({"eps": float("nan")}, "eps is a distance between 0 and 1"),
        ({"min_images": 1}, "at least 2 images"),
        ({"distance": "l1"}, "no distance 'l1'"),
    ],
)
def test_options_out_of_range_are_refused(store, options, sentence):
    with pytest.raises(UserError, match=sentence):
        cluster_store(store, **options)


def test_a_store_of_one_image_or_of_nan_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds 1 embedded images: clusters need at least 2"):
        cluster_store(made_up_store(tmp_path / "one", ROWS[:1], [1]))
    with pytest.raises(UserError, match="not finite"):
        cluster_store(made_up_store(tmp_path / "nan", ROWS[:3] * np.nan, [1, 1, 1]))


def test_without_scikit_learn_it_says_what_to_install(store, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(CannotRun, match=r"pip install 'mgn-deploy\[identity\]'"):
        cluster_store(store)
