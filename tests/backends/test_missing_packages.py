"""Missing packages are a sentence, in processes that cannot import them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.packages import import_problem


def without(*packages: str, program: str, arguments: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process where these packages cannot be imported."""
    hide = f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", hide + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


CLI = "from mgn_deploy.__main__ import main\nmain()\n"


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_missing_engine_is_a_sentence_that_says_what_to_install(bundle_folder, crops, tmp_path, name):
    arguments = ("embed", crops, "-o", tmp_path / "store", "--bundle", bundle_folder, "--backend", name)
    done = without(name, program=CLI, arguments=arguments)
    assert done.returncode == 2
    assert (
        done.stderr == f"mgn-deploy: backend {name} cannot run here: {name} is not installed "
        "(pip install 'mgn-deploy[cpu]')\n"
    )


def test_auto_goes_on_to_the_next_engine_where_one_is_missing(bundle_folder):
    program = (
        "from mgn_deploy.backends.opening import open_backend\nfrom mgn_deploy.bundle.bundle import Bundle\n"
        "print(open_backend(Bundle.open(sys.argv[1])).name)\n"
    )
    done = without("openvino", "torch", program=program, arguments=(bundle_folder,))
    assert (done.stdout, done.returncode) == ("onnxruntime\n", 0), done.stderr


def test_an_edge_box_without_pytorch_embeds(bundle_folder, crops, tmp_path):
    arguments = ("embed", crops, "-o", tmp_path / "store", "--bundle", bundle_folder, "--json")
    done = without("torch", "torchvision", "safetensors", "onnxscript", program=CLI, arguments=arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["embedded"] == 40


def test_help_needs_no_engine():
    done = without(
        "torch",
        "torchvision",
        "openvino",
        "onnxruntime",
        "onnx",
        "safetensors",
        program=CLI,
        arguments=("embed", "--help"),
    )
    assert done.returncode == 0, done.stderr
    assert "--bundle" in done.stdout


def test_doctor_tells_what_is_missing_and_what_is_not():
    done = without("torch", "openvino", program=CLI, arguments=("doctor", "--json"))
    assert done.returncode == 0, done.stderr
    problems = {part["part"]: part["problem"] for part in json.loads(done.stdout)["parts"]}
    for name in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda"):
        assert (problems.pop(f"backend {name}") is None) == (ENGINES[name].load().missing() is None)
    assert problems == {
        "backend openvino": "openvino is not installed (pip install 'mgn-deploy[cpu]')",
        "backend onnxruntime": None,
        "backend torch": "torch is not installed (pip install 'mgn-deploy[train]')",
        "backend torch-cuda": "torch is not installed (pip install 'mgn-deploy[train]')",
        "init, import, train, export, demo": "torch is not installed (pip install 'mgn-deploy[train]')",
    }


def test_export_without_pytorch_is_a_sentence(weights, tmp_path):
    done = without("torch", program=CLI, arguments=("export", weights, "-o", tmp_path / "b"))
    assert done.returncode == 2
    assert "torch is not installed (pip install 'mgn-deploy[train]')" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_package_that_breaks_while_it_loads_is_told_apart_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "brokenpackage.py").write_text("raise OSError('libfoo.so.1: cannot open shared object file')")
    (tmp_path / "halfpackage.py").write_text("import notthere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_problem("brokenpackage", "cpu") == (
        "brokenpackage is installed and cannot be loaded (libfoo.so.1: cannot open shared object file)"
    )
    assert import_problem("halfpackage", "cpu") == (
        "halfpackage is installed and cannot be imported (No module named 'notthere_at_all')"
    )


def test_importing_the_package_imports_neither_torch_nor_an_engine():
    program = (
        "import sys, mgn_deploy, mgn_deploy.backends, mgn_deploy.embedder, mgn_deploy.cli.app\n"
        "print(sorted({'torch', 'torchvision', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_a_signal_after_openvino_was_released_in_another_thread_is_python_s(bundle_folder):
    """OpenVINO's plugin leaves its first thread a signal stack that is unmapped: Ctrl-C would be a SIGSEGV."""
    program = """
import os, signal, sys, threading, time
from mgn_deploy import Embedder
held = [Embedder.open(sys.argv[1], backend="openvino") for _ in range(2)]
release = threading.Thread(target=held.clear)
release.start()
release.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("as ever")
"""
    done = without(program=program, arguments=(bundle_folder,))
    assert (done.returncode, done.stdout) == (0, "as ever\n"), done.stderr
