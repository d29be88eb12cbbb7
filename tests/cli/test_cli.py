"""The command line: results on stdout, what is done on stderr, exit codes, one sentence for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import mgn_deploy
from typer.testing import Result

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import write_manifest
from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.store import Store


@pytest.fixture
def images(tmp_path) -> Path:
    """Three drawn crops with awkward names."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate((b"a b.jpg", b'it\'s "new"\nline.jpg', b"bytes\xff\xfe.jpg")):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            draw_crop(number, 1, 0).save(file, "JPEG", quality=90)
    return folder


@pytest.fixture
def bundle(bundle_folder, tmp_path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mgn_deploy", *map(os.fspath, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, env=environment, **options)


def assert_sentence(done: Result, code: int, *expected: str) -> None:
    """The exit code, nothing on stdout, and a last line on stderr that holds what is expected; no traceback."""
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mgn-deploy: "), done.stderr
    for part in expected:
        assert part in last


def test_embed_then_search_with_awkward_names(images, bundle_folder, tmp_path):
    (images / "empty.jpg").touch()
    done = mgn_deploy(
        "embed", images, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime", "--json"
    )
    assert done.exit_code == 0
    summary = json.loads(done.stdout)
    assert (summary["embedded"], summary["failed"], summary["unchanged"], summary["gone"]) == (3, 1, 0, 0)
    assert "cannot be read: 'empty.jpg': the file is empty" in done.stderr
    again = mgn_deploy("embed", images, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime")
    assert again.exit_code == 0
    assert "0 embedded" in again.stdout
    assert "3 already there, 1 failed" in again.stdout
    found = mgn_deploy("search", tmp_path / "s", tmp_path / "s", "-k", "2", "--json", "--html", tmp_path / "page.html")
    assert found.exit_code == 0
    assert "rank lists" in found.stderr
    lists = json.loads(found.stdout)
    assert {os.fsencode(ranked["query"]) for ranked in lists} == {
        b"a b.jpg",
        b'it\'s "new"\nline.jpg',
        b"bytes\xff\xfe.jpg",
    }
    for ranked in lists:
        assert [result["rank"] for result in ranked["results"]] == [1, 2]
        assert ranked["query"] not in {result["name"] for result in ranked["results"]}
    page = (tmp_path / "page.html").read_bytes().decode()
    assert "it&#x27;s &quot;new&quot;" in page or "it&#39;s &quot;new&quot;" in page or "it&#39;s &#34;new&#34;" in page


def test_second_run_says_that_there_is_nothing_to_do(crops, embedder, bundle_folder, tmp_path):
    embed_folder(crops, tmp_path / "s", embedder)
    done = mgn_deploy("embed", crops, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime")
    assert done.exit_code == 0
    assert done.stdout == f"{tmp_path / 's'}: nothing to do, all 40 images are in it\n"


@pytest.mark.parametrize(
    "folder, code, expected",
    [
        ("none", 2, "does not exist: give a folder of images"),
        ("empty", 2, "holds no image"),
        ("bad", 1, "not one of the 2 images"),
    ],
)
def test_unusable_folder_is_one_sentence(bundle_folder, tmp_path, folder, code, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a\nb.jpg").touch()
    (tmp_path / "bad/b.jpg").write_text("a letter")
    done = mgn_deploy(
        "embed",
        tmp_path / folder,
        "-o",
        tmp_path / "s",
        "--bundle",
        bundle_folder,
        "--backend",
        "onnxruntime",
    )
    assert_sentence(done, code, expected, folder)


def test_too_many_failures_exit_1(images, bundle_folder, tmp_path):
    (images / "empty.jpg").touch()
    done = mgn_deploy(
        "embed",
        images,
        "-o",
        tmp_path / "s",
        "--bundle",
        bundle_folder,
        "--backend",
        "onnxruntime",
        "--max-failures",
        "0",
        "--batch",
        "1",
    )
    assert_sentence(done, 1, "more than 0 images cannot be read; the last, 'empty.jpg': the file is empty")
    assert len(Store.open(tmp_path / "s")) == 2


def test_path_that_the_system_refuses_is_one_sentence(images, tmp_path):
    assert_sentence(mgn_deploy("embed", images, "-o", tmp_path / "s", "--bundle", "n" * 300), 2, "File name too long")
    assert_sentence(mgn_deploy("search", "n" * 300, "n" * 300), 2, "File name too long")


def test_a_distance_matrix_and_what_is_printed_of_it(images, embedder, tmp_path):
    embed_folder(images, tmp_path / "s", embedder)
    done = mgn_deploy("distmat", tmp_path / "s", tmp_path / "s", "-o", tmp_path / "d.npy", "--metric", "euclidean")
    assert done.exit_code == 0
    assert done.stdout.startswith(
        f"{tmp_path / 'd.npy'}: float32 [3, 3], euclidean distance by numpy on cpu in float32, "
    )
    done = mgn_deploy("distmat", tmp_path / "s", tmp_path / "s", "-o", tmp_path / "d.npy", "--json")
    printed = json.loads(done.stdout)
    assert printed.pop("largest_error_on_a_sample") < 1e-6
    assert printed == {
        "device": "numpy on cpu",
        "compute": "float32",
        "matrix": str(tmp_path / "d.npy"),
        "shape": [3, 3],
        "dtype": "float32",
        "metric": "cosine",
    }
    assert np.load(tmp_path / "d.npy").shape == (3, 3)


def test_a_missing_package_is_named_with_what_installs_it(tmp_path):
    """In a process of its own, which has not imported it yet."""
    script = "import sys; sys.modules['torchvision'] = None; from mgn_deploy.__main__ import main; main()"
    arguments = ["init", "-o", str(tmp_path / "w"), "--init", "random"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mgn-deploy: this command needs PyTorch and the exporter's packages: torchvision")
    assert not (tmp_path / "w").exists()


def test_reader_that_leaves_is_no_traceback(crops, images, embedder, tmp_path):
    """Of a result that is printed in several parts, and of one that waits in the buffer until the end."""
    embed_folder(crops, tmp_path / "large", embedder)
    embed_folder(images, tmp_path / "small", embedder)
    for store in (tmp_path / "large", tmp_path / "small"):
        read, write = os.pipe()
        os.close(read)
        with start("search", store, store, "--json", stdout=write, stderr=subprocess.PIPE) as process:
            os.close(write)
            assert "Traceback" not in process.stderr.read()
        assert process.returncode == 141


def test_a_folder_that_is_not_utf8_is_printed_as_it_is(images, embedder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as Python has it where the locale is no C
    store = os.fsencode(tmp_path) + b"/M\xe4rz"
    embed_folder(images, os.fsdecode(store), embedder)
    command = [sys.executable, "-m", "mgn_deploy", "store", "verify", store]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert store in done.stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command, code", [("--help", 0), ("embed none -o s --bundle b", 2), ("--nonsense", 2)])
def test_closed_streams_change_no_exit_code(tmp_path, closed, command, code):
    done = subprocess.run(
        f"{sys.executable} -m mgn_deploy {command} {closed}", shell=True, capture_output=True, cwd=tmp_path, check=False
    )
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--nonsense"], "No such option: --nonsense; see `mgn-deploy --help`"),
        (["embed"], "see `mgn-deploy embed --help`"),
        (
            ["embed", "a", "-o", "s", "--bundle", "b", "--batch", "0"],
            "--batch': give auto or a number from 1 to 4096, not '0'; see",
        ),
        (["nonsense"], "No such command 'nonsense'; see `mgn-deploy --help`"),
    ],
)
def test_wrong_command_line_is_one_sentence(arguments, expected):
    done = mgn_deploy(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("mgn-deploy: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_result_that_cannot_be_written_is_one_sentence(images, embedder, tmp_path):
    embed_folder(images, tmp_path / "s", embedder)
    arguments = ("search", tmp_path / "s", tmp_path / "s", "--json")
    with open("/dev/full", "w") as full, start(*arguments, stdout=full, stderr=subprocess.PIPE) as process:
        assert process.stderr.read().splitlines()[-1] == "mgn-deploy: [Errno 28] No space left on device"
    assert process.returncode == 2


def test_interrupt_exits_130_and_keeps_what_was_embedded(crops, bundle_folder, embedder, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    originals = sorted(crops.rglob("*.jpg"))
    for number in range(6000):
        (many / f"{number:05d}.jpg").symlink_to(originals[number % 40])
    with start(
        "embed",
        many,
        "-o",
        tmp_path / "s",
        "--bundle",
        bundle_folder,
        "--backend",
        "onnxruntime",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stderr.readline()  # the engine is open
        while not list((tmp_path / "s").glob("shard-00000-*.parquet")):
            time.sleep(0.01)
        time.sleep(0.2)  # into the second shard
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130
    assert output == ""
    assert errors.splitlines()[-1] == (
        f"interrupted: what was embedded is in {tmp_path / 's'}, and the same command goes on from there"
    )
    store = Store.open(tmp_path / "s")
    assert 1024 < len(store) < 6000
    last = embedder.embed([many / store.rows[-1].name])[0]
    assert abs(store.embeddings()[-1] - last).max() < 1e-5


def test_flipped_byte_in_the_graph_exits_2(bundle, images, tmp_path):
    with open(bundle / "graph.onnx", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    done = mgn_deploy("embed", images, "-o", tmp_path / "s", "--bundle", bundle)
    assert_sentence(done, 2, "graph.onnx is not what was exported (its SHA-256 differs)")
    assert not (tmp_path / "s").exists()


def unproven(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    failed = {
        name: proof.model_copy(
            update={"passed": False, "worst_cosine": 0.9, "misses": ["worst cosine 0.9 is below 0.9999"]}
        )
        for name, proof in manifest.proofs.items()
    }
    write_manifest(bundle, manifest.model_copy(update={"proofs": failed}))


def test_unproven_bundle_is_refused_unless_allowed(bundle, images, tmp_path):
    unproven(bundle)
    arguments = ("embed", images, "-o", tmp_path / "s", "--bundle", bundle, "--backend", "onnxruntime")
    assert_sentence(
        mgn_deploy(*arguments),
        2,
        "is not proven for onnxruntime (worst cosine 0.9 is below 0.9999)",
        "--allow-unproven",
    )
    assert not (tmp_path / "s").exists()
    with pytest.raises(UserError, match="no backend can run"):
        Embedder.open(bundle)
    allowed = mgn_deploy(*arguments, "--allow-unproven", "--json")
    answer = json.loads(allowed.stdout)
    assert (answer["embedded"], answer["proof"]) == (3, "not proven: worst cosine 0.9 is below 0.9999")
