"""Every command in the environments that people's machines and shells give it.

    python -m tests.trials.environments --out environments.json

Each command runs as in a usual shell and then under each of `ENVIRONMENTS`, in processes of their own, each on a copy
of what it reads, in a folder whose name is no ASCII. Right is the usual exit code, or 2 with one sentence; for a reader
that leaves (`| head -1`) also 141. A traceback, or a file in the current or the home folder, is a fault.
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
from collections.abc import Callable
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
    "figures curves": "W/run -o W/curves.png",
    "figures attention": "W/weights W/photos -o W/attention.png",
    "demo": "-o W/demo --seconds 1",
}


@dataclass(frozen=True)
class Environment:
    """How a command is run.

    Attributes:
        shell: the line that runs it, of which "$@" is the command.
        codes: exit codes that are right besides the usual one.
        change: what becomes of the variables.
        read_only: the current and the home folder are.
    """

    shell: str = '"$@"'
    codes: tuple[int, ...] = (2,)
    change: Callable[[dict[str, str]], object] = field(default=lambda variables: None)
    read_only: bool = False


def without_home(variables: dict[str, str]) -> None:
    """As a container's user without an entry in /etc/passwd."""
    variables.pop("HOME")


def in_c(variables: dict[str, str]) -> None:
    """ASCII, with what Python does against it switched off."""
    variables.update(LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")


# Root writes where it may not, unless these two capabilities are taken from it.
AS_A_USER = "setpriv --bounding-set=-dac_override,-dac_read_search" if os.geteuid() == 0 else ""
ENVIRONMENTS = {
    "64 open files": Environment('ulimit -n 64; "$@"'),
    "no HOME": Environment(change=without_home),
    "HOME and current folder read-only": Environment(f'{AS_A_USER} "$@"', read_only=True),
    "LANG=C": Environment(change=in_c),
    "stdout closed": Environment('"$@" >&-', codes=()),
    "stderr closed": Environment('"$@" 2>&-', codes=()),
    "| head -1": Environment('"$@" --json | head -1; exit ${PIPESTATUS[0]}', codes=(0, 141)),
}


@dataclass(frozen=True)
class Done:
    """How a command ended, and the files that appeared where nothing was to be written."""

    code: int
    output: str
    stray: list[str]


def run(words: str, environment: Environment, made: Path) -> Done:
    """Run a command on a copy of `made`."""
    with tempfile.TemporaryDirectory(prefix="Ä 人 ", dir=made.parent) as top:
        copy, home, current = (Path(top) / name for name in ("W", "home", "current"))
        shutil.copytree(made, copy, symlinks=True)
        for folder in (home, current):
            folder.mkdir(mode=0o555 if environment.read_only else 0o755)
        variables = {**os.environ, "HOME": str(home)}
        for name in ("XDG_CACHE_HOME", "PYTHONPATH"):
            variables.pop(name, None)
        environment.change(variables)
        arguments = [word.replace("W/", f"{copy}/") for word in LINES[words].split()]
        with subprocess.Popen(
            ["bash", "-c", environment.shell, "-", sys.executable, "-m", "mgn_deploy", *words.split(), *arguments],
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


def fault(done: Done, usual: Done, environment: Environment) -> str | None:
    """What is wrong with an end, or None."""
    if "Traceback" in done.output:
        return "a traceback"
    if done.stray:
        return f"files that nobody asked for: {', '.join(done.stray)}"
    if done.code == usual.code or done.code in environment.codes:
        return None
    return f"ended with {done.code}, usually with {usual.code}"


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
    parser.add_argument("--only", help="one command")
    parser.add_argument("--environment", choices=ENVIRONMENTS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if missing := set(commands()) ^ set(LINES):
        raise SystemExit(f"LINES and the commands differ by {sorted(missing)}")
    faults, runs = [], 0
    with tempfile.TemporaryDirectory(prefix="mgn-environments-") as top:
        made = Path(top) / "made"
        make(made)
        for words in [options.only] if options.only else LINES:
            usual = run(words, Environment(), made)
            if usual.code not in (0, 1, 143) or usual.stray or "Traceback" in usual.output:
                faults.append({"command": words, "environment": "usual", "fault": f"{usual.code} {usual.stray}"})
                print(f"{words}: {usual.code} {usual.stray}\n{usual.output}", flush=True)
            for name, environment in ENVIRONMENTS.items():
                if options.environment in (None, name):
                    done = run(words, environment, made)
                    runs += 1
                    wrong = fault(done, usual, environment)
                    print(f"{words}, {name}: {done.code} {wrong or ''}", flush=True)
                    if done.code == 2 and not wrong:
                        print(f"    {done.output.splitlines()[-1:]}", flush=True)
                    if wrong:
                        faults.append({"command": words, "environment": name, "fault": wrong})
                        print(done.output[-3000:], flush=True)
    print(f"{runs} runs of {len(LINES)} commands, {len(faults)} faults")
    if options.out:
        options.out.write_text(json.dumps({"runs": runs, "faults": faults}, indent=2) + "\n")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
