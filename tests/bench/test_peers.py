"""`bench.peers`: every peer runs over the same crops or says why not, and its embeddings are the network's."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from mgn_deploy.bench.peers.ways import PEERS, Peer
from mgn_deploy.bundle.bundle import Bundle

pytestmark = pytest.mark.slow
QUANTISED = [peer.name for peer in PEERS if "quant" in peer.name.lower()]


@pytest.fixture(scope="module")
def result(bundle_folder, crops, tmp_path_factory):
    """One run of all that a test can wait for: torch.compile builds C++ for a minute.

    In a process of its own: NNCF puts its own functions into PyTorch and OpenVINO.
    """
    out = tmp_path_factory.mktemp("peers") / "peers.json"
    words = "one image,benchmark_app,eager,from files,int8,nncf,quantize_static"
    arguments = ["--bundle", bundle_folder, "--images", crops, "--calib", crops, "--out", out, "--peers", words]
    arguments += ["--count", 16, "--calib-count", 10, "--minutes", 0.01]
    command = [sys.executable, "-m", "mgn_deploy.bench.peers", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [model] = json.loads(out.read_text())["models"]
    return model


def rows_of(result):
    return {row["peer"]: row for row in result["rows"]}


def test_every_peer_has_a_rate_or_says_why_not(result):
    for row in result["rows"]:
        assert ("images_per_second" in row) != ("left_out" in row), row
        if "left_out" not in row:
            assert row["images_per_second"]["median"] > 0
            assert row["of_ours"] > 0
    assert rows_of(result)["mgn-deploy"]["of_ours"] == 1
    assert "--int8 BUNDLE" in rows_of(result)["mgn-deploy INT8"]["left_out"]


def test_where_ours_did_not_run_nothing_is_said_of_it(bundle_folder, crops):
    from mgn_deploy.bench.peers.__main__ import run

    chosen = argparse.Namespace(
        images=crops, count=4, batch=4, calib=None, minutes=0.001, bundle=[bundle_folder], int8=[]
    )
    peer = Peer("another's loop, from files", "", lambda given: lambda: 10.0)
    [row] = run(chosen, Bundle.open(bundle_folder), [peer])["rows"]
    assert row["images_per_second"]["median"] == 10
    assert "of_ours" not in row


def test_float_peers_give_the_reference_embeddings(result):
    for name in ("mgn-deploy", "ONNX Runtime, one image a call", "PyTorch eager", "mgn-deploy from files"):
        assert rows_of(result)[name]["distance"] < 1e-6
    loop = rows_of(result)["torchreid's loop in plain PyTorch, from files"]
    assert loop["distance"] < 0.02  # its resize is another


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_peers_are_near_the_reference_and_say_how_near(result, name):
    row = rows_of(result)[name]
    if "NNCF" in name and find_spec("nncf") is None:
        assert "nncf is not installed (pip install 'mgn-deploy[peers]')" in row["left_out"]
    else:
        assert 1e-9 < row["distance"] < 0.2


def test_the_table_says_whether_the_mirror_is_averaged_and_who_else_was_there(result):
    assert "with the mirror average" in result["model"]
    assert result["mirror"] is True
    assert result["noise"]["load"] >= 0
