"""The store's files: what is committed is read back whole, and what is damaged, foreign or in use is said so."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import permissions_apply

from mgn_deploy import locks
from mgn_deploy.errors import UserError
from mgn_deploy.files import sha256_file
from mgn_deploy.gallery import writer as writer_module
from mgn_deploy.gallery.manifest import StoreManifest, read_manifest
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.store import UNKNOWN, Store
from mgn_deploy.gallery.writer import StoreWriter

MANIFEST = StoreManifest(
    bundle_id="ab" * 32,
    backend="onnxruntime",
    preprocessing="pillow-bicubic-1",
    dim=4,
    dtype="float32",
    source="file:///images",
)


def ok(name: str, **changes: object) -> Row:
    return Row(
        **{
            "name": name,
            "size": 10,
            "mtime_ns": 20,
            "error": None,
            "identity": None,
            "camera": None,
            **changes,
        }
    )


def bad(name: str, error: str = "the file is empty") -> Row:
    return ok(name, error=error)


def write(folder, *shards: list[Row], manifest: StoreManifest = MANIFEST) -> np.ndarray:
    """Commit each list of rows with random embeddings, in shards of `SHARD`; all embeddings in order."""
    parts = [np.empty((0, 4), np.float32)]
    with StoreWriter(folder, manifest) as writer:
        for number, rows in enumerate(shards):
            parts.append(np.random.default_rng(number).standard_normal((len(rows), 4), np.float32))
            parts[-1][[row.error is not None for row in rows]] = np.nan
            writer.add(rows, parts[-1])
    return np.concatenate(parts)


def shard(folder, kind: str, number: int = 0):
    """A shard's file: npy or parquet."""
    [path] = folder.glob(f"shard-{number:05d}-*.{kind}")
    return path


def refusal(action, *arguments, **options) -> str:
    with pytest.raises(UserError) as refused:
        action(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def enter(folder, manifest: StoreManifest = MANIFEST) -> None:
    with StoreWriter(folder, manifest):
        pass


def names_in(folder) -> list[str]:
    return sorted(os.listdir(folder))


# What is committed is read back


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


# In a notebook


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


# A killed run


def test_strays_of_a_killed_run_go_and_count_for_nothing(tmp_path):
    written = write(tmp_path / "s", [ok("a.jpg")])
    before = names_in(tmp_path / "s")
    (tmp_path / "s/shard-00001-12345678.npy").write_bytes(b"half")
    (tmp_path / "s/.mgn-abc.tmp").write_bytes(b"half")
    assert np.array_equal(Store.open(tmp_path / "s").embeddings(), written)
    enter(tmp_path / "s")
    assert names_in(tmp_path / "s") == before


def test_folder_of_a_run_killed_before_its_manifest_is_taken_over(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/.lock").touch()
    (tmp_path / "s/.mgn-abc.tmp").write_bytes(b'{"schema_')
    written = write(tmp_path / "s", [ok("a.jpg")])
    assert np.array_equal(Store.open(tmp_path / "s").embeddings(), written)


def test_interrupt_right_after_the_commit_loses_nothing(tmp_path, monkeypatch):
    """Ctrl-C between the rename of the manifest and the end of `add` must not take the shard's files away."""
    import mgn_deploy.files as files

    def interrupted(path):
        sync(path)
        if read_manifest(tmp_path / "s").shards:
            raise KeyboardInterrupt

    enter(tmp_path / "s")
    sync = files.sync_folder
    monkeypatch.setattr(files, "sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", [ok("a.jpg")])
    monkeypatch.undo()
    assert [row.name for row in Store.open(tmp_path / "s").rows] == ["a.jpg"]


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


# Damage


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


# Things in a store's place


def test_missing_store_says_how_to_make_one(tmp_path):
    assert "is not an embedding store (no manifest.json): `mgn-deploy embed DIR -o" in refusal(
        Store.open, tmp_path / "s"
    )


def test_file_in_a_stores_place(tmp_path):
    (tmp_path / "s").write_text("letter")
    assert "is not an embedding store" in refusal(Store.open, tmp_path / "s")
    assert "exists and is not an embedding store: choose another path" in refusal(enter, tmp_path / "s")
    assert "Not a directory" in refusal(enter, tmp_path / "s/below")
    assert (tmp_path / "s").read_text() == "letter"


def test_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").touch()
    assert "exists and is not an embedding store" in refusal(enter, tmp_path)
    assert names_in(tmp_path) == ["letter.txt"]


def test_folder_with_another_programs_manifest_is_left_alone(tmp_path):
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "model": {}}')
    (tmp_path / "shard-7.npy").touch()
    assert "is not an embedding store's" in refusal(enter, tmp_path)
    assert names_in(tmp_path) == ["manifest.json", "shard-7.npy"]


@pytest.mark.parametrize("length", [300, 5000])
def test_too_long_store_path(tmp_path, length):
    assert "File name too long" in refusal(enter, tmp_path / ("n" * length))
    assert "File name too long" in refusal(Store.open, tmp_path / ("n" * length))


def test_store_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", [ok("a.jpg")])
    assert len(Store.open(tmp_path / "real")) == 1


@pytest.mark.parametrize("mode", [0, 0o500])
def test_place_that_may_not_be_written(tmp_path, mode):
    (tmp_path / "place").mkdir(mode=mode)
    try:
        with permissions_apply():
            for folder in (tmp_path / "place", tmp_path / "place/s"):
                assert "cannot be written: Permission denied" in refusal(enter, folder)
    finally:
        (tmp_path / "place").chmod(0o700)
    assert names_in(tmp_path / "place") == []


@pytest.mark.parametrize("closed", ["manifest.json", "shard-*.parquet", "shard-*.npy", "."])
def test_store_that_may_not_be_read_is_not_called_damaged(tmp_path, closed):
    write(tmp_path / "s", [ok("a.jpg")])
    path = next((tmp_path / "s").glob(closed)) if closed != "." else tmp_path / "s"
    path.chmod(0)
    try:
        with permissions_apply():
            sentence = refusal(Store.open, tmp_path / "s")
    finally:
        path.chmod(0o700)
    assert "cannot be read: Permission denied" in sentence
    assert "delete" not in sentence


# One writer of one kind


@pytest.mark.parametrize(
    "change",
    [
        {"bundle_id": "cd" * 32},
        {"backend": "openvino"},
        {"dtype": "float16"},
        {"source": "file:///other"},
        {"preprocessing": "new"},
        {"dim": 5},
    ],
)
def test_store_made_otherwise_is_refused(tmp_path, change):
    write(tmp_path / "s", [ok("a.jpg")])
    before = (tmp_path / "s/manifest.json").read_bytes()
    sentence = refusal(enter, tmp_path / "s", MANIFEST.model_copy(update=change))
    assert f"was made with {next(iter(change))} " in sentence
    assert "choose a new store" in sentence
    assert (tmp_path / "s/manifest.json").read_bytes() == before
    enter(tmp_path / "s")  # the lock is free again


def test_second_process_is_refused_while_the_first_writes(tmp_path):
    script = (
        "import sys; from mgn_deploy.gallery.manifest import StoreManifest\n"
        "from mgn_deploy.gallery.writer import StoreWriter\n"
        "with StoreWriter(sys.argv[1], StoreManifest.model_validate_json(sys.argv[2])):\n"
        "    print('in', flush=True)\n"
        "    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "s", MANIFEST.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as first:
        assert first.stdout.readline() == b"in\n"
        assert "another process is writing to" in refusal(enter, tmp_path / "s")
        assert len(Store.open(tmp_path / "s")) == 0  # reading is allowed
        first.kill()
    enter(tmp_path / "s")  # a killed process leaves no lock


def test_manifest_is_judged_under_the_lock(tmp_path, monkeypatch):
    """A run that finds no manifest and then waits for the scheduler must not replace the one that another run wrote."""
    real = locks.fcntl.flock

    def other_run_was_faster(descriptor, operation):
        monkeypatch.undo()
        write(tmp_path / "s", [ok("a.jpg")], manifest=MANIFEST.model_copy(update={"backend": "openvino"}))
        real(descriptor, operation)

    monkeypatch.setattr(locks.fcntl, "flock", other_run_was_faster)
    assert "was made with backend 'openvino'" in refusal(enter, tmp_path / "s")
    assert Store.open(tmp_path / "s").manifest.backend == "openvino"
