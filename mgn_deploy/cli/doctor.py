"""`mgn-deploy doctor`: what this machine can run, and what to install for the rest."""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import mgn_deploy
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.cli.options import Json
from mgn_deploy.console import print_json, print_table
from mgn_deploy.packages import TRAINING_PACKAGES, import_problem

_log = logging.getLogger("mgn_deploy")


def doctor(json: Json = False) -> None:
    """Show what this machine can run, and what to install.

    What cannot run is listed with the reason and the package to install.
    """
    facts, findings = machine_facts(), examine()
    if json:
        print_json({"machine": facts, "parts": [vars(finding) for finding in findings]})
        return
    print_table(
        ["machine", ""],
        [[key, ", ".join(value) or "none" if isinstance(value, list) else str(value)] for key, value in facts.items()],
    )
    print_table(
        ["part", "version", "here"],
        [[one.part, one.version, one.problem or "yes"] for one in findings],
    )


@dataclass(frozen=True)
class Finding:
    """`problem` says why a part is not available and what to install; None where it is."""

    part: str
    version: str
    problem: str | None


def examine() -> list[Finding]:
    """Every backend in the order of `auto`, then the commands that need PyTorch and the exporter. Imports them all."""
    findings = [
        Finding(f"backend {row.name}", installed_version(row.distributions), row.load().missing())
        for row in ENGINES.values()
    ]
    problem = next(filter(None, (import_problem(package, "train") for package in TRAINING_PACKAGES)), None)
    return [*findings, Finding("init, import, train, export, demo", installed_version(("torch",)), problem)]


def machine_facts() -> dict[str, Any]:
    """The machine as far as it bears on inference."""
    from mgn_deploy.machine import cpu_features, cpu_name, usable_cpus

    return {
        "mgn-deploy": mgn_deploy.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "CPU": cpu_name(),
        "CPUs": usable_cpus(),
        "CPU features": cpu_features(),
        "GPUs": nvidia_gpus(),
    }


def nvidia_gpus() -> list[str]:
    """Name, compute capability, memory and driver of each NVIDIA GPU, as nvidia-smi tells; empty without one."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning(f"nvidia-smi did not answer: {error}")
        return []
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def installed_version(distributions: Sequence[str]) -> str:
    """The version of the first of these distributions that is installed; empty where none is."""
    from importlib.metadata import PackageNotFoundError, version

    for name in distributions:
        with suppress(PackageNotFoundError):
            return version(name)
    return ""
