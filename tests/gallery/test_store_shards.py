"""Shards are filled and read one by one, and those that are cut, flipped, swapped or missing are named."""

from __future__ import annotations

import json
import os
import resource

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_stores import MANIFEST, bad, enter, names_in, ok, refusal, shard, write

from mgn_deploy.errors import UserError
from mgn_deploy.gallery import writer as writer_module
from mgn_deploy.gallery.manifest import read_manifest
from mgn_deploy.gallery.store import Store
from mgn_deploy.gallery.writer import StoreWriter


def test_rows_fill_shards_whatever_the_number_of_calls(tmp_path, small_shards):
    rows = [ok(f"{number}.jpg") for number in range(10)]
    embeddings = np.random.default_rng(0).standard_normal((10, 4), np.float32)
    for name, counts in (("one", [10]), ("many", [1, 2, 4, 2, 1])):
        at = 0
        for count in counts:
            with StoreWriter(tmp_path / name, MANIFEST) as writer:
                writer.add(rows[at : at + count], embeddings[at : at + count])
            at += count
    assert names_in(tmp_path / "one") == names_in(tmp_path / "many")
    for name in names_in(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    assert [shard.count for shard in read_manifest(tmp_path / "one").shards] == [4, 4, 2]


@pytest.fixture
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 4)


def seen_by_verification(folder) -> bool:
    try:
        Store.open(folder, verify=True)
    except UserError as error:
        return "is damaged" in str(error) and f"`mgn-deploy store repair {folder}`" in str(error)
    return False


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.99])
def test_truncated_shard_is_named_at_once(tmp_path, kind, share):
    write(tmp_path / "s", [ok("a.jpg"), ok("b.jpg"), ok("c.jpg")])
    path = shard(tmp_path / "s", kind)
    os.truncate(path, int(path.stat().st_size * share))
    for action in (Store.open, enter):
        assert f"{path} is damaged" in refusal(action, tmp_path / "s")


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_every_flipped_bit_is_seen(tmp_path, kind):
    write(tmp_path / "s", [ok(f"{number}.jpg") for number in range(20)])
    path = shard(tmp_path / "s", kind)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        assert seen_by_verification(tmp_path / "s"), at


def test_flipped_bit_of_an_embedding_is_seen_when_its_shard_is_first_read(tmp_path, small_shards):
    write(tmp_path / "s", [ok(f"{number}.jpg") for number in range(8)])
    path = shard(tmp_path / "s", "npy")
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    store = Store.open(tmp_path / "s")
    assert store["7.jpg"].shape == (4,)  # of the other shard
    for read in (store.embeddings, lambda: store["0.jpg"], lambda: list(store.blocks())):
        assert "its SHA-256 is not the manifest's" in refusal(read)


def test_swapped_shards_are_seen(tmp_path, small_shards):
    write(tmp_path / "s", [ok(f"{number}.jpg") for number in range(8)])
    one, other = (shard(tmp_path / "s", "npy", number) for number in (0, 1))
    one.rename(tmp_path / "kept")
    other.rename(one)
    (tmp_path / "kept").rename(other)
    assert seen_by_verification(tmp_path / "s")


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_missing_file_is_named_at_once(tmp_path, small_shards, kind):
    write(tmp_path / "s", [ok(f"{number}.jpg") for number in range(8)])
    path = shard(tmp_path / "s", kind, 1)
    path.unlink()
    assert f"{path} is damaged (it is missing)" in refusal(Store.open, tmp_path / "s")


def test_store_of_more_shards_than_open_files_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 1)
    with StoreWriter(tmp_path / "s", MANIFEST) as writer:
        writer.add([ok(f"{number}.jpg") for number in range(80)], np.ones((80, 4), np.float32))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, hard))
    try:
        assert Store.open(tmp_path / "s", verify=True).embeddings().shape == (80, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_reader_goes_on_while_a_writer_replaces_the_last_shard(tmp_path, small_shards):
    written = write(tmp_path / "s", [ok(f"{number}.jpg") for number in range(6)])
    store = Store.open(tmp_path / "s")
    write(tmp_path / "s", [ok("6.jpg")])
    assert np.array_equal(store.embeddings(), written)


def test_blocks_are_the_embeddings_a_shard_at_a_time(tmp_path, small_shards):
    write(tmp_path / "s", [ok(f"{number}.jpg") for number in range(6)], [ok("1.jpg", size=11), bad("0.jpg")])
    store = Store.open(tmp_path / "s")
    blocks = list(store.blocks())
    assert [rows for rows, _ in blocks] == [slice(0, 2), slice(2, 5)]
    assert np.array_equal(np.concatenate([block for _, block in blocks]), store.embeddings())


def test_store_of_schema_1_is_read_and_gets_checksums_when_it_is_written(tmp_path, said):
    written = write(tmp_path / "s", [ok("a.jpg"), ok("b.jpg")])
    for kind in ("npy", "parquet"):
        shard(tmp_path / "s", kind).rename(tmp_path / f"s/shard-00000.{kind}")
    table = pq.read_table(tmp_path / "s/shard-00000.parquet")
    table = table.drop_columns(["sha256", "frame", "time_s", "track", "box"])
    pq.write_table(table, tmp_path / "s/shard-00000.parquet")
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    del manifest["shards"]
    (tmp_path / "s/manifest.json").write_text(json.dumps({**manifest, "schema_version": 1}))

    store = Store.open(tmp_path / "s", verify=True)
    assert np.array_equal(store.embeddings(), written)
    assert store.rows == [ok("a.jpg"), ok("b.jpg")]
    more = write(tmp_path / "s", [ok("c.jpg")])
    assert "has no checksums (schema 1)" in " ".join(said)
    assert read_manifest(tmp_path / "s").shards[0].array_sha256
    assert np.array_equal(Store.open(tmp_path / "s").embeddings(), np.concatenate([written, more]))
