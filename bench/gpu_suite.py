"""Everything that needs an NVIDIA GPU, in one command: `python bench/gpu_suite.py --out FOLDER`, from a source tree.

    facts       GPU, driver, tools and Python packages
    tests       every test that is marked gpu, and the C example
    sanitizer   memcheck and racecheck of the C example, and of the kernel's tests at a few batch sizes
    bench       `bench/kernel.py`, into kernel.json
    tensorrt    where TensorRT-RTX is installed: export, prove and bench a ResNet-50 MGN

Each stage is a process with a time limit and a log; a stage that fails does not stop the next one. `suite.json` says how
each ended, after each. Nothing has to be installed: the import name `mgn_deploy` is made of links in a scratch folder.
Needed are PyTorch with CUDA, torchvision, cuda-core, NVRTC, pydantic, typer, rich, pyarrow, onnx, onnxruntime, pytest,
pytest-timeout, hypothesis and safetensors (`facts` names what is missing); what PYTHONPATH has stays on it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINUTES = {"facts": 1.0, "tests": 4.0, "sanitizer": 4.0, "bench": 9.0, "tensorrt": 5.0}
PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "PIL", "pyarrow", "pydantic", "rich", "typer", "safetensors"),
    *("cuda.core", "cuda.bindings", "onnx", "onnxruntime", "pytest", "pytest_timeout", "hypothesis"),
    *("tensorrt", "tensorrt_rtx", "pycuda"),
)
CANNOT = 2  # exit status of a stage that this machine lacks something for


def main(arguments: list[str] | None = None) -> int:
    """0 where every chosen stage passed, 2 where none could run here, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--stages", default=",".join(MINUTES), help="which, in that order (all)")
    parser.add_argument("--minutes", type=float, help="of each stage, instead of its own limit")
    parser.add_argument("--run-stage", choices=list(STAGES), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if chosen.run_stage:
        return STAGES[chosen.run_stage](out, chosen.minutes or MINUTES[chosen.run_stage])
    names = chosen.stages.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="mgn-gpu-suite-") as scratch:
        environment = prepare(Path(scratch))
        for name in names:
            minutes = chosen.minutes or MINUTES[name]
            command = [sys.executable, __file__, "--out", str(out), "--run-stage", name, "--minutes", str(minutes)]
            print(f"== {name} (at most {minutes:g} minutes)", flush=True)
            results[name] = run_limited(command, environment, Path(scratch), out / f"{name}.log", 60 * minutes)
            (out / "suite.json").write_text(json.dumps(results, indent=1) + "\n")
            print(f"{results[name]['state']} after {results[name]['seconds']} s: {results[name]['last']}", flush=True)
    states = {result["state"] for result in results.values()}
    return 0 if states == {"passed"} else 2 if states == {"cannot run here"} else 1


def prepare(scratch: Path) -> dict[str, str]:
    """The environment for the stages: `mgn_deploy` importable as if it were installed, caches in `scratch`."""
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
) -> dict[str, object]:
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


def facts(out: Path, minutes: float) -> int:
    """What is here, into facts.json; a GPU must be, and the packages without which the other stages cannot start."""
    packages = {name: _version(name) for name in PACKAGES}
    tools = {name: shutil.which(name) or _in_cuda(name) for name in ("nvidia-smi", "nvcc", "compute-sanitizer")}
    for tool, arguments in (("nvidia-smi", []), ("nvcc", ["--version"])):
        if tools[tool]:
            subprocess.run([str(tools[tool]), *arguments], timeout=30, check=False)
    found = {"python": sys.version, "packages": packages, "tools": tools, "cpus": os.cpu_count()}
    (out / "facts.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if packages["pydantic"] is None or packages["torch"] is None:
        print("torch and pydantic must be importable: put a folder that has them on PYTHONPATH")
        return CANNOT
    return _gpu_or_why()


def tests(out: Path, minutes: float) -> int:
    """Also without a GPU pytest has to collect them all: a test file that cannot be imported shows."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    code = _pytest(*map(str, files), "-m", "gpu", "--continue-on-collection-errors")
    example = _pytest(str(ROOT / "tests/test_kernel_build.py"), "-k", "example or nvrtc")
    return code or example or _gpu_or_why()


def sanitizer(out: Path, minutes: float) -> int:
    tool, nvcc = (shutil.which(name) or _in_cuda(name) for name in ("compute-sanitizer", "nvcc"))
    if tool is None or nvcc is None:
        print(f"compute-sanitizer is {tool}, nvcc is {nvcc}: both are needed")
        return CANNOT
    without = _gpu_or_why()
    if without:
        return without
    example = Path.cwd() / "example"
    sources = [str(ROOT / "kernels" / name) for name in ("example.cu", "stripe_pool_reduce.cu")]
    subprocess.run([nvcc, "-std=c++17", "-arch=native", "-lineinfo", "-o", str(example), *sources], check=True)
    few = [
        "-m",
        "pytest",
        "-c",
        str(ROOT / "pyproject.toml"),
        str(ROOT / "tests/test_torch_op.py"),
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    few += ["-m", "gpu", "-k", "definition and max-True and (-2] or -9])"]
    worst = 0
    for check in ("memcheck", "racecheck"):
        for what in ([str(example)], [sys.executable, *few]):
            print(f"== {check} of {' '.join(what)}", flush=True)
            command = [tool, "--tool", check, "--error-exitcode", "9", *what]
            worst = max(worst, abs(subprocess.run(command, check=False).returncode))
    return 1 if worst else 0


def bench(out: Path, minutes: float) -> int:
    """Ends by itself: a case takes half a minute at most once its time is up."""
    command = [
        "-m",
        "mgn_deploy.bench.kernel",
        "--out",
        str(out / "kernel.json"),
        "--minutes",
        str(max(minutes - 1, 0.5)),
    ]
    return subprocess.run([sys.executable, *command], check=False).returncode


def tensorrt(out: Path, minutes: float) -> int:
    if _version("tensorrt_rtx") is None:
        print("TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13")
        return CANNOT
    without = _gpu_or_why()
    if without:
        return without
    steps = [["init", "-o", "weights", "--init", "random"]]
    engine = ["--precision", "fp16", "--engine", "tensorrt-rtx", "--batch", "1,32,64"]
    for heads in ("plain", "fused"):
        steps += [["export", "weights", "-o", heads, "--heads", heads, *engine], ["prove", heads, "--json"]]
    for batch, heads in product(("1", "64"), ("plain", "fused")):
        steps.append(
            ["bench", "--bundle", heads, "--backend", "tensorrt-rtx", "--batch", batch, "--count", "256", "--json"]
        )
    for step in steps:
        print(f"== mgn-deploy {' '.join(step)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "mgn_deploy", *step], check=False).returncode
        if code:
            return code
    return 0


STAGES = {"facts": facts, "tests": tests, "sanitizer": sanitizer, "bench": bench, "tensorrt": tensorrt}


def _pytest(*arguments: str) -> int:
    """0 also where no test was chosen."""
    options = ["-c", str(ROOT / "pyproject.toml"), "-q", "-p", "no:cacheprovider"]
    code = subprocess.run([sys.executable, "-m", "pytest", *options, *arguments], check=False).returncode
    return 0 if code in (0, 5) else 1


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
    from mgn_deploy.gpu import gpu_problem

    problem = gpu_problem()
    if problem:
        print(problem)
    return CANNOT if problem else 0


if __name__ == "__main__":
    sys.exit(main())
