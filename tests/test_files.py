"""Folders that are replaced whole or not at all, and where the cache is."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mgn_deploy import files
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file, atomic_folder, cache_folder


def replace_folder(path, content: str) -> None:
    with atomic_folder(path, names=["marker"]) as new:
        (new / "marker").write_text(content)


def test_replacing_through_a_link_keeps_the_link(tmp_path):
    replace_folder(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    replace_folder(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/marker").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_replaced_folder_is_there_at_every_moment(tmp_path):
    replace_folder(tmp_path / "out", "old")
    script = (
        "import sys; from pathlib import Path; from mgn_deploy.files import atomic_folder\n"
        "for number in range(100):\n"
        "    with atomic_folder(Path(sys.argv[1]), ['marker']) as new: (new / 'marker').write_text(str(number))"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"]) as process:
        missing = 0
        while process.poll() is None:
            missing += not (tmp_path / "out/marker").exists()
    assert process.returncode == 0
    assert (tmp_path / "out/marker").read_text() == "99"
    assert missing == 0
    assert os.listdir(tmp_path) == ["out"]


def test_leftover_of_a_killed_run_goes_once_it_is_old(tmp_path):
    for name, age in ((".mgn-old.tmp", 4000), (".mgn-new.tmp", 10)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / ".mgn-file.tmp").touch()
    os.utime(tmp_path / ".mgn-file.tmp", (0, 0))
    replace_folder(tmp_path / "out", "x")
    assert sorted(os.listdir(tmp_path)) == [".mgn-new.tmp", "out"]


def test_what_is_written_for_hours_is_no_leftover(tmp_path):
    """An export that builds plans, or ranks a data set for its proof."""
    with atomic_folder(tmp_path / "slow", names=["marker"]) as new, atomic_file(tmp_path / "file") as file:
        (new / "marker").touch()
        for path in (new, file.name):
            os.utime(path, (0, 0))
        replace_folder(tmp_path / "quick", "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "quick", "slow"]


def test_failed_replacement_keeps_the_old_folder(tmp_path, monkeypatch):
    """Where the file system does not exchange folders."""
    replace_folder(tmp_path / "out", "old")
    monkeypatch.setattr(files, "_RENAME_EXCHANGE", 1 << 20)  # no such flag
    rename = os.replace

    def failing(source, target):
        if Path(target).name == "out" and Path(source).suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match="cannot be written: Input/output error"):
        replace_folder(tmp_path / "out", "new")
    assert (tmp_path / "out/marker").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("written", [atomic_file, partial(atomic_folder, names=["marker"])])
def test_a_file_that_cannot_be_read_meanwhile_is_named_and_not_the_output(tmp_path, written):
    with pytest.raises(UserError, match=r"in/gone\.npy: No such file or directory"), written(tmp_path / "out"):
        (tmp_path / "in/gone.npy").read_bytes()
    with pytest.raises(UserError, match=r"out cannot be written: Input/output error"), written(tmp_path / "out"):
        raise OSError(errno.EIO, "Input/output error")
    assert os.listdir(tmp_path) == []


def test_folder_of_others_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/letter.txt").touch()
    (tmp_path / "file").touch()
    for name in ("out", "file"):
        with pytest.raises(UserError, match="exists and holds what this command did not write"):
            replace_folder(tmp_path / name, "new")
    assert os.listdir(tmp_path / "out") == ["letter.txt"]


def test_cache_is_below_xdg_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("plans") == tmp_path / "mgn-deploy" / "plans"


@pytest.mark.parametrize("value", [None, ""])
def test_cache_is_below_the_home_folder_by_default(tmp_path, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("plans").is_relative_to(tmp_path)


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    """As a container's user without an entry in /etc/passwd."""

    def no_entry(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for variable in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    with pytest.raises(UserError, match="no home folder to keep a cache in: set XDG_CACHE_HOME"):
        cache_folder("plans")
