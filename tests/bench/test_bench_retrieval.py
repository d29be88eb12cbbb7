"""The bench of retrieval: contenders in processes of their own, measured alike."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mgn_deploy.bench import retrieval


def test_people_are_near_themselves_and_far_from_others():
    rows, people = retrieval.drawn_people(200, 64)
    products = rows @ rows.T
    same = people[:, None] == people
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-6)
    assert products[same].mean() > 0.4
    assert abs(products[~same].mean()) < 0.05


def test_each_contender_says_seconds_and_memory_and_re_rankings_are_compared(monkeypatch, capsys, tmp_path):
    """torchreid stands in the packages' path as its sdist has it: one file, and an __init__ that cannot be imported."""
    package = tmp_path / "torchreid"
    (package / "reid" / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('gdown')")
    (package / "reid" / "utils" / "rerank.py").write_text(
        "import numpy as np\n"
        "def re_ranking(q_g, q_q, g_g):\n"
        "    assert q_g.shape in ((20, 70), (100, 300)) and q_q.shape[0] == len(q_g) and g_g.shape[0] == q_g.shape[1]\n"
        "    return np.full_like(q_g, 2)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    retrieval.main(["--queries", "20", "--images", "90", "--dim", "16", "reranked", "reranked_by_torchreid"])
    printed = json.loads(capsys.readouterr().out)
    assert [row["contender"] for row in printed["rows"]] == ["reranked", "reranked_by_torchreid"]
    assert all(row["seconds"] > 0 and row["gigabytes"] >= 0 for row in printed["rows"])
    assert 1 <= printed["largest_difference_of_re_rankings"] <= 2


def test_an_unknown_contender_is_refused(capsys):
    with pytest.raises(SystemExit):
        retrieval.main(["abacus"])
    assert "invalid choice: 'abacus' (choose from" in capsys.readouterr().err
