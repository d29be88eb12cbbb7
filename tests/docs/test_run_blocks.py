"""The blocks of README and tutorials, run in order in one scratch folder a page, as a reader would type them.

Commands of `mgn-deploy` and Python blocks are run in this process, which has imported PyTorch and the engines once,
other lines by bash. What a page takes for granted (photos, a checkpoint, labelled people) is of drawn people and
untrained models.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest
from blocks import ROOT, RUN, blocks
from conftest import mgn_deploy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHECKPOINT = "market_mgn_R50-ibn.pth"
PHOTOS = ("photos", "photo.jpg")
# What a page's reader has before the first block.
GIVEN = {
    "README.md": (*PHOTOS, CHECKPOINT, "DIR"),
    "demo.md": ("mgn-demo",),
    "photos.md": (*PHOTOS, "weights"),
    "labelled-data.md": ("DIR", "run"),
    "checkpoint.md": (*PHOTOS, CHECKPOINT, "DIR"),
    "other-tools.md": (*PHOTOS, "bundle"),
    "json.md": (*PHOTOS, CHECKPOINT, "weights", "DIR"),
}


SETUP = (
    "mgn-deploy train --data folder:mgn-demo/people -o mgn-demo/run --recipe small --set schedule.epochs=1",
    "mgn-deploy export mgn-demo/run/weights -o mgn-demo/bundle --proof-images mgn-demo/people/query",
    "mgn-deploy embed mgn-demo/people/query -o mgn-demo/store-query --bundle mgn-demo/bundle",
    "mgn-deploy embed mgn-demo/people/bounding_box_test -o mgn-demo/store-gallery --bundle mgn-demo/bundle",
)


@pytest.fixture(scope="module")
def made(trace: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that some page is given; `mgn-demo` is like the demo makes it, of fewer people."""
    from mgn_deploy.datasets.drawn import draw_market1501

    folder = tmp_path_factory.mktemp("given")
    demo = folder / "mgn-demo"
    demo.mkdir()
    draw_market1501(demo / "people", train_identities=16, test_identities=12)
    with working_in(folder):
        run_shell("\n".join(SETUP), "the set-up")
    for name, target in {"DIR": "people", "run": "run", "weights": "run/weights", "bundle": "bundle"}.items():
        (folder / name).symlink_to(demo / target)
    (folder / "photos").mkdir()
    for number, photo in enumerate(sorted((demo / "people" / "bounding_box_test").glob("0*.jpg"))[:24]):
        shutil.copyfile(photo, folder / "photos" / f"{number:04d}.jpg")
    shutil.copyfile(folder / "photos" / "0000.jpg", folder / "photo.jpg")
    write_checkpoint(folder / CHECKPOINT)
    return folder


def write_checkpoint(path: Path) -> None:
    """A narrow fast-reid MGN with random weights, in that code's own format."""
    sys.path.insert(0, str(ROOT / "tests" / "train"))
    import torch
    from public_mgns import FastReid, randomise

    torch.save({"model": randomise(FastReid(1, reduced=16)).state_dict()}, path)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page, made, tmp_path):
    for name in GIVEN[page.name]:
        given = made / name
        shutil.copytree(given, tmp_path / name) if given.is_dir() else shutil.copyfile(given, tmp_path / name)
    found = blocks(page)
    with working_in(tmp_path):
        for block, following in zip_longest(found, found[1:]):
            if block.language not in ("sh", "python") or block.reason is not None:
                continue
            printed = run_shell(block.code, str(block)) if block.language == "sh" else run_python(block.code)
            if following is not None and following.language == "json":
                compare_keys(json.loads(following.code), json.loads(printed), str(following))


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_shell(code: str, where: str) -> str:
    """Run each line, and return what they print."""
    return "".join(run_line(line, where) for line in code.replace("\\\n", " ").splitlines() if line.strip())


def run_line(line: str, where: str) -> str:
    words = shlex.split(line, comments=True)
    if words[:1] != ["mgn-deploy"] or {"|", "&&", ";"} & set(words):
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], env=environment, capture_output=True, text=True)
        code = done.returncode
    else:
        words, file = (words[:-2], words[-1]) if words[-2] == ">" else (words, None)
        done = mgn_deploy(*words[1:])
        code = done.exit_code
        if file is not None:
            Path(file).write_text(done.stdout)
    assert code == 0, f"{where}: {line}\nended with {code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_python(code: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def compare_keys(shown: object, printed: object, where: str) -> None:
    """Every key that a page shows is printed and the other way round; of lists, the first items are compared.

    A key "..." of the page stands for any names.
    """
    if isinstance(shown, dict) and isinstance(printed, dict):
        if "..." in shown:
            if isinstance(shown["..."], str):  # which describes what is not shown
                return
            shown = dict.fromkeys(printed, shown["..."])
        assert shown.keys() == printed.keys(), f"{where}: {sorted(shown.keys() ^ printed.keys())}"
        for key, value in shown.items():
            compare_keys(value, printed[key], f"{where}: {key}")
    elif isinstance(shown, list) and isinstance(printed, list) and shown and printed:
        compare_keys(shown[0], printed[0], f"{where}[0]")
    else:
        compatible = shown is None or printed is None or {type(shown), type(printed)} <= {int, float}
        assert compatible or type(shown) is type(printed), f"{where}: {shown!r} is shown, {printed!r} is printed"
