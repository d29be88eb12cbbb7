"""Random kills: a command is killed at random moments, run again, and has to end with what an undisturbed run wrote.

    python -m tests.trials.kills --kills 300 --out kills.json

Commands that write folders (`export`, `init`) and stores (`embed`, `store prune`, `store compact`,
`validate --store`) are started in processes of their own on drawn people, killed by SIGKILL after a random
share of the time that they take, and started again until they end. Then every file of their result is compared byte
for byte with that of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mgn_deploy.datasets.drawn import draw_market1501


@dataclass(frozen=True)
class Trial:
    """A command to kill.

    Attributes:
        name: of the command.
        arguments: of `mgn-deploy`, {out} is where it writes.
        prepare: what puts a folder where the command finds it, called with `out`.
    """

    name: str
    arguments: str
    prepare: Callable[[Path], None] = lambda out: None


def run(arguments: list[str], kill_after: float | None = None) -> bool:
    """Run mgn-deploy; whether it ended before it was killed."""
    command = [sys.executable, "-m", "mgn_deploy", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return False
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {errors}")
    return True


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but a store's lock and a killed run's leftover, which a later run removes after an hour."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock" and not path.relative_to(folder).parts[0].startswith(".mgn-")
    }


def trials(work: Path) -> list[Trial]:
    """The commands, on a bundle and people that are made here."""
    run(f"init -o {work}/weights --init random --backbone resnet18 --size 96x32".split())
    run(f"export {work}/weights -o {work}/bundle --no-flip".split())
    draw_market1501(work / "people", train_identities=40, test_identities=12)
    images = work / "people/bounding_box_train"
    run(f"embed {images} -o {work}/store --bundle {work}/bundle".split())
    few = work / "few"
    few.mkdir()
    for path in sorted(images.iterdir())[::3]:
        (few / path.name).symlink_to(path)

    def copied(out: Path) -> None:
        shutil.copytree(work / "store", out / "store")

    return [
        Trial("init", "init -o {out}/weights --init random --backbone resnet18 --size 96x32"),
        Trial("embed", f"embed {images} -o {{out}}/store --bundle {work}/bundle"),
        Trial("validate", f"validate --data market1501:{work}/people --bundle {work}/bundle --store {{out}}/kept"),
        Trial("store prune", f"store prune {{out}}/store {few}", copied),
        Trial("store compact", "store compact {out}/store", copied),
        Trial("export", f"export {work}/weights -o {{out}}/bundle --no-flip --no-reference"),
    ]


def one_end(trial: Trial, work: Path, seconds: float, expected: dict[str, str], rng: random.Random) -> tuple[int, bool]:
    """Run a command with kills until it ends; how many kills it took, and whether the end is the expected one."""
    out = Path(tempfile.mkdtemp(dir=work, prefix="run-"))
    trial.prepare(out)
    kills = 0
    while not run(trial.arguments.format(out=out).split(), None if kills >= 3 else rng.uniform(0.2, 1.0) * seconds):
        kills += 1
    same = contents(out) == expected
    if same:
        shutil.rmtree(out)
    return kills, same


def main() -> None:
    """Run the trials and print, and write, what was killed and what differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    work = Path(tempfile.mkdtemp(prefix="mgn-kills-"))
    table: dict[str, dict[str, int]] = {}
    all_trials = trials(work)
    undisturbed = {}
    for trial in all_trials:
        out = Path(tempfile.mkdtemp(dir=work, prefix="whole-"))
        trial.prepare(out)
        start = time.monotonic()
        run(trial.arguments.format(out=out).split())
        undisturbed[trial.name] = (time.monotonic() - start, contents(out))
        table[trial.name] = {"kills": 0, "ends": 0, "different": 0}
    while sum(row["kills"] for row in table.values()) < options.kills:
        for trial in all_trials:
            kills, same = one_end(trial, work, *undisturbed[trial.name], rng)
            row = table[trial.name]
            row["kills"] += kills
            row["ends"] += 1
            row["different"] += not same
            print(trial.name, row, flush=True)
    if options.out:
        options.out.write_text(json.dumps(table, indent=2) + "\n")
    different = sum(row["different"] for row in table.values())
    print(json.dumps(table, indent=2))
    if different:
        raise SystemExit(f"{different} runs ended differently: they are in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
