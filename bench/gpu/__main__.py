"""Everything that is to be known of a GPU, in one command: `python -m mgn_deploy.bench.gpu --out DIR --minutes 8`.

Each stage is a process with a time limit; one that fails, hangs or loses the GPU does not stop the next. A package that
is missing is a row. Run again, it goes on with the stages that have not passed. DIR gets suite.json, suite.md (each
claim about GPUs with its target and what was measured) and log.txt. `--device cpu` runs the same code small, in this
process. docs/how-to/gpu-suite.md says what the stages do.
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
from mgn_deploy.bench.gpu.stages import STAGES, Setup
from mgn_deploy.console import in_one_sentence
from mgn_deploy.files import write_text

_log = logging.getLogger("mgn_deploy")

RESULT, TABLE, LOG = "suite.json", "suite.md", "log.txt"
CANNOT = 2  # exit status where nothing could run


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; 0 where none failed or ran out of time, 1 where one did, 2 where nothing could run."""
    parser = argparse.ArgumentParser(prog="python -m mgn_deploy.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; an earlier run there goes on")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole suite (8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, in that order (all)")
    parser.add_argument("--weights", type=Path, help="a weights folder (random weights of the paper's network)")
    parser.add_argument("--again", action="store_true", help="also run what has passed before")
    parser.add_argument("--run-stage", choices=list(STAGES), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    chosen.stages = chosen.stages.split(",")
    if unknown := set(chosen.stages) - set(STAGES):
        parser.error(f"--stages {','.join(sorted(unknown))}: choose from {', '.join(STAGES)}")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: before PyTorch is loaded
    if chosen.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is loaded
    chosen.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * chosen.minutes
    if chosen.run_stage:
        setup = Setup(chosen.device, chosen.out, until, chosen.weights)
        return 1 if run_here(chosen.run_stage, setup, chosen.out / f"{chosen.run_stage}.rows") else 0
    with tempfile.TemporaryDirectory(prefix="mgn-deploy-suite-") as scratch:
        result = run(chosen, Path(scratch), until)
    print(markdown(result))
    states = {stage["state"] for stage in result["stages"].values()}
    return CANNOT if states == {"cannot run here"} else 0 if states <= {"passed", "cannot run here"} else 1


def run(chosen: argparse.Namespace, scratch: Path, until: float) -> dict[str, Any]:
    """Run the stages that have not passed; what a stage leaves of its time goes to the later ones."""
    same = {"bench": "gpu", "schema_version": 1, "device": chosen.device}
    same["environment"] = environment().model_dump(mode="json")
    stages = {} if chosen.again else _earlier(chosen.out / RESULT, same)
    waiting = [name for name in chosen.stages if stages.get(name, {}).get("state") != "passed"]
    problem = _device_problem() if chosen.device == "cuda" else None
    result: dict[str, Any] = {**same, "date": datetime.date.today().isoformat()}
    for number, name in enumerate([*waiting, None]):
        result["stages"] = {one: stages[one] for one in STAGES if one in stages}
        result["claims"] = judge({one: stage["rows"] for one, stage in result["stages"].items()})
        write_text(chosen.out / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
        write_text(chosen.out / TABLE, markdown(result))
        if name and problem:
            stages[name] = {"state": "cannot run here", "seconds": 0, "rows": [{"row": name, "left_out": problem}]}
        elif name:
            shares = [STAGES[one][0] for one in waiting[number:]]
            stages[name] = _stage(name, chosen, scratch, max(0.0, until - time.monotonic()) * shares[0] / sum(shares))
            _log.info(f"{name}: {stages[name]['state']}, {len(stages[name]['rows'])} rows")
    return result


def _earlier(path: Path, same: dict[str, Any]) -> dict[str, Any]:
    """The stages of an earlier run of the same code on the same device."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_bytes())
    if same.items() <= found.items():
        return dict(found["stages"])
    _log.warning(f"{path} is of other code, packages or another machine: all stages are run again")
    return {}


def _device_problem() -> str | None:
    import torch

    from mgn_deploy.cuda.device import gpu_problem

    unseen = None if torch.cuda.is_available() else "PyTorch sees no GPU (is it a build for the CPU?)"
    return gpu_problem() or unseen


def _stage(name: str, chosen: argparse.Namespace, scratch: Path, limit: float) -> dict[str, Any]:
    start, rows = time.monotonic(), scratch / f"{name}.rows"
    if chosen.device == "cpu":
        state = "failed" if run_here(name, Setup("cpu", scratch, start + limit, chosen.weights), rows) else "passed"
    else:
        state = _in_process(name, chosen, scratch, limit)
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
    if state == "passed" and all("left_out" in row for row in found):
        state = "cannot run here"
    return {"state": state, "seconds": round(time.monotonic() - start, 1), "rows": found}


def _in_process(name: str, chosen: argparse.Namespace, scratch: Path, limit: float) -> str:
    """Run a stage as a process of its own; past its time and a little more, it and all that it started are ended."""
    command = [sys.executable, "-m", "mgn_deploy.bench.gpu", "--run-stage", name, "--device", chosen.device]
    command += ["--out", str(scratch), "--minutes", f"{limit / 60:.3f}"]
    command += ["--weights", str(chosen.weights.resolve())] if chosen.weights else []
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"), "PYTHONUNBUFFERED": "1"}
    with open(chosen.out / LOG, "ab") as log:
        log.write(f"== {name}\n".encode())
        log.flush()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            return "passed" if process.wait(1.1 * limit + 5) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:  # also of Ctrl-C, which does not reach another session
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


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
    return failed


if __name__ == "__main__":
    with in_one_sentence():
        sys.exit(main())
