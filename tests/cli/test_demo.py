"""The demo, whole but with fewer people."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import mgn_deploy

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.cli import demo
from mgn_deploy.datasets import drawn
from mgn_deploy.datasets.drawn import draw_market1501
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.store import Store
from mgn_deploy.train.weights import load_weights

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine


class Made(NamedTuple):
    out: Path
    printed: dict[str, Any]
    said: list[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """The command over an earlier demo."""
    out = tmp_path_factory.mktemp("demo") / "mgn-demo"
    out.mkdir()
    (out / demo.MARKER).touch()
    (out / "old.txt").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "draw_market1501", partial(draw_market1501, train_identities=6, test_identities=6))
        done = mgn_deploy("demo", "-o", out, "--seconds", 2, "--json")
    assert done.exit_code == 0, done.stderr
    return Made(out, json.loads(done.stdout), done.stderr.splitlines())


@pytest.mark.slow
def test_it_replaces_the_earlier_demo_by_every_artefact(made):
    names = ["bundle", demo.MARKER, "people", "ranks.html", "run", "store-gallery", "store-query"]
    assert sorted(path.name for path in made.out.iterdir()) == names
    assert load_weights(made.out / "run" / "weights").config.num_classes == 6
    proofs = Bundle.open(made.out / "bundle").manifest.proofs
    assert all(proof.passed for proof in proofs.values())
    assert {proof.image_source for proof in proofs.values()} == {"query"}
    people = made.out / "people"
    assert len(Store.open(made.out / "store-query")) == len(list((people / "query").iterdir())) == 12
    gallery = list((people / "bounding_box_test").iterdir())
    assert len(Store.open(made.out / "store-gallery")) == len(gallery)


def test_its_page_shows_every_query(made):
    page = (made.out / "ranks.html").read_text()
    for query in (made.out / "people" / "query").iterdir():
        assert query.name in page


def test_its_figures_are_an_engines_beside_pytorchs(made):
    printed = made.printed
    assert printed["chance"] == pytest.approx(1 / 6)
    assert printed["backend"] == "openvino"
    assert printed["difference"] == pytest.approx(dict.fromkeys(printed["difference"], 0), abs=1e-6)
    assert printed["measured"]["queries"] == printed["untrained"]["queries"] == 12
    assert printed["seconds"] > 0
    assert (printed["page"], printed["bundle"]) == (str(made.out / "ranks.html"), str(made.out / "bundle"))


def test_it_says_its_six_steps_in_order(made):
    assert [line[:3] for line in made.said if line[1:3] == "/6"] == [f"{step}/6" for step in range(1, 7)]


def test_the_next_commands_take_folders_whose_names_have_spaces():
    commands = demo._next_commands(Path("my demo/q"), Path("my demo/g"), Path("my demo/b"))
    assert shlex.split(commands[0])[2:4] == ["my demo/q", "my demo/g"]
    assert shlex.split(commands[1])[-1] == shlex.split(commands[2])[-1] == "my demo/b"


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no earlier demo's: choose another folder"):
        demo.run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_link_is_refused_with_the_reason(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / demo.MARKER).touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match=r"link cannot be written: .*symbolic link"):
        demo.run_demo(tmp_path / "link")


def test_a_file_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes").write_text("words")
    with pytest.raises(UserError, match="choose another folder"):
        demo.run_demo(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "words"
