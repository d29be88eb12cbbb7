"""Manifests and shards of somebody else's making are refused in a sentence, and none leads out of the source."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_stores import MANIFEST, enter, ok, refusal, shard, write

from mgn_deploy.files import sha256_file
from mgn_deploy.gallery.store import Store


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg"])
def test_row_that_leads_out_of_the_source_is_not_opened(tmp_path, name):
    write(tmp_path / "s", [ok(name)])
    store = Store.open(tmp_path / "s")
    assert "leads out of the store's source folder" in refusal(store.path, store.rows[0])


def test_row_of_another_machine_is_not_opened(tmp_path):
    write(tmp_path / "s", [ok("a.jpg")], manifest=MANIFEST.model_copy(update={"source": "s3://bucket/people"}))
    store = Store.open(tmp_path / "s")
    assert "lies in s3://bucket/people, not on this machine" in refusal(store.path, store.rows[0])


def crafted(folder, **columns) -> None:
    """Replace the rows of a store of one row, with a hash that is right."""
    table = pq.read_table(shard(folder, "parquet")).to_pydict() | columns
    pq.write_table(pa.table(table), shard(folder, "parquet"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["rows_sha256"] = sha256_file(shard(folder, "parquet"))
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "columns",
    [
        {"path": pa.array([None], pa.string())},
        {"path": pa.array([["a.jpg"]])},
        {"size": pa.array(["many"])},
        {"identity": pa.array([2**40])},
        {"box": pa.array([[1.0, 2.0]])},
    ],
)
def test_crafted_rows_are_a_sentence(tmp_path, columns):
    write(tmp_path / "s", [ok("a.jpg")])
    crafted(tmp_path / "s", **columns)
    assert "is damaged (" in refusal(Store.open, tmp_path / "s")


@pytest.mark.parametrize(
    ("key", "value"), [("source", "file://[::1"), ("source", "file:///a%00b"), ("bundle_path", "a\0b")]
)
def test_manifest_with_a_place_that_is_none_is_refused(tmp_path, key, value):
    write(tmp_path / "s", [ok("a.jpg")])
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    (tmp_path / "s/manifest.json").write_text(json.dumps({**manifest, key: value}))
    assert f"manifest.json is not an embedding store's: {key}: " in refusal(Store.open, tmp_path / "s")


@pytest.mark.parametrize("name", ["../shard-00000-12345678", "shard-0", "shard-00000-12345678/../x", ""])
def test_manifest_that_names_other_files_is_refused(tmp_path, name):
    write(tmp_path / "s", [ok("a.jpg")])
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (tmp_path / "s/manifest.json").write_text(json.dumps(manifest))
    assert "shards.0.name: String should match pattern" in refusal(Store.open, tmp_path / "s")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4), np.float32),
        np.zeros((2, 5), np.float32),
        np.zeros((2, 4), np.float64),
        np.zeros((2, 4), np.float32, order="F"),
    ],
)
def test_npy_that_does_not_fit_its_rows_is_named(tmp_path, array):
    write(tmp_path / "s", [ok("a.jpg"), ok("b.jpg")])
    np.save(shard(tmp_path / "s", "npy"), array)
    assert "it is not float32 [2, 4], one row for each of its Parquet's" in refusal(Store.open, tmp_path / "s")


def test_pickle_in_an_npy_is_never_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    write(tmp_path / "s", [ok("a.jpg")])
    np.save(shard(tmp_path / "s", "npy"), np.array([Evil()], object), allow_pickle=True)
    assert "damaged" in refusal(Store.open, tmp_path / "s")
    assert not (tmp_path / "owned").exists()


def test_parquet_of_something_else_is_named(tmp_path):
    write(tmp_path / "s", [ok("a.jpg")])
    crafted(tmp_path / "s")
    pq.write_table(pa.table({"fish": [1]}), shard(tmp_path / "s", "parquet"))
    assert "its SHA-256 is not the manifest's" in refusal(Store.open, tmp_path / "s")
    crafted(tmp_path / "s")
    assert "is damaged ('Column path does not exist" in refusal(Store.open, tmp_path / "s")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"7",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": 1}',
        b'{"schema_version": 1}',
    ],
)
def test_broken_manifest_is_named(tmp_path, content):
    write(tmp_path / "s", [ok("a.jpg")])
    (tmp_path / "s/manifest.json").write_bytes(content)
    for action in (Store.open, enter):
        assert "manifest.json is not" in refusal(action, tmp_path / "s")


def test_later_schema_asks_for_an_upgrade(tmp_path):
    write(tmp_path / "s", [ok("a.jpg")])
    content = json.loads((tmp_path / "s/manifest.json").read_text())
    (tmp_path / "s/manifest.json").write_text(json.dumps({**content, "schema_version": 3, "new_field": True}))
    for action in (Store.open, enter):
        assert "store schema 3 and this mgn-deploy reads 2: upgrade mgn-deploy" in refusal(action, tmp_path / "s")
