"""The Dockerfiles. No daemon runs here: the CPU image's RUN lines run as they are, with other folders, and what it
starts runs as its user, without HOME, on a file system that is mounted read-only."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("Dockerfile", "Dockerfile.gpu")


def steps(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def values(name: str, instruction: str) -> list[str]:
    return [value for word, value in steps(name) if word == instruction]


@pytest.mark.parametrize("name", FILES)
def test_a_base_has_a_whole_version_and_the_user_is_not_root(name: str) -> None:
    for base in values(name, "FROM"):
        assert re.match(r"python:3\.\d+\.\d+-slim-\w+( AS build)?$", base), base
    assert values(name, "USER") == ["10001:10001"]
    words = [word for word, _ in steps(name)]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word in ("RUN", "COPY"))


@pytest.mark.parametrize("name", FILES)
def test_it_starts_the_service_and_asks_how_it_is(name: str) -> None:
    (health,) = values(name, "HEALTHCHECK")
    assert json.loads(health.partition("CMD ")[2]) == ["python", "/opt/healthcheck.py"]
    command = json.loads(values(name, "ENTRYPOINT")[0]) + json.loads(values(name, "CMD")[0])
    assert command[:2] == ["mgn-deploy", "serve"]
    assert values(name, "EXPOSE") == ["8000"]


def test_the_build_sees_what_the_wheel_needs_and_no_more() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"mgn_deploy", "train", "export", "kernels", "bench", "pyproject.toml", "README.md", "LICENSE"} <= kept
    assert all((ROOT / one).exists() for one in kept)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """One that every user may enter: pytest's own are this user's alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """What the CPU image's RUN lines make, of this repository, with the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("image")
    source = folder / "source"
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for one in kept:
        copy = shutil.copytree if (ROOT / one).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / one, source / one)
    (folder / "opt").mkdir()
    for name in ("install.sh", "healthcheck.py"):
        shutil.copy(ROOT / "docker" / name, folder / "opt" / name)
    environment = {
        **os.environ, "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    for run in values("Dockerfile", "RUN"):
        line = re.sub(r" /(wheels|opt)", rf" {folder}/\1", run)
        subprocess.run(["sh", "-euc", line], cwd=source, env=environment, check=True, capture_output=True, text=True)
    site = next((folder / "opt/mgn-deploy/lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n" + extra_sites())
    return folder


def extra_sites() -> str:
    """Where this environment has its packages, should it be one on top of another."""
    return "\n".join(path for path in sys.path if path.endswith("site-packages"))


@pytest.mark.slow
def test_the_wheel_brings_the_page_with_it(image: Path) -> None:
    page = next((image / "opt/mgn-deploy/lib").glob("python*/site-packages/mgn_deploy/serve/page"))
    assert {file.name for file in page.iterdir()} == {"page.html", "page.js", "page.css", "icon.svg"}


@pytest.mark.slow
def test_it_serves_as_nobody_without_a_home_on_a_read_only_file_system(
    image: Path, bundle_folder: Path, gallery_store: Path, public_folder: Path
) -> None:
    for folder, name in ((bundle_folder, "bundle"), (gallery_store, "store")):
        shutil.copytree(folder, public_folder / name)
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("only root can mount the file system read-only and become another user")
    if subprocess.run(["unshare", "--mount", "mount", "-o", "remount,ro,bind", "/"], capture_output=True).returncode:
        pytest.skip("this sandbox does not let a mount namespace be made")
    # The interpreter may be in root's home: this user may read everything, and write nowhere.
    become = "setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --inh-caps=-all,+dac_read_search"
    command = (
        f"mount -o remount,ro,bind / && exec {become} --ambient-caps=-all,+dac_read_search env -i "
        f"PATH={image}/opt/mgn-deploy/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 mgn-deploy serve --bundle "
        f"{public_folder}/bundle --store {public_folder}/store --port 0"
    )
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
    )
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), process.stderr.read()
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^Uid:\t10001\t10001\t10001", status, re.MULTILINE)
        port = address.rpartition(":")[2]
        check = [sys.executable, image / "opt/healthcheck.py", port]
        behind_a_proxy = os.environ | {"http_proxy": "http://127.0.0.1:9"}  # a proxy for other addresses, not this one
        assert subprocess.run(check, env=behind_a_proxy).returncode == 0
        process.terminate()
        assert process.wait(30) == 0
        assert subprocess.run(check, capture_output=True).returncode == 1
    finally:
        process.kill()
        process.communicate()
