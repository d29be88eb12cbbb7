"""`make docs` builds: every link leads somewhere, generated pages are made, and nothing is asked of another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from blocks import ROOT

pytest.importorskip("material", reason="the site is built by the extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does, into a scratch folder."""
    made = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", made]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.slow
def test_a_strict_build_makes_the_generated_pages(site):
    assert "mgn-deploy figures curves" in (site / "reference" / "cli.html").read_text()
    assert "mgn_deploy.embedder.Embedder" in (site / "reference" / "api.html").read_text()
    assert "<table>" in (site / "benchmarks.html").read_text()
    assert (site / "architecture.html").is_file()


@pytest.mark.slow
def test_a_page_asks_no_other_host_for_anything(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"|<link[^>]*\shref="([^"]+)"', page.read_text())
        foreign = [one for pair in loaded for one in pair if one.startswith(("http:", "https:", "//"))]
        assert not foreign, f"{page.name}: {foreign}"
