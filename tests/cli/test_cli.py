"""The command line: exit codes, one sentence for each mistake, results on stdout, bundles that must be themselves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import write_manifest
from mgn_deploy.cli import console
from mgn_deploy.cli.measure import validate
from mgn_deploy.console import BACKENDS
from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.store import Store

HEAVY = {"torch", "onnx", "onnxruntime", "openvino", "pyarrow", "PIL", "pandas", "torchvision"}
COMMANDS = (
    "demo",
    "doctor",
    "init",
    "import",
    "export",
    "prove",
    "embed",
    "distmat",
    "figures",
    "search",
    "train",
    "validate",
    "bench",
)


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


def assert_sentence(done: subprocess.CompletedProcess[str], code: int, *expected: str) -> None:
    """The exit code, nothing on stdout, and a last line on stderr that holds what is expected; no traceback."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mgn-deploy: "), done.stderr
    for part in expected:
        assert part in last


def refusal(action, *arguments, **options) -> str:
    with pytest.raises(UserError) as refused:
        action(*arguments, **options)
    return str(refused.value)


# Help


def test_help_is_quick():
    seconds = []
    for _ in range(5):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "mgn_deploy", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - begin)
    assert min(seconds) < 0.5


def test_importing_the_command_line_imports_nothing_heavy():
    script = "import sys, mgn_deploy, mgn_deploy.cli.app; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "mgn_deploy" in loaded
    assert HEAVY.isdisjoint(loaded)


def test_the_table_of_commands_is_this_one(run_cli):
    done = run_cli("--help")
    assert done.returncode == 0
    listed = [
        line.split()[0] for line in done.stdout.split("Commands:")[1].splitlines() if line.strip() and line[2] != " "
    ]
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_help(run_cli, command):
    done = run_cli(command, "--help")
    assert done.returncode == 0
    assert f"Usage: mgn-deploy {command}" in done.stdout


# Results and mistakes


def test_embed_then_search_with_awkward_names(run_cli, images, bundle_folder, tmp_path):
    (images / "empty.jpg").touch()
    done = run_cli(
        "embed", images, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime", "--json"
    )
    assert done.returncode == 0
    summary = json.loads(done.stdout)
    assert (summary["embedded"], summary["failed"], summary["unchanged"], summary["gone"]) == (3, 1, 0, 0)
    assert "cannot be read: 'empty.jpg': the file is empty" in done.stderr
    again = run_cli("embed", images, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime")
    assert again.returncode == 0
    assert "0 embedded" in again.stdout
    assert "3 already there, 1 failed" in again.stdout
    found = run_cli("search", tmp_path / "s", tmp_path / "s", "-k", "2", "--json", "--html", tmp_path / "page.html")
    assert found.returncode == 0
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


def test_second_run_says_that_there_is_nothing_to_do(run_cli, crops, embedder, bundle_folder, tmp_path):
    embed_folder(crops, tmp_path / "s", embedder)
    done = run_cli("embed", crops, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime")
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path / 's'}: nothing to do, all 40 images are in it\n"


@pytest.mark.parametrize(
    "folder, code, expected",
    [
        ("none", 2, "cannot be listed (No such file or directory)"),
        ("empty", 2, "holds no image"),
        ("bad", 1, "not one of the 2 images"),
    ],
)
def test_unusable_folder_is_one_sentence(run_cli, bundle_folder, tmp_path, folder, code, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a\nb.jpg").touch()
    (tmp_path / "bad/b.jpg").write_text("a letter")
    done = run_cli(
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


def test_too_many_failures_exit_1(run_cli, images, bundle_folder, tmp_path):
    (images / "empty.jpg").touch()
    done = run_cli(
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


def test_unknown_backend_names_the_known(run_cli, images, bundle_folder, tmp_path):
    done = run_cli("embed", images, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "abacus")
    assert_sentence(
        done,
        2,
        "no backend 'abacus': choose auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino, onnxruntime, torch",
    )


def test_path_that_the_system_refuses_is_one_sentence(run_cli, images, tmp_path):
    assert_sentence(run_cli("embed", images, "-o", tmp_path / "s", "--bundle", "n" * 300), 2, "File name too long")
    assert_sentence(run_cli("search", "n" * 300, "n" * 300), 2, "File name too long")


@pytest.mark.parametrize(
    "arguments",
    [("embed",), ("fly",), ("embed", ".", "-o", "s", "--bundle", "b", "--batch", "0"), ("embed", "--fast")],
)
def test_wrong_usage_exits_2_with_the_usage(run_cli, arguments):
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: mgn-deploy" in done.stderr
    assert "Traceback" not in done.stderr


def test_reader_that_leaves_is_no_traceback(crops, images, embedder, tmp_path):
    """Of a result that is printed in several pieces, and of one that waits in the buffer until the end."""
    embed_folder(crops, tmp_path / "large", embedder)
    embed_folder(images, tmp_path / "small", embedder)
    for store in (tmp_path / "large", tmp_path / "small"):
        read, write = os.pipe()
        os.close(read)
        with start("search", store, store, "--json", stdout=write, stderr=subprocess.PIPE) as process:
            os.close(write)
            assert process.stderr.read() == ""
        assert process.returncode in (1, 141)


def test_result_that_cannot_be_written_is_one_sentence(images, embedder, tmp_path):
    embed_folder(images, tmp_path / "s", embedder)
    arguments = ("search", tmp_path / "s", tmp_path / "s", "--json")
    with open("/dev/full", "w") as full, start(*arguments, stdout=full, stderr=subprocess.PIPE) as process:
        assert process.stderr.read() == "mgn-deploy: [Errno 28] No space left on device\n"
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
        while not (tmp_path / "s/shard-00000.npy").exists():
            time.sleep(0.01)
        time.sleep(0.2)  # into the second shard
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130
    assert output == ""
    assert errors.splitlines() == [
        f"interrupted: what was embedded is in {tmp_path / 's'}, and the same command goes on from there"
    ]
    store = Store.open(tmp_path / "s")
    assert 1024 < len(store) < 6000
    last = embedder.embed([many / store.rows[-1].name])[0]
    assert abs(store.embeddings()[-1] - last).max() < 1e-5


# Bundles


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "graph.onnx", "reference.safetensors"])
def test_one_flipped_byte_anywhere_is_refused(bundle, name):
    path = bundle / name
    content = path.read_bytes()
    rng = random.Random(name)
    length = 64 if name == "manifest.sha256" else len(content)  # behind the digits the line holds only a name
    places = [0, length - 1, *(rng.randrange(length) for _ in range(6))]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        sentence = refusal(Embedder.open, bundle, "torch" if name == "reference.safetensors" else "onnxruntime")
        assert "its SHA-256 differs" in sentence
        assert "copy the bundle or export it again" in sentence
    path.write_bytes(content)
    Bundle.open(bundle)


@pytest.mark.parametrize("name", ["graph.onnx", "manifest.json"])
def test_truncated_or_longer_file_is_refused(bundle, name):
    content = (bundle / name).read_bytes()
    for changed in (b"", content[:-1], content + b"\n"):
        (bundle / name).write_bytes(changed)
        assert "its SHA-256 differs" in refusal(Embedder.open, bundle, "onnxruntime")


def test_flipped_byte_in_the_graph_exits_2(run_cli, bundle, images, tmp_path):
    with open(bundle / "graph.onnx", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    done = run_cli("embed", images, "-o", tmp_path / "s", "--bundle", bundle)
    assert_sentence(done, 2, "graph.onnx is not what was exported (its SHA-256 differs)")
    assert not (tmp_path / "s").exists()


def test_bundle_of_a_later_schema_asks_for_an_upgrade(bundle):
    content = json.dumps({**json.loads((bundle / "manifest.json").read_text()), "schema_version": 2, "new": 1}).encode()
    (bundle / "manifest.json").write_bytes(content)
    (bundle / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")
    assert "has schema 2 and this mgn-deploy reads schema 1: upgrade mgn-deploy" in refusal(Embedder.open, bundle)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"schema_version": 1}', b'{"schema_version": 1, "model": 5}', b"\xff"]
)
def test_manifest_of_something_else_with_a_right_hash_is_refused(bundle, content):
    (bundle / "manifest.json").write_bytes(content)
    (bundle / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest())
    assert "manifest.json" in refusal(Embedder.open, bundle)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "graph.onnx"])
def test_bundle_without_a_file_is_refused(bundle, name):
    (bundle / name).unlink()
    assert f"{name}: No such file or directory" in refusal(Embedder.open, bundle, "onnxruntime")


def test_things_in_a_bundles_place(tmp_path, images, embedder):
    (tmp_path / "file").write_text("a letter")
    embed_folder(images, tmp_path / "s", embedder)
    for name in ("none", "file", "images", "s"):
        assert "is not a bundle" in refusal(Bundle.open, tmp_path / name)


def test_bundle_through_a_link(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    assert Embedder.open(tmp_path / "link", "onnxruntime").bundle.id == Bundle.open(bundle).id


def without_reference(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    (bundle / "reference.safetensors").unlink()
    files = {name: entry for name, entry in manifest.files.items() if name != "reference.safetensors"}
    write_manifest(bundle, manifest.model_copy(update={"files": files}))


def test_bundle_without_reference_has_no_torch_and_no_validation(bundle, tmp_path):
    before = Bundle.open(bundle).id
    without_reference(bundle)
    assert Bundle.open(bundle).id == before
    assert "was exported with --no-reference" in refusal(Embedder.open, bundle, "torch")
    for folder in ("query", "bounding_box_test"):
        (tmp_path / "people" / folder).mkdir(parents=True)
        draw_crop(1, 1, 0).save(tmp_path / "people" / folder / "0001_c1s1_000001_00.jpg")
    data = f"market1501:{tmp_path / 'people'}"
    options = {
        "tolerance": 0.5,
        "reference": True,
        "multi_query": None,
        "batch": 8,
        "allow_unproven": False,
        "json": False,
    }
    assert "was exported with --no-reference" in refusal(
        validate, data=data, bundle=bundle, backend="onnxruntime", **options
    )


def unproven(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    failed = {
        name: proof.model_copy(
            update={"passed": False, "worst_cosine": 0.9, "misses": ["worst cosine 0.9 is below 0.9999"]}
        )
        for name, proof in manifest.proofs.items()
    }
    write_manifest(bundle, manifest.model_copy(update={"proofs": failed}))


def test_unproven_bundle_is_refused_unless_allowed(run_cli, bundle, images, tmp_path):
    unproven(bundle)
    arguments = ("embed", images, "-o", tmp_path / "s", "--bundle", bundle, "--backend", "onnxruntime")
    assert_sentence(
        run_cli(*arguments),
        2,
        "is not proven for onnxruntime (worst cosine 0.9 is below 0.9999)",
        "--allow-unproven",
    )
    assert not (tmp_path / "s").exists()
    assert "no backend can run" in refusal(Embedder.open, bundle)
    allowed = run_cli(*arguments, "--allow-unproven", "--json")
    assert json.loads(allowed.stdout)["embedded"] == 3


def test_bundle_without_a_proof_for_the_backend_is_refused(bundle):
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, manifest.model_copy(update={"proofs": {"openvino": manifest.proofs["openvino"]}}))
    assert "has no proof for onnxruntime (proven: openvino)" in refusal(Embedder.open, bundle, "onnxruntime")
    Embedder.open(bundle, "onnxruntime", allow_unproven=True)


def test_the_helps_list_of_backends_is_what_there_is():
    assert BACKENDS.rstrip(".").split(", ") == ["auto", *ENGINES]


def test_a_long_phase_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(console, "LOG_SECONDS", 0)
    console.phase_lines("building")("Building engine", 3, 6)
    assert capsys.readouterr().err == "building: Building engine, 3/6\n"
