"""The service beside its bare engine: `python -m mgn_deploy.bench.serve`."""

from __future__ import annotations

import json
import sys

import pytest

from mgn_deploy.bench import serve
from mgn_deploy.errors import UserError


def test_shares_follow_from_the_rates_of_engine_and_service(bundle_folder, crops, monkeypatch, capsys):
    pytest.importorskip("uvicorn")
    options = f"serve --bundle {bundle_folder} --images {crops} --batch 2 --seconds 0.5 --turns 1"
    monkeypatch.setattr(sys, "argv", options.split())
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # for other addresses than this machine's
    serve.main()
    printed = json.loads(capsys.readouterr().out)
    [turn] = printed["turns"]
    assert turn["share"] == pytest.approx(turn["rate"] * turn["batch_seconds"] / 2)
    assert turn["cpu_share"] == pytest.approx(turn["bare_cpu"] / turn["served_cpu"])
    assert 0 < turn["p50"] <= turn["p99"]
    assert printed["medians"] == turn


def test_turns_too_short_for_a_rate_are_a_sentence():
    with pytest.raises(UserError, match=r"4 answers .*: --seconds"):
        serve.steady([(number / 10, 0.1, 0.0) for number in range(4)], callers=2)
