"""A store is read back as it was committed, by us and by other tools."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_stores import MANIFEST, bad, enter, ok, shard, write

from mgn_deploy.gallery.store import UNKNOWN, Store


def test_rows_and_embeddings_come_back_in_order(tmp_path):
    written = write(
        tmp_path / "s",
        [ok("b.jpg", identity=7, camera=2), ok("a.jpg")],
        [ok("c.jpg", size=None, mtime_ns=None)],
    )
    store = Store.open(tmp_path / "s")
    assert [row.name for row in store.rows] == ["b.jpg", "a.jpg", "c.jpg"]
    assert store.rows[0] == ok("b.jpg", identity=7, camera=2)
    assert np.array_equal(store.embeddings(), written)
    assert store.identities().tolist() == [7, UNKNOWN, UNKNOWN]
    assert store.cameras().tolist() == [2, UNKNOWN, UNKNOWN]


def test_failures_are_kept_apart(tmp_path):
    written = write(tmp_path / "s", [ok("a.jpg"), bad("b.jpg"), ok("c.jpg")])
    store = Store.open(tmp_path / "s")
    assert [row.name for row in store.rows] == ["a.jpg", "c.jpg"]
    assert store.failures == [bad("b.jpg")]
    assert np.array_equal(store.embeddings(), written[[0, 2]])


def test_later_row_of_a_name_counts(tmp_path):
    written = write(
        tmp_path / "s",
        [ok("a.jpg"), ok("b.jpg")],
        [ok("a.jpg", size=11)],
        [bad("b.jpg")],
        [bad("c.jpg")],
        [ok("c.jpg")],
    )
    store = Store.open(tmp_path / "s")
    assert [(row.name, row.size) for row in store.rows] == [("a.jpg", 11), ("c.jpg", 10)]
    assert np.array_equal(store.embeddings(), written[[2, 5]])
    assert [row.name for row in store.failures] == ["b.jpg"]


@pytest.mark.parametrize(
    "name",
    [
        "a b.jpg",
        "a\nb.jpg",
        "a'\"\\b.jpg",
        "é漢.jpg",
        "\udcff\udcfe.jpg",
        "\\xff.jpg",
        "sub/a\udce9.jpg",
        "n" * 251,
    ],
)
def test_name_comes_back_and_leads_to_the_file(tmp_path, name):
    write(tmp_path / "s", [ok(name)])
    store = Store.open(tmp_path / "s")
    assert store.rows[0].name == name
    assert os.fsencode(store.path(store.rows[0])) == b"/images/" + os.fsencode(name)


def test_two_names_that_print_alike_stay_two(tmp_path):
    write(tmp_path / "s", [ok("\udcff.jpg"), ok("\\xff.jpg")])
    assert [row.name for row in Store.open(tmp_path / "s").rows] == ["\udcff.jpg", "\\xff.jpg"]


@pytest.mark.parametrize(
    "name", ["plain", "key=value", "s3:bucket", "per%20cent", "with space", "_hidden", b"\xff\xfe"]
)
def test_store_can_have_any_folder_name(tmp_path, name):
    folder = tmp_path / os.fsdecode(name) / "shards"
    written = write(folder, [ok("a.jpg")])
    assert np.array_equal(Store.open(folder).embeddings(), written)
    enter(folder)


def test_float16_store_holds_float16(tmp_path):
    manifest = MANIFEST.model_copy(update={"dtype": "float16"})
    written = write(tmp_path / "s", [ok("a.jpg")], [ok("b.jpg")], manifest=manifest)
    embeddings = Store.open(tmp_path / "s").embeddings()
    assert embeddings.dtype == np.float16
    assert np.array_equal(embeddings, written.astype(np.float16))


def test_files_are_readable_by_other_tools(tmp_path):
    written = write(tmp_path / "s", [ok("a\udcff.jpg"), bad("b.jpg")])
    assert np.array_equal(np.load(shard(tmp_path / "s", "npy")), written, equal_nan=True)
    rows = pq.read_table(shard(tmp_path / "s", "parquet")).to_pylist()
    assert [(row["path"], row["path_bytes"], row["status"], row["error"]) for row in rows] == [
        ("a\\xff.jpg", b"a\xff.jpg", "ok", None),
        ("b.jpg", None, "failed", "the file is empty"),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_reading_starts_no_thread(tmp_path):
    """Arrow's threads outlive a read; one of 25 commands that read a store was aborted by them as it ended."""
    write(tmp_path / "s", [ok("a.jpg")])
    script = (
        "import os, sys; from mgn_deploy.gallery.store import Store\n"
        "before = os.listdir('/proc/self/task'); Store.open(sys.argv[1])\n"
        "print(set(os.listdir('/proc/self/task')) - set(before))"
    )
    assert subprocess.check_output([sys.executable, "-c", script, tmp_path / "s"], text=True) == "set()\n"


def test_empty_store_is_a_store(tmp_path):
    enter(tmp_path / "s")
    store = Store.open(tmp_path / "s")
    assert len(store) == 0
    assert store.embeddings().shape == (0, 4)
