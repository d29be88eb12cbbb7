"""Every command in the environments that people's machines and shells give it.

    python -m tests.trials.environments --out environments.json

Each command runs under all of `ENVIRONMENTS`, several at once, in processes of their own, each on a copy of what it
reads, in a folder whose name is not ASCII. Right is the usual exit code, or 2 with one sentence; for a reader that
leaves (`| head -1`) also 141. A traceback, a host that is asked for, or a file in the current or the home folder, is a
fault.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import typer.main

from mgn_deploy.datasets.drawn import draw_crop, draw_market1501

PORT = 8471
# A working line for every command; W is the folder of the copy.
LINES = {
    "doctor": "",
    "init": "-o W/new --init random --backbone resnet18 --size 96x32 --branches 1",
    "import": "W/public.pth -o W/new",
    "train": "--data market1501:W/people -o W/new --recipe W/recipe.toml",
    "export": "W/weights -o W/new --no-flip",
    "prove": "--bundle W/bundle",
    "embed": "W/photos -o W/new --bundle W/bundle",
    "search": "W/photos W/store --bundle W/bundle --html W/page.html",
    "serve": f"--bundle W/bundle --store W/store --port {PORT}",
    "distmat": "W/store W/store -o W/distances.npy",
    "validate": "--data market1501:W/people --bundle W/bundle --store W/kept",
    "evaluate": "W/store W/store",
    "cluster": "W/store -o W/groups.parquet --html W/groups.html",
    "map": "W/store -o W/map.html",
    "calibrate": "--data market1501:W/people --bundle W/bundle --subset train --bootstrap 20",
    "compare": "W/photos/Ä人.jpg W/photos/2.png --bundle W/bundle",
    "enrol": "Änne W/photos/Ä人.jpg --people W/enrolled --bundle W/bundle",
    "identify": "W/photos --people W/enrolled --bundle W/bundle",
    "bench run": "W/bundle --count 8 --batch 1 --minutes 0.05 --out W/new",
    "bench compare": "W/bench W/bench",
    "people list": "--people W/enrolled",
    "people rename": "Émile Ömer --people W/enrolled",
    "people remove": "Émile --people W/enrolled",
    "index build": "W/store -o W/index",
    "store info": "W/store",
    "store verify": "W/store",
    "store repair": "W/store",
    "store prune": "W/store W/few",
    "store relocate": "W/store W/people/bounding_box_train",
    "store merge": "W/part-1 W/part-2 -o W/new",
    "store pool-tracks": "W/boxes -o W/new",
    "store compact": "W/store",
    "store export": "W/store -o W/rows.csv",
    "figures calibration": "--bundle W/bundle -o W/calibration.png",
    "figures curves": "W/run -o W/curves.png",
    "figures attention": "W/weights W/photos -o W/attention.png",
    "demo": "-o W/demo --seconds 1",
}


@dataclass(frozen=True)
class Environment:
    """How a command is run.

    Attributes:
        before: what the shell does first.
        prefix: the program that starts it.
        after: redirections.
        codes: exit codes that are right besides the usual one.
        change: what becomes of the variables; None: removed.
        read_only: the current and the home folder are.
        folder: how the name begins of the folder that everything is in.
    """

    before: str = ""
    prefix: str = ""
    after: str = ""
    codes: tuple[int, ...] = ()
    change: dict[str, str | None] = field(default_factory=dict)
    read_only: bool = False
    folder: str = "Ä 人 "

    def __add__(self, other: Environment) -> Environment:
        """Both at once."""
        return Environment(
            f"{self.before} {other.before}",
            f"{self.prefix} {other.prefix}",
            f"{self.after} {other.after}",
            self.codes + other.codes,
            {**self.change, **other.change},
            self.read_only or other.read_only,
            other.folder,
        )


# Root writes where it may not, unless these two capabilities are taken from it.
AS_A_USER = "setpriv --bounding-set=-dac_override,-dac_read_search" if os.geteuid() == 0 else ""
ENVIRONMENTS = {
    "64 open files": Environment(before="ulimit -n 64;", codes=(2,)),
    "no HOME": Environment(codes=(2,), change={"HOME": None}),
    "HOME and current folder read-only": Environment(prefix=AS_A_USER, codes=(2,), read_only=True),
    "LANG=C": Environment(codes=(2,), change={"LANG": "C", "LC_ALL": "C"}),
    "stdout closed": Environment(after=">&-"),
    "stderr closed": Environment(after="2>&-"),
    "| head -1": Environment(after="--json | head -1; exit ${PIPESTATUS[0]}", codes=(141,)),
    "a folder whose name is no UTF-8": Environment(
        folder=os.fsdecode(b"M\xe4rz "), change={"PYTHONIOENCODING": "utf-8:strict"}
    ),
}
# What is tried at once; where that is wrong, each of them by itself.
TOGETHER = (
    ("64 open files", "no HOME", "LANG=C", "stdout closed"),
    ("HOME and current folder read-only", "stderr closed"),
    ("| head -1",),
    ("a folder whose name is no UTF-8",),
)


@dataclass(frozen=True)
class Done:
    """How a command ended, and the files that appeared where nothing was to be written."""

    code: int
    output: str
    stray: list[str]


def run(words: str, environment: Environment, made: Path, work: Path) -> Done:
    """Run a command on a copy of `made`."""
    from tests.hostile import NO_RESOLVER

    with tempfile.TemporaryDirectory(prefix=environment.folder, dir=work) as top:
        copy, home, current = (Path(top) / name for name in ("W", "home", "current"))
        shutil.copytree(made, copy, symlinks=True)
        for folder in (home, current):
            folder.mkdir(mode=0o555 if environment.read_only else 0o755)
        variables = {**os.environ, "HOME": str(home)}
        site = Path(top) / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(NO_RESOLVER)
        variables["PYTHONPATH"] = str(site)
        variables.pop("XDG_CACHE_HOME", None)
        for name, value in environment.change.items():
            variables.pop(name, None)
            variables.update({name: value} if value is not None else {})
        arguments = [word.replace("W/", f"{copy}/") for word in LINES[words].split()]
        shell = f'{environment.before} {environment.prefix} "$@" {environment.after}'
        with subprocess.Popen(
            ["bash", "-c", shell, "-", sys.executable, "-m", "mgn_deploy", *words.split(), *arguments],
            cwd=current,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            if words == "serve":
                stop_once_it_answers(process)
            output, _ = process.communicate(timeout=500)
        stray = [str(path.relative_to(top)) for folder in (home, current) for path in folder.rglob("*")]
        return Done(process.returncode, output.decode(errors="replace"), [name for name in stray if unasked(name)])


def unasked(name: str) -> bool:
    """Whether a file in the home folder is none of the cache that the documentation names."""
    return name != "home/.cache" and not name.startswith("home/.cache/mgn-deploy")


def stop_once_it_answers(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM for a server that listens."""
    for _ in range(600):
        with socket.socket() as client:
            if process.poll() is not None:
                return
            if client.connect_ex(("127.0.0.1", PORT)) == 0:
                break
        time.sleep(0.1)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() or [process.pid]:
        os.kill(int(child), signal.SIGTERM)


def fault(done: Done, environment: Environment) -> str | None:
    """What is wrong with an end, or None."""
    if "Traceback" in done.output:
        return "a traceback"
    if "a host was asked for" in done.output:
        return "a host was asked for"
    if done.stray:
        return f"files that nobody asked for: {', '.join(done.stray)}"
    return None if done.code in (0, *environment.codes) else f"ended with {done.code}"


def commands() -> list[str]:
    """The words of every command of the app."""
    from mgn_deploy.cli.app import app

    def walk(command: object, words: tuple[str, ...]) -> list[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return [" ".join(words)]
        return [found for name in inner for found in walk(inner[name], (*words, name))]

    return walk(typer.main.get_command(app), ())


def make(folder: Path) -> None:
    """Everything that the lines read."""
    import torch
    from typer.testing import CliRunner

    from mgn_deploy.cli.app import app
    from tests.trials.small import RECIPE, export_small

    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
    from public_mgns import FastReid, randomise

    def call(line: str) -> None:
        done = CliRunner().invoke(app, [word.replace("W/", f"{folder}/") for word in line.split()])
        if done.exit_code:
            raise SystemExit(f"{line}: {done.output}")

    folder.mkdir(parents=True)
    torch.save({"model": randomise(FastReid(1, reduced=16)).state_dict()}, folder / "public.pth")
    export_small(folder / "weights", folder / "bundle")
    draw_market1501(folder / "people", train_identities=24, test_identities=8)
    (folder / "recipe.toml").write_text(RECIPE)
    for name in ("photos", "few", "frames"):
        (folder / name).mkdir()
    for number, name in enumerate(("Ä人.jpg", "2.png", "b c.jpg")):
        draw_crop(number + 1, 1, 0).save(folder / "photos" / name)
    draw_crop(1, 1, 0).save(folder / "frames/000001.png")
    (folder / "gt.txt").write_text("1,1,1,1,30,60,1\n1,2,5,5,30,60,1\n")
    call("calibrate --data market1501:W/people --bundle W/bundle --subset train --bootstrap 20")
    call("embed W/people/bounding_box_train -o W/store --bundle W/bundle --labels market1501")
    for path in sorted((folder / "people/bounding_box_train").iterdir())[::3]:
        shutil.copy(path, folder / "few")
    for part in (1, 2):
        call(f"embed W/few -o W/part-{part} --bundle W/bundle --shard {part}/2")
    call("embed W/frames --boxes W/gt.txt -o W/boxes --bundle W/bundle")
    call("enrol Émile W/photos --people W/enrolled --bundle W/bundle")
    call("bench run W/bundle --count 8 --batch 1 --minutes 0.05 --out W/bench")
    call("train --data market1501:W/people -o W/run --recipe W/recipe.toml")


def main() -> None:
    """Run every command in every environment, and print, and write, what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=LINES, default=[*LINES], help="commands")
    parser.add_argument("--made", type=Path, help="where what the commands read is kept for the next time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if wrong := set(commands()) ^ set(LINES):
        raise SystemExit(f"LINES and the commands differ by {sorted(wrong)}")
    faults, runs = [], 0
    with tempfile.TemporaryDirectory(prefix="mgn-environments-") as top:
        made = options.made or Path(top) / "made"
        if not made.exists():
            make(made)

        def tried(words: str, names: tuple[str, ...]) -> str | None:
            nonlocal runs
            runs += 1
            environment = sum((ENVIRONMENTS[name] for name in names), Environment())
            done = run(words, environment, made, Path(top))
            problem = fault(done, environment)
            shown = done.output[-3000:] if problem else done.output[-300:] if done.code == 2 else ""
            print(f"{words}; {', '.join(names) or 'usual'}: {done.code} {problem or ''}\n{shown}".strip(), flush=True)
            return problem

        for words in options.only:
            for names in TOGETHER:
                if (problem := tried(words, names)) and len(names) > 1:
                    alone = {name: tried(words, (name,)) for name in names}
                    faults += [(words, name, found) for name, found in alone.items() if found] or [
                        (words, " and ".join(names), problem)
                    ]
                elif problem:
                    faults.append((words, names[0], problem))
    print(f"{len(options.only)} commands in {len(ENVIRONMENTS)} environments, {runs} runs, {len(faults)} faults")
    if options.out:
        options.out.write_text(json.dumps({"runs": runs, "faults": faults}, indent=2) + "\n")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
