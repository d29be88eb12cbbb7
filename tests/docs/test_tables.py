"""README's tables are what the results and the table of engines give."""

from __future__ import annotations

import re
import sys

import pytest
from blocks import PAGES, ROOT

sys.path.insert(0, str(ROOT / "docs" / "gen"))

import tables

README = (ROOT / "README.md").read_text()


def test_readmes_tables_are_those_of_the_results():
    assert README.count("<!-- table: ") == 2
    assert tables.fill(README) == README, "python docs/gen/tables.py --readme writes them"


def test_readme_has_a_row_for_every_engine():
    from mgn_deploy.backends.registry import ENGINES

    rows = re.findall(r"^\| `([a-z-]+)` \|.*\| (.+) \|$", README, re.MULTILINE)
    assert rows == [(engine.name, engine.status) for engine in ENGINES.values()]


def test_every_result_is_in_a_table_and_has_its_command():
    commands = (ROOT / "bench" / "results" / "README.md").read_text()
    for path in (ROOT / "bench" / "results").iterdir():
        if path.name == "README.md":
            continue
        kind = re.search(rf"-({tables.KINDS})-(.+)$", path.name)
        assert kind, f"{path.name} is named like no table"
        assert f"*-{kind[1]}-{kind[2]}`" in commands, f"bench/results/README.md has no command of {path.name}"


def test_a_result_of_bench_is_in_both_tables(tmp_path, monkeypatch):
    from mgn_deploy.bench.environment import environment
    from mgn_deploy.bench.result import Latency, Result, Row
    from mgn_deploy.bench.timing import Limits, quantile, spread

    latency = Latency(
        calls=3, **dict.fromkeys(("p50", "p90", "p99", "p999"), quantile([9.0], 0.5)), rounds=spread([9.0])
    )
    row = Row(
        bundle="b", bundle_id="0", model="m", precision="int8", mirror=False, engine="openvino",
        version="2026.4.1-22982", device="CPU", fused_heads=False, batch=4, images=8, pixels=latency,
        image_bytes=latency, offline=spread([40.04]),
        embed=spread([39.2]), embed_of_offline=0.979, over_reference=4.02,
    )  # fmt: skip
    limits = Limits(by="torch", copy_bytes_per_second=1e10, operations_per_second={"float32": 1e11})
    result = Result(
        date="2030-01-02", minutes=1, seconds=60, seed=0, images="photos", environment=environment(), limits=limits,
        energy="not readable", peak_host_bytes=1, rows=[row],
    )  # fmt: skip
    (tmp_path / "2030-01-02-machine-bench-model.json").write_text(result.model_dump_json())
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert (
        tables.throughput().splitlines()[-1] == "| m int8 | openvino 2026.4.1 | no | 4 | 40 | 39 (0.98) | 10.0 | 4.0 |"
    )
    assert "| int8 no mirror, openvino, batch 4 | 9.00 [?, ?] |" in tables.bench()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_mark_names_a_table_and_is_closed(page):
    text = page.read_text()
    marks = re.findall(r"<!-- table: (.+?) -->", text)
    assert set(marks) <= set(tables.TABLES)
    assert text.count("<!-- end -->") == len(marks)
