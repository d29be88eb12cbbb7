"""Everything that needs an NVIDIA GPU, in one command: `python bench/gpu/suite.py --out FOLDER`, from a source tree.

    facts       GPU, driver, tools and Python packages
    tests       every test that is marked gpu, and NVRTC's; suite.json has the counts and why tests were skipped
    sanitizer   memcheck, racecheck and synccheck of the torch operator's tests at a few batch sizes
    bench       `bench/kernel/`, into kernel.json
    engines     `bench/gpu/matrix.py`: precisions x engines, proven and in turns with PyTorch, into engines.json

Each stage is a process with a time limit and a log; a stage that fails does not stop the next one. `suite.json` says
how each ended, after each. mgn-deploy need not be installed: the import name `mgn_deploy` is made of links in a scratch
folder. Needed are PyTorch with CUDA, torchvision, cuda-core, NVRTC, pydantic, typer, rich, pyarrow, onnx, onnxscript,
onnxruntime, pytest, pytest-timeout, hypothesis, safetensors and tensorboard (`facts` names what is missing); what
PYTHONPATH has stays on it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
MINUTES = {"facts": 1.0, "tests": 4.0, "sanitizer": 6.0, "bench": 9.0, "engines": 9.0}
PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "PIL", "pyarrow", "pydantic", "rich", "typer", "safetensors"),
    *("cuda.core", "cuda.bindings", "onnx", "onnxscript", "onnxruntime", "pytest", "pytest_timeout", "hypothesis"),
    *("tensorboard", "tensorrt", "tensorrt_rtx", "pycuda"),
)
PYTEST = (sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-q", "-p", "no:cacheprovider")
# Both layouts in every type, a batch for each path that "auto" takes; embeddings.
_CHOSEN = "(is_the_definition and max and (-2] or -9])) or (cuda_graph and -2-mirror)"
SANITIZED = (str(ROOT / "tests/kernels/test_torch_op.py"), "-m", "gpu", "-k", _CHOSEN)
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
COUNTS = "counts.json"  # of the tests, in the scratch folder
RESULTS = ("passed", "failed", "skipped")
# What `engines` is told of: the options of the same names of `bench/gpu/matrix.py`.
OF_MATRIX = ("weights", "data", "calib", "precisions", "engines")
PATHS = OF_MATRIX[:3]
CANNOT = 2  # exit status of a stage that this machine lacks something for


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen stages; return 0 where every one passed, 2 where none could run here, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--stages", default=",".join(MINUTES), help="which, in that order (all)")
    parser.add_argument("--minutes", type=float, help="of each stage, instead of its own limit")
    parser.add_argument("--run-stage", choices=list(STAGES), help=argparse.SUPPRESS)
    for name in OF_MATRIX:
        parser.add_argument(f"--{name}", help="of the stage engines, as bench/gpu/matrix.py takes it")
    chosen = parser.parse_args(arguments)
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    matrix = matrix_options(chosen)
    if chosen.run_stage:
        return STAGES[chosen.run_stage](out, chosen.minutes or MINUTES[chosen.run_stage], matrix)
    names = chosen.stages.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="mgn-gpu-suite-") as scratch:
        environment = prepare(Path(scratch))
        for name in names:
            minutes = chosen.minutes or MINUTES[name]
            stage = ["--run-stage", name, "--minutes", str(minutes), *matrix]
            command = [sys.executable, __file__, "--out", str(out), *stage]
            print(f"== {name} (at most {minutes:g} minutes)", flush=True)
            results[name] = run_limited(command, environment, Path(scratch), out / f"{name}.log", 60 * minutes)
            counts = Path(scratch) / COUNTS
            if name == "tests" and counts.is_file():
                results[name]["tests"] = json.loads(counts.read_text())
            (out / "suite.json").write_text(json.dumps(results, indent=1) + "\n")
            print(f"{results[name]['state']} after {results[name]['seconds']} s: {results[name]['last']}", flush=True)
    states = {result["state"] for result in results.values()}
    return 0 if states == {"passed"} else 2 if states == {"cannot run here"} else 1


def matrix_options(chosen: argparse.Namespace) -> list[str]:
    """Return those that were given; stages run in another folder, so paths are made absolute."""
    found = []
    for name, value in ((name, getattr(chosen, name)) for name in OF_MATRIX if getattr(chosen, name)):
        kind, colon, path = value.rpartition(":") if name == "data" else ("", "", value)
        found += [f"--{name}", f"{kind}{colon}{Path(path).resolve()}" if name in PATHS else value]
    return found


def prepare(scratch: Path) -> dict[str, str]:
    """Make the environment for the stages: `mgn_deploy` importable as if it were installed, caches in `scratch`."""
    package = scratch / "site" / "mgn_deploy"
    package.mkdir(parents=True)
    for entry in (ROOT / "mgn_deploy").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in ("train", "export", "kernels", "bench"):
        (package / name).symlink_to(ROOT / name)
    path = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }


def run_limited(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path, seconds: float
) -> dict[str, Any]:
    """Run with output into `log`; past the limit the command and all that it started are ended."""
    started = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    states = {0: "passed", CANNOT: "cannot run here", None: "out of time"}
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {
        "state": states.get(code, "failed"),
        "exit": code,
        "seconds": round(time.monotonic() - started, 1),
        "last": lines[-1].strip() if lines else "",
    }


def facts(out: Path, minutes: float, matrix: Sequence[str]) -> int:
    """Write what is here into facts.json; a GPU must be, and the packages that all other stages need."""
    packages = {name: _version(name) for name in PACKAGES}
    tools = {name: shutil.which(name) or _in_cuda(name) for name in ("nvidia-smi", "compute-sanitizer")}
    if tools["nvidia-smi"]:
        subprocess.run([tools["nvidia-smi"]], timeout=30, check=False)
    found = {"python": sys.version, "packages": packages, "tools": tools, "cpus": os.cpu_count()}
    (out / "facts.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if packages["pydantic"] is None or packages["torch"] is None:
        print("torch and pydantic must be importable: put a folder that has them on PYTHONPATH")
        return CANNOT
    return _gpu_or_why()


def tests(out: Path, minutes: float, matrix: Sequence[str]) -> int:
    """Run the tests that need a GPU. Without one pytest still collects them: a file that cannot be imported shows."""
    runs = {
        "marked gpu": run_pytest(*map(str, gpu_test_files()), "-m", "gpu", "--continue-on-collection-errors"),
        "NVRTC": run_pytest(str(ROOT / "tests/kernels/test_kernel_build.py"), "-m", "not slow"),
    }
    Path(COUNTS).write_text(json.dumps(runs))
    print("; ".join(f"{name}: " + ", ".join(f"{run[key]} {key}" for key in RESULTS) for name, run in runs.items()))
    if any(run["exit"] for run in runs.values()):
        return 1
    return _gpu_or_why() or int(runs["marked gpu"]["passed"] == 0)


def gpu_test_files() -> list[Path]:
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]


def sanitizer(out: Path, minutes: float, matrix: Sequence[str]) -> int:
    """Run the kernels' tests under NVIDIA's compute-sanitizer.

    PyTorch allocates each tensor by itself for them: in its blocks of many, an access beyond one's end would not show.
    """
    program = shutil.which("compute-sanitizer") or _in_cuda("compute-sanitizer")
    if program is None:
        print("compute-sanitizer was not found: install the CUDA toolkit, or set CUDA_HOME to where it is")
        return CANNOT
    without = _gpu_or_why()
    if without:
        return without
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = False
    for tool in SANITIZER_TOOLS:
        print(f"== {tool}", flush=True)
        command = [program, "--tool", tool, "--error-exitcode", "9", *PYTEST, *SANITIZED]
        failed |= subprocess.run(command, env=environment, check=False).returncode != 0
    return int(failed)


def bench(out: Path, minutes: float, matrix: Sequence[str]) -> int:
    """Run the kernel's benchmark. It ends by itself: a case takes half a minute at most once its time is up."""
    command = [sys.executable, "-m", "mgn_deploy.bench.kernel", "--out", str(out / "kernel.json")]
    return subprocess.run([*command, "--minutes", str(max(minutes - 1, 0.5))], check=False).returncode


def engines(out: Path, minutes: float, matrix: Sequence[str]) -> int:
    """Run the engines' benchmark. It ends by itself: no row is begun that may not end in time."""
    command = [sys.executable, "-m", "mgn_deploy.bench.gpu.matrix", "--out", str(out / "engines.json"), *matrix]
    command += ["--budget", str(max(60 * minutes - 30, 30))]
    return _gpu_or_why() or subprocess.run(command, check=False).returncode


STAGES = {"facts": facts, "tests": tests, "sanitizer": sanitizer, "bench": bench, "engines": engines}


def run_pytest(*arguments: str) -> dict[str, Any]:
    """Run pytest and count how many tests passed, failed and were skipped, and how many for which reason.

    `exit` is 0 also where there was no test. Where pytest itself broke down there are no counts but an exit status.
    """
    report = Path("tests.xml")
    report.unlink(missing_ok=True)
    code = subprocess.run([*PYTEST, f"--junitxml={report.resolve()}", *arguments], check=False).returncode
    cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    skips = [skip for case in cases if (skip := case.find("skipped")) is not None]
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    # A file that is skipped as a whole has its reason in the text.
    reasons = [str(skip.text if skip.get("message") == "collection skipped" else skip.get("message")) for skip in skips]
    counts = (len(cases) - failed - len(skips), failed, len(skips))
    return {"exit": 0 if code == 5 else code, **dict(zip(RESULTS, counts, strict=True)), "reasons": Counter(reasons)}


def _version(name: str) -> str | None:
    """Its version, "yes" where it tells none, or None."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {error}")
        return None
    return str(getattr(module, "__version__", "yes"))


def _in_cuda(name: str) -> str | None:
    return shutil.which(name, path=Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")


def _gpu_or_why() -> int:
    """0 where there is a GPU, else a line that says why not and the exit status for it."""
    from mgn_deploy.cuda.device import gpu_problem

    problem = gpu_problem()
    if problem:
        print(problem)
    return CANNOT if problem else 0


if __name__ == "__main__":
    sys.exit(main())
