"""What is committed counts, whatever kills a writer; one process writes, and of one kind of embedding."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from small_stores import MANIFEST, enter, names_in, ok, refusal, write

from mgn_deploy import locks
from mgn_deploy.gallery.manifest import read_manifest
from mgn_deploy.gallery.store import Store

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
