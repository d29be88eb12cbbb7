"""A store in a notebook: iterating, names as keys, its repr and its data frame."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from small_stores import bad, enter, ok, refusal, write

from mgn_deploy.gallery.store import Store


def test_iterating_gives_the_rows_of_embedded_images(tmp_path):
    write(tmp_path / "s", [ok("a.jpg"), bad("b.jpg")], [ok("c.jpg")])
    store = Store.open(tmp_path / "s")
    assert list(store) == [ok("a.jpg"), ok("c.jpg")]


def test_a_name_gives_its_embedding_and_its_row(tmp_path):
    written = write(tmp_path / "s", [ok("a.jpg"), bad("b.jpg")], [ok("c.jpg", camera=3), ok("a.jpg", size=11)])
    store = Store.open(tmp_path / "s")
    assert np.array_equal(store["c.jpg"], written[2])
    assert np.array_equal(store["a.jpg"], written[3])
    assert (store.row("c.jpg").camera, store.row("a.jpg").size) == (3, 11)


def test_an_embedding_is_the_callers_own(tmp_path):
    written = write(tmp_path / "s", [ok("a.jpg")])
    store = Store.open(tmp_path / "s")
    store["a.jpg"][:] = 0
    assert np.array_equal(store["a.jpg"], written[0])


def test_in_tells_what_was_embedded(tmp_path):
    write(tmp_path / "s", [ok("a.jpg"), bad("b.jpg")])
    store = Store.open(tmp_path / "s")
    assert [name in store for name in ("a.jpg", "b.jpg", "none.jpg", 0)] == [True, False, False, False]


@pytest.mark.parametrize("name", ["b.jpg", "none.jpg"])
def test_a_name_without_an_embedding_is_a_key_error_that_says_so(tmp_path, name):
    write(tmp_path / "s", [ok("a.jpg"), bad("b.jpg")])
    store = Store.open(tmp_path / "s")
    for look_up in (store.__getitem__, store.row):
        with pytest.raises(KeyError, match=f"holds no embedding of '{name}'"):
            look_up(name)


@pytest.mark.parametrize("position", [0, slice(0, 1)])
def test_a_number_is_told_where_to_go(tmp_path, position):
    write(tmp_path / "s", [ok("a.jpg")])
    with pytest.raises(TypeError, match=r"by number: \.rows, \.embeddings\(\)"):
        Store.open(tmp_path / "s")[position]


def test_repr_says_what_is_in_the_store(tmp_path):
    write(tmp_path / "s", [ok(f"{number}.jpg") for number in range(1200)], [bad("b.jpg")])
    assert repr(Store.open(tmp_path / "s")) == (
        f"Store('{tmp_path}/s', 1,200 images and 1 failures, float32 [1200, 4], by onnxruntime of bundle abababababab)"
    )


def test_a_frame_has_a_line_for_each_image_and_each_failure(tmp_path):
    mtime = 1_700_000_000_123_456_789
    write(
        tmp_path / "s",
        [ok("a.jpg", identity=7, camera=2, size=99, mtime_ns=mtime), bad("b.jpg")],
        [ok("c\udcff.jpg", size=None, mtime_ns=None)],
    )
    store = Store.open(tmp_path / "s")
    frame = store.to_pandas()
    assert list(frame.columns) == [
        *("path", "status", "error", "identity", "camera", "size", "mtime", "frame", "time_s", "track"),
    ]
    assert frame.path.tolist() == ["a.jpg", "c\udcff.jpg", "b.jpg"]
    assert frame.path[: len(store)].tolist() == [row.name for row in store]
    assert frame.status.tolist() == ["ok", "ok", "failed"]
    assert frame.error.tolist() == [None, None, "the file is empty"]
    assert (frame.identity[0], frame.camera[0], frame["size"][0], frame.mtime[0].value) == (7, 2, 99, mtime)
    assert frame.loc[1, ["identity", "camera", "size", "mtime"]].isna().all()
    assert str(frame.mtime.dtype) == "datetime64[ns, UTC]"


def test_a_frame_of_an_empty_store_has_the_same_columns_and_dtypes(tmp_path):
    enter(tmp_path / "s")
    write(tmp_path / "t", [ok("a.jpg", identity=1, camera=1)])
    assert Store.open(tmp_path / "s").to_pandas().dtypes.equals(Store.open(tmp_path / "t").to_pandas().dtypes)


def test_without_pandas_a_frame_is_a_sentence(tmp_path, monkeypatch):
    enter(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert "pip install 'mgn-deploy[pandas]'" in refusal(Store.open(tmp_path / "s").to_pandas)
