"""What the command line prints of the library's log and progress where stderr is no terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mgn_deploy import console

log = logging.getLogger("mgn_deploy")


@pytest.fixture(autouse=True)
def _same_logger_afterwards() -> Iterator[None]:
    before = (log.handlers[:], log.level, log.propagate)
    yield
    log.handlers[:], log.level, log.propagate = before


def test_a_warning_is_told_from_what_is_being_done(capsys):
    console.show_log()
    log.info("reading weights")
    log.warning("no proof for openvino: it is not installed")
    console.say("2 rank lists")
    assert capsys.readouterr().err.splitlines() == [
        "reading weights",
        "warning: no proof for openvino: it is not installed",
        "2 rank lists",
    ]


def test_a_name_that_is_not_utf_8_is_spelled_out(capsys):
    console.show_log()
    log.info("bytes\udcff.jpg")
    assert capsys.readouterr().err == "bytes\\udcff.jpg\n"


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_of_torchruns_processes_only_the_first_one_speaks(monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("RANK", rank)
    console.show_log()
    log.warning("train has 12 images, published are 12936")
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_long_step_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(console, "LOG_SECONDS", 0)
    console.show_log()
    with console.progress("batches") as update:
        update("training", 2, 6)
        update("training", 3, 6)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("training: 3/6, ")
    assert line.endswith(" s left")
    assert " batches/s, " in line
