"""Everything that is to be known of a GPU, in one command: `python -m mgn_deploy.bench.gpu --out DIR --minutes 8`.

    facts        machine, limits, packages, tools
    correctness  the kernel and the operator against float64, gradients, the tests marked gpu
    sanitizer    the same under memcheck, initcheck, racecheck and synccheck
    kernel       the heads alone beside PyTorch's
    engines      the engines beside PyTorch eager, in 16 bits and compiled
    embed        image files to a store
    distances, rerank, train-step

Each stage is a process with a time limit; one that fails, hangs or loses the GPU does not stop the next. A package that
is missing is a row. Run again, it goes on with the stages that have not passed. DIR gets suite.json, suite.md (each
claim about GPUs with its target and what was measured) and log.txt. `--device cpu` runs the same code small, in this
process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mgn_deploy.bench.environment import environment, sentence
from mgn_deploy.bench.gpu.claims import judge, markdown
from mgn_deploy.bench.gpu.stages import STAGES, Setup, free
from mgn_deploy.files import atomic_file

_log = logging.getLogger("mgn_deploy")

RESULT, TABLE, LOG = "suite.json", "suite.md", "log.txt"
CANNOT = 2  # exit status where nothing could run


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; 0 where none failed or ran out of time, 1 where one did, 2 where nothing could run."""
    parser = argparse.ArgumentParser(
        prog="python -m mgn_deploy.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; an earlier run there goes on")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole suite (8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, in that order (all)")
    parser.add_argument("--weights", type=Path, help="a weights folder (random weights of the paper's network)")
    parser.add_argument("--again", action="store_true", help="also run what has passed before")
    parser.add_argument("--run-stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    chosen.stages = chosen.stages.split(",")
    if unknown := set(chosen.stages) - set(STAGES):
        parser.error(f"--stages {','.join(sorted(unknown))}: choose from {', '.join(STAGES)}")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: before PyTorch is loaded
    chosen.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * chosen.minutes
    if chosen.run_stage:
        scratch = chosen.scratch or chosen.out
        setup = Setup(chosen.device, scratch, until, chosen.weights)
        return 1 if run_here(chosen.run_stage, setup, chosen.out / f"{chosen.run_stage}.rows") else 0
    with tempfile.TemporaryDirectory(prefix="mgn-deploy-suite-") as scratch:
        result = run(chosen, Path(scratch), until)
    print(markdown(result))
    states = {stage["state"] for stage in result["stages"].values()}
    return CANNOT if states == {"cannot run here"} else 0 if states <= {"passed", "cannot run here"} else 1


def run(chosen: argparse.Namespace, scratch: Path, until: float) -> dict[str, Any]:
    """Run the stages that have not passed; what a stage leaves of its time goes to the later ones."""
    here = environment().model_dump(mode="json")
    result = {"bench": "gpu", "schema_version": 1, "device": chosen.device, "environment": here, "stages": {}}
    before = _earlier(chosen.out / RESULT, result) if not chosen.again else {}
    result["date"] = datetime.date.today().isoformat()
    problem = _device_problem() if chosen.device == "cuda" else None
    waiting = [name for name in chosen.stages if before.get(name, {}).get("state") != "passed"]
    stages = {**before}
    for number, name in enumerate(waiting):
        shares = [STAGES[one][0] for one in waiting[number:]]
        limit = max(0.0, until - time.monotonic()) * shares[0] / sum(shares)
        if problem:
            stages[name] = {"state": "cannot run here", "seconds": 0, "rows": [{"row": name, "left_out": problem}]}
        else:
            stages[name] = _stage(name, chosen, scratch, limit)
        _log.info(f"{name}: {stages[name]['state']}, {len(stages[name]['rows'])} rows")
        result["stages"] = {one: stages[one] for one in STAGES if one in stages}
        _save(chosen.out, result)
    return result if waiting else _save(chosen.out, {**result, "stages": stages})


def _save(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    rows = {name: stage["rows"] for name, stage in result["stages"].items()}
    result["claims"] = judge(rows)
    with atomic_file(out / RESULT) as file:
        file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
    with atomic_file(out / TABLE) as file:
        file.write(markdown(result).encode())
    return result


def _earlier(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The stages of an earlier run of the same code on the same device."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_bytes())
    if all(found[key] == now[key] for key in ("schema_version", "device", "environment")):
        return dict(found["stages"])
    _log.warning(f"{path} is of other code, packages or another machine: all stages are run again")
    return {}


def _device_problem() -> str | None:
    from mgn_deploy.cuda.device import gpu_problem

    problem = gpu_problem()
    if problem is None:
        import torch

        problem = None if torch.cuda.is_available() else "PyTorch sees no GPU (is it a build for the CPU?)"
    return problem


def _stage(name: str, chosen: argparse.Namespace, scratch: Path, limit: float) -> dict[str, Any]:
    start, rows = time.monotonic(), scratch / f"{name}.rows"
    if chosen.device == "cpu":
        failed = run_here(name, Setup("cpu", scratch, start + limit, chosen.weights), rows)
        state = "failed" if failed else "passed"
    else:
        state = _in_process(name, chosen, scratch, limit)
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
    if state == "passed" and all("left_out" in row for row in found):
        state = "cannot run here"
    return {"state": state, "seconds": round(time.monotonic() - start, 1), "rows": found}


def _in_process(name: str, chosen: argparse.Namespace, scratch: Path, limit: float) -> str:
    """Run a stage as a process of its own; past its time and a little more, it and all that it started are ended."""
    command = [sys.executable, "-m", "mgn_deploy.bench.gpu", "--run-stage", name, "--device", chosen.device]
    command += ["--out", str(scratch), "--scratch", str(scratch), "--minutes", f"{limit / 60:.3f}"]
    command += ["--weights", str(chosen.weights.resolve())] if chosen.weights else []
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"), "PYTHONUNBUFFERED": "1"}
    with open(chosen.out / LOG, "ab") as log:
        log.write(f"== {name}\n".encode())
        log.flush()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            return "passed" if process.wait(1.1 * limit + 5) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "out of time"


def run_here(name: str, setup: Setup, path: Path) -> bool:
    """Run a stage in this process, each row written at once; whether something failed."""
    failed = False
    with open(path, "w") as file:
        try:
            for row in STAGES[name][1](setup):
                failed |= "failed" in row
                file.write(json.dumps(row, allow_nan=False, default=str) + "\n")
                file.flush()
        except Exception as error:  # a stage's end: the others are worth having
            missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
            if missing and not missing.startswith("mgn_deploy"):
                row = {"row": name, "left_out": f"{missing} is not installed"}
            else:
                _log.exception(f"stage {name}")
                row, failed = {"row": name, "failed": sentence(error)}, True
            file.write(json.dumps(row) + "\n")
    free()
    return failed


if __name__ == "__main__":
    sys.exit(main())
