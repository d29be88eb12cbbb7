"""Random kills: a command is killed at random moments, run again, and has to end with what an undisturbed run wrote.

    python -m tests.trials.kills --kills 300 --out kills.json

Commands that write folders, files and stores run on a very small model and drawn people. Each is ended by SIGKILL or
SIGTERM after a random share of the time that it takes, and started again until it ends. Then every file of its result
is compared byte for byte with that of a run that nobody killed. Processes are forked from one that has imported the
engines, so that what is killed is work and no import.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mgn_deploy.datasets.drawn import draw_market1501
from tests.trials.small import RECIPE, export_small

IMPORTED = (
    "mgn_deploy.__main__ mgn_deploy.cli.app mgn_deploy.train.run mgn_deploy.train.trainer mgn_deploy.export.exporter "
    "mgn_deploy.gallery.embed mgn_deploy.backends.openvino onnxruntime onnx torchvision pandas pyarrow.parquet faiss"
)
KILLS_A_RUN = 3


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
    prepare: Callable[[Path], object] = lambda out: None


def command_line(arguments: list[str], errors: str) -> None:
    """In a forked process: `mgn-deploy` with its stdout dropped and its stderr in the file `errors`."""
    from mgn_deploy.__main__ import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = ["mgn-deploy", *arguments]
    main()


def run(arguments: str, kill: tuple[signal.Signals, float] | None = None, log: Path | None = None) -> bool:
    """Run mgn-deploy; whether it ended before the signal that it is sent after so many seconds.

    `log` gets what it said on stderr, after that of earlier runs.
    """
    with tempfile.NamedTemporaryFile() as errors:
        process = multiprocessing.get_context("forkserver").Process(
            target=command_line, args=(arguments.split(), errors.name)
        )
        process.start()
        if kill:
            process.join(kill[1])
            if process.exitcode is None:
                os.kill(process.pid or 0, kill[0])
        process.join(300)
        if log:
            with log.open("a") as file:
                file.write(f"{arguments}: {kill}, ended with {process.exitcode}\n{Path(errors.name).read_text()}\n")
        allowed = (0, -kill[0], 128 + kill[0]) if kill else (0,)
        if process.exitcode not in allowed:
            process.kill()
            sent = f"{kill[0].name} after {kill[1]:.2f} s" if kill else "no signal"
            raise SystemExit(f"{arguments}: {sent}, ended with {process.exitcode}: {Path(errors.name).read_text()}")
        return process.exitcode == 0


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a result.

    Not of a store's lock, of what a run keeps for going on, and of a killed run's leftovers, which a later run removes
    after an hour; without the times and speeds that epochs.csv holds, and a calibration's date.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name in (".lock", "last.pt") or re.search(r"(^|/)(\.mgn-|tensorboard/)", name):
            continue
        content = path.read_bytes()
        if path.name == "epochs.csv":
            content = b"\n".join(
                re.sub(rb",[^,]*,(.*),[^,]*(,[^,]*,[^,]*)$", rb",\1\2", row) for row in content.split()
            )
        if path.name == "calibration.json":
            content = re.sub(rb'"date": ?"[^"]*"', b"", content)
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def trials(work: Path) -> list[Trial]:
    """The commands, on a bundle and people that are made here."""
    bundle, people, store = work / "bundle", work / "people", work / "store"
    export_small(work / "weights", bundle)
    draw_market1501(people, train_identities=24, test_identities=8)
    recipe = work / "recipe.toml"
    recipe.write_text(RECIPE)
    images = people / "bounding_box_train"
    run(f"embed {images} -o {store} --bundle {bundle}")
    for part in (1, 2):
        run(f"embed {images} -o {work}/part-{part} --bundle {bundle} --shard {part}/2")
    few = work / "few"
    few.mkdir()
    for path in sorted(images.iterdir())[::3]:
        (few / path.name).symlink_to(path)

    def copied(out: Path) -> None:
        shutil.copytree(store, out / "store")

    return [
        Trial("init", "init -o {out}/weights --init random --backbone resnet18 --size 96x32 --branches 1"),
        Trial("train", f"train --data market1501:{people} -o {{out}}/run --recipe {recipe}"),
        Trial("export", f"export {work}/weights -o {{out}}/bundle --no-flip"),
        Trial("embed", f"embed {images} -o {{out}}/store --bundle {bundle}"),
        Trial("validate", f"validate --data market1501:{people} --bundle {bundle} --store {{out}}/kept"),
        Trial(
            "calibrate",
            f"calibrate --data market1501:{people} --bundle {{out}}/bundle --subset train --bootstrap 20",
            lambda out: shutil.copytree(bundle, out / "bundle"),
        ),
        Trial("cluster", f"cluster {store} -o {{out}}/groups.parquet"),
        Trial("index build", f"index build {store} -o {{out}}/index"),
        Trial("store merge", f"store merge {work}/part-1 {work}/part-2 -o {{out}}/store"),
        Trial("store prune", f"store prune {{out}}/store {few}", copied),
        Trial("store compact", "store compact {out}/store", copied),
        Trial("store export", f"store export {store} -o {{out}}/rows.csv"),
    ]


class Row:
    """What became of one command: its time, its result when nobody killed it, and what was counted."""

    def __init__(self, trial: Trial, work: Path) -> None:
        self.trial, self.out, self.log = trial, work / "out", work / "out.log"
        self.seconds, self.counts = 1.0, Counter[str]()
        self.until_it_ends([])
        self.expected = contents(self.out)
        shutil.rmtree(self.out)

    @property
    def kills(self) -> int:
        """Of either signal."""
        return self.counts["SIGKILL"] + self.counts["SIGTERM"]

    def until_it_ends(self, kills: list[tuple[signal.Signals, float]]) -> None:
        """Run it once for each kill until it ends, at last without one."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        self.out.mkdir()
        self.trial.prepare(self.out)
        for kill in [*kills, None]:
            start = time.monotonic()
            ended = run(self.trial.arguments.format(out=self.out), kill, self.log)
            if ended:
                if not kill:
                    self.seconds = time.monotonic() - start
                return
            assert kill
            self.counts[kill[0].name] += 1

    def once(self, rng: random.Random) -> None:
        """A run with random kills, and the comparison."""
        signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
        self.until_it_ends([(rng.choice(signals), rng.uniform(0, 1) * self.seconds) for _ in range(KILLS_A_RUN)])
        self.counts["ends"] += 1
        if contents(self.out) != self.expected:
            self.counts["different"] += 1
            different = self.out.with_name(f"different-{self.trial.name}-{self.counts['ends']}")
            self.out.rename(different)
            self.log.rename(different.with_suffix(".log"))


def main() -> None:
    """Run the trials and print, and write, what was killed and what differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the name of one command")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before PyTorch is loaded
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED.split())
    rng = random.Random(options.seed)
    work = Path(tempfile.mkdtemp(prefix="mgn-kills-"))
    rows = [Row(trial, work) for trial in trials(work) if options.only in (None, trial.name)]
    while sum(row.kills for row in rows) < options.kills:
        row = min(rows, key=lambda row: row.kills)
        row.once(rng)
        print(f"{row.trial.name}: {dict(row.counts)}", flush=True)
    table = {row.trial.name: dict(row.counts) for row in rows}
    print(json.dumps(table, indent=2))
    if options.out:
        options.out.write_text(json.dumps(table, indent=2) + "\n")
    if different := sum(row.counts["different"] for row in rows):
        raise SystemExit(f"{different} runs ended differently: they are in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
