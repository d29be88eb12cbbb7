"""The rank-list page in both colour schemes and on a phone."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from pages import crop_in, written

from mgn_deploy.report.rank_page import write_rank_page
from mgn_deploy.retrieval.rank_list import RankList


@pytest.fixture
def crop(tmp_path):
    return crop_in(tmp_path)


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_in_both_colour_schemes(tmp_path, scheme):
    written(tmp_path / "page.html")
    blocks = re.findall(r":root \{([^}]*--page[^}]*--glyph[^}]*)\}", (tmp_path / "page.html").read_text())
    colour = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[scheme == "dark"]))
    pairs = [(text, ground) for text in ("text", "muted") for ground in ("page", "surface", "well")]
    pairs += [("text", "notice")]
    pairs += [(frame, ground) for frame in ("same", "other", "unknown") for ground in ("surface", "glyph")]
    low = {pair: ratio for pair in pairs if (ratio := contrast(*(colour[c] for c in pair))) < 4.5}
    assert not low


PROBE = """<iframe id="f" src="page.html" style="width:360px;height:900px;border:0"></iframe>
<pre id="o"></pre>
<script>
f.onload = () => {
  const d = f.contentDocument, strip = d.querySelector(".strip"), query = d.querySelector("figure.query");
  const root = d.documentElement, name = d.querySelector("h2");
  const left = () => query.getBoundingClientRect().left;
  const before = left();
  strip.scrollLeft = 200;
  const rows = () => [...d.querySelectorAll(".row")].filter(r => r.getClientRects().length).length;
  const all = rows();
  d.querySelector("#only-wrong").click();
  o.textContent = `page wider by ${root.scrollWidth - root.clientWidth}, `
    + `name cut by ${name.scrollWidth - name.clientWidth}, `
    + `row scrolled by ${strip.scrollLeft}, `
    + `query moved by ${left() - before}, rows ${all}, of them wrong ${rows()}`;
};
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH")
def test_on_a_phone_only_the_row_scrolls_and_the_query_stays(tmp_path, crop):
    results = [crop(i, 2, 0.5, name="a-very-long-name-without-a-break" * 4) for i in range(2, 12)]
    right, wrong = RankList(crop(1), [crop(1, 2)]), RankList(crop(1, name="x" * 200), results)
    write_rank_page(tmp_path / "page.html", [wrong, right], title="y" * 100, facts={"Model": "z" * 100})
    (tmp_path / "probe.html").write_text(PROBE)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --allow-file-access-from-files --dump-dom"
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", *flags.split(), profile, (tmp_path / "probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    shown = re.search(r"page wider by.*(?=</pre>)", dom)
    assert shown
    assert shown[0] == (
        "page wider by 0, name cut by 0, row scrolled by 200, query moved by 0, rows 2, of them wrong 1"
    )
