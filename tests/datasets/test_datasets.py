"""Kinds of `--data`, and places a level off."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from small_datasets import fill, market1501

from mgn_deploy.choices import DATA_KINDS
from mgn_deploy.datasets import open_data
from mgn_deploy.errors import UserError


@pytest.fixture
def root(tmp_path):
    return market1501(tmp_path)


# Kinds


@pytest.mark.parametrize("spec", ["market1501", "market1501:", "/data", ""])
def test_data_without_kind_or_folder_is_a_sentence_with_the_form(spec):
    with pytest.raises(UserError, match="give KIND:DIR, KIND being one of market1501, dukemtmc"):
        open_data(spec)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("duke", "dukemtmc"), ("Market-1501", "market1501"), ("msmt", "msmt17"), ("cuhk03-label", "cuhk03-labeled")],
)
def test_an_unknown_kind_is_a_sentence_with_the_nearest_and_all_others(wrong, right):
    with pytest.raises(UserError, match=f"no kind of dataset '{wrong}', did you mean '{right}'") as error:
        open_data(f"{wrong}:/data")
    assert all(kind in str(error.value) for kind in DATA_KINDS)


def test_cuhk03_without_its_crops_is_a_sentence_with_both():
    with pytest.raises(UserError, match="give cuhk03-labeled:DIR for the hand-drawn boxes or cuhk03-detected:DIR"):
        open_data("cuhk03:/data")


@pytest.mark.parametrize("kind", ["market1501", "dukemtmc", "folder"])
def test_kinds_in_market_layout_differ_in_name_and_published_counts_alone(root, kind):
    data = open_data(f"{kind}:{root}")
    assert data.name == kind
    assert len(data.gallery) == 4
    assert bool(data.notes) == (kind != "folder")


def test_a_tilde_is_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert open_data(f"folder:~/{root.name}").root == root


def test_opening_a_dataset_imports_neither_torch_nor_what_reads_matlab_files(root):
    script = (
        f"import sys; from mgn_deploy.datasets import open_data; open_data('folder:{root}'); "
        "print(sorted({'torch', 'h5py', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Places a level off


@pytest.mark.parametrize("place", ["..", "query", "bounding_box_test"])
def test_a_place_one_level_off_is_found(root, place):
    data = open_data(f"folder:{root / place}")
    assert data.root.samefile(root)
    assert len(data.query) == 1


def test_the_folder_one_is_in_may_be_given_as_a_dot(root, monkeypatch):
    monkeypatch.chdir(root / "query")
    assert open_data("folder:.").root == root


def test_a_place_that_could_mean_two_datasets_names_both(root):
    other = fill(root.parent / "DukeMTMC-reID", {"query": ["0001_c1_f0000001.jpg"]})
    with pytest.raises(UserError, match="could mean") as error:
        open_data(f"folder:{root.parent}")
    assert str(other) in str(error.value)
    assert str(root) in str(error.value)


@pytest.mark.parametrize("kind", ["market1501", "msmt17", "cuhk03-labeled", "cuhk03-detected"])
def test_a_place_without_a_dataset_is_a_sentence_with_what_is_looked_for(tmp_path, kind):
    wanted = {"market1501": "bounding_box_train", "msmt17": "list_query.txt"}.get(kind, "cuhk03_new_protocol_config_")
    (tmp_path / "in" / "between" / "query").mkdir(parents=True)
    with pytest.raises(UserError, match=f"does not hold .*{wanted}.*neither does the folder above it nor one in it"):
        open_data(f"{kind}:{tmp_path}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read_are_a_sentence_or_passed_over(root):
    closed = fill(root.parent / "closed", {"query": ["0001_c1.jpg"]})
    closed.chmod(0)
    (root / "query").chmod(0)
    try:
        assert open_data(f"folder:{root.parent}", ("gallery",)).root == root
        with pytest.raises(UserError, match="query cannot be listed"):
            open_data(f"folder:{root}")
    finally:
        closed.chmod(0o700)
        (root / "query").chmod(0o700)
