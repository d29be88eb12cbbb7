"""Other things where a store should be: nothing, files, links, folders that may not be read or written."""

from __future__ import annotations

import pytest
from hostile import permissions_apply
from small_stores import enter, names_in, ok, refusal, write

from mgn_deploy.gallery.store import Store


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
