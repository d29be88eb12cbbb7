"""The bench of growing galleries, on small ones."""

from __future__ import annotations

import json

import pytest

from mgn_deploy.bench import growth


def test_each_size_is_searched_indexed_and_reranked(tmp_path, capsys):
    plot = tmp_path / "growth.svg"
    sizes = ["150", "300", "--largest-rerank", "150"]
    growth.main([*sizes, "--dim", "16", "--folder", str(tmp_path), "--plot", str(plot)])
    printed = json.loads(capsys.readouterr().out)
    tasks = [(row["task"], row["images"]) for row in printed["rows"]]
    assert tasks == [("search", 150), ("index", 150), ("rerank", 150), ("search", 300), ("index", 300)]
    assert all(row["seconds"] > 0 and row["gigabytes"] >= 0 for row in printed["rows"])
    assert printed["rows"][1]["recall_at_10"] >= 0.95
    assert printed["rerank_extrapolated"] is None  # one size gives no exponent
    assert list(tmp_path.iterdir()) == [plot]


def test_the_exponent_is_that_of_the_two_largest():
    rows = [{"images": n, "cpu_seconds": 3e-9 * n**2 + (n == 10)} for n in (10, 50_000, 100_000)]
    fitted = growth.exponent(rows)
    assert fitted == pytest.approx({"exponent": 2, "cpu_seconds_at_500000": 750})
