"""The tables of README.md and of the site, made from `bench/results/` and from the table of engines.

A page holds `<!-- table: NAME -->` and `<!-- end -->`; what stands between them is made by the function of that name.
`python docs/gen/tables.py --readme` writes README.md's tables; the site's are made while it is built.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PRECISIONS = ("fp32", "fp16", "bf16", "int8")

_MARKED = re.compile(r"(<!-- table: ([a-z0-9 -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = "bench|peers|retrieval|growth|training"  # as the results' file names have them
_NAME = re.compile(rf"(\d{{4}}-\d{{2}}-\d{{2}})-(.+)-({KINDS})-(.+)\.(json|csv)")


class Result(NamedTuple):
    """One file of `bench/results/`, whose name says when, on what machine and of what kind it is."""

    date: str
    kind: str
    path: Path

    def content(self) -> Any:
        return json.loads(self.path.read_text())


def results(kind: str) -> list[Result]:
    """All files of a kind, the latest first."""
    found = [(match, path) for path in sorted(RESULTS.iterdir()) if (match := _NAME.fullmatch(path.name))]
    made = [Result(match[1], match[3], path) for match, path in found if match[3] == kind]
    return sorted(made, key=lambda one: (-int(one.date.replace("-", "")), one.path.name))


def fill(text: str) -> str:
    """The text with each marked table made again."""
    return _MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def engines() -> str:
    """Engine x precision x status, from the table of engines."""
    from mgn_deploy.backends.registry import ENGINES

    rows = [
        [
            f"`{engine.name}`",
            engine.title,
            engine.device,
            *("yes" if precision in engine.precisions else "" for precision in PRECISIONS),
            f"`[{engine.extra}]`",
            engine.status,
        ]
        for engine in ENGINES.values()
    ]
    return _table(["backend", "engine", "runs on", *PRECISIONS, "extra", "status"], rows)


def recipes() -> str:
    """Every key of a recipe: its type, its default, and what the shipped recipes say of it."""
    from mgn_deploy.train.recipe import Recipe, load_recipe

    names = sorted(path.stem for path in (ROOT / "train" / "recipes").glob("*.toml"))
    shipped = [load_recipe(name) for name in names]
    rows = []
    for table, field in Recipe.model_fields.items():
        for key in field.annotation.model_fields:  # type: ignore[union-attr]
            values = [getattr(getattr(recipe, table), key) for recipe in (Recipe(), *shipped)]
            rows.append([f"`{table}.{key}`", *(f"`{_toml(value)}`" for value in values)])
    return _table(["key", "default", *names], rows)


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value) if isinstance(value, (str, bool)) else f"{value:g}"


def placements() -> str:
    """INT8 placements, from the table of engines."""
    from mgn_deploy.backends.registry import ENGINES

    sides = {0: "none", 1: "the skip side", 2: "both sides"}
    rows = [
        [
            f"`{engine.name}`",
            "uint8" if placed.unsigned else "int8, zero point 0",
            str(placed.weight_levels),
            "one" if placed.one_scale else "one a channel",
            sides[placed.sides],
            "int32" if placed.integer_bias else "float",
            "float16" if placed.half else "float32",
            ", ".join(f"`{other.name}`" for other in ENGINES.values() if engine.name in other.int8_for),
        ]
        for engine in ENGINES.values()
        if (placed := engine.placement)
    ]
    columns = [
        "`--engine`",
        "activations",
        "largest weight",
        "scales a weight",
        "additions: quantised",
        "bias",
        "between",
    ]
    return _table([*columns, "run by"], rows)


def floors() -> str:
    """The proof's floors by precision."""
    from mgn_deploy.export.proof.proof import FLOORS, KEPT

    rows = [
        [name, f"{cosine}", f"{agreement}", f"{drift:g}", f"{100 * KEPT[name]:g}%"]
        for name, (cosine, agreement, drift) in FLOORS.items()
    ]
    columns = ["precision", "worst cosine at least", "top-10 agreement at least", "batch drift at most"]
    return _table([*columns, "of the reference's mAP and rank-1 kept, with `--data`"], rows)


def manifest() -> str:
    """Every key of a bundle's manifest."""
    from mgn_deploy.bundle.manifest import Manifest

    return _table(["key", "type", "without it"], list(_keys(Manifest)))


def store_manifest() -> str:
    """Every key of a store's manifest."""
    from mgn_deploy.gallery.manifest import StoreManifest

    return _table(["key", "type", "without it"], list(_keys(StoreManifest)))


def bench_result() -> str:
    """Every key of a result of `bench`."""
    from mgn_deploy.bench.result import Result

    return _table(["key", "type", "without it"], list(_keys(Result)))


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[list[str]]:
    """Key, type and default of each field; those of models within come after their own, below its key."""
    for name, field in model.model_fields.items():
        outer, inner = _inner_model(field.annotation)
        value = (
            json.dumps(field.get_default(call_default_factory=True), default=dict) if not field.is_required() else ""
        )
        default = f"`{value}`" if value else ""
        yield [f"`{prefix}{name}`", outer, default]
        if inner:
            yield from _keys(
                inner, f"{prefix}{name}{'' if outer == 'object' else '[]' if outer == 'array' else '.NAME'}."
            )


def _inner_model(annotation: Any) -> tuple[str, type[BaseModel] | None]:
    """What JSON calls a type, and the model of its items or of itself."""
    models = [
        one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, BaseModel)
    ]
    origin = get_origin(annotation)
    if models and origin in (list, tuple):
        return "array", models[0]
    if models and origin is dict:
        return "object by name", models[0]
    if models:
        return "object", models[0]
    return f"`{_type(annotation)}`", None


def _type(annotation: Any) -> str:
    """A type in short: a bar would end the table's cell."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is None:
        return {type(None): "null", ...: "..."}.get(annotation) or annotation.__name__
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " or ".join(map(json.dumps, inner))
    if origin in (Union, UnionType):
        return " or ".join(map(_type, inner))
    return f"{origin.__name__}[{', '.join(map(_type, inner))}]"


def throughput() -> str:
    """Images a second of the largest model in the latest results of `bench`: of each engine the fastest batch."""
    columns = ["model", "engine", "mirror", "batch", "bare engine", "`embed`", "PyTorch eager", "engine / eager"]
    found = results("bench")
    latest = (one.content() for one in found if one.date == found[0].date)
    content = min(latest, key=lambda content: content["rows"][0]["offline"]["median"])
    hardware, cpus = content["environment"]["hardware"], content["environment"]["cpus"]
    machine = f"{hardware['gpu'] or hardware['cpu']}, {cpus} CPUs ({' '.join(hardware['instruction_sets'])})"
    engines = [row for row in content["rows"] if row["embed"] and row["over_reference"]]
    engines.sort(key=lambda row: row["offline"]["median"])
    fastest = {(row["bundle"], row["engine"]): row for row in engines}  # later ones are faster
    table = _table(columns, [_throughput_row(row) for row in fastest.values()])
    return f"{found[0].date}, {machine}; images/s:\n\n{table}"


def _throughput_row(row: dict[str, Any]) -> list[str]:
    rate = row["offline"]["median"]
    return [
        f"{row['model']} {row['precision']}",
        f"{row['engine']} {row['version'].split('-')[0]}",
        "yes" if row["mirror"] else "no",
        str(row["batch"]),
        _rate(rate),
        f"{_rate(row['embed']['median'])} ({row['embed_of_offline']:.2f})",
        _rate(rate / row["over_reference"]),
        f"{row['over_reference']:.1f}",
    ]


def bench() -> str:
    """Latency, speed and accuracy of every row of `bench`'s results."""
    from mgn_deploy.bench.page import remarks, table
    from mgn_deploy.bench.result import read_result

    parts = []
    for one in results("bench"):
        result = read_result(one.path)
        columns, rows = table(result)
        said = "\n".join(f"- {sentence}" for sentence in remarks(result))
        parts.append(f"{one.date}; {result.models}; images: {result.images}:\n\n{_table(columns, rows)}\n\n{said}")
    return "\n\n".join(parts) or "None is committed yet: `bench/results/README.md` has the commands."


def peers() -> str:
    """Other ways to run the same network on the same crops, of `bench/peers/`."""
    columns = ["", "images/s", "of ours", "1 - cosine to float32", "remark"]
    parts = []
    for one in results("peers"):
        content = one.content()
        for model in content["models"]:
            table = _table(columns, [_peer_row(row) for row in model["rows"]])
            rounds = max(len(row["images_per_second"]["rounds"]) for row in model["rows"] if "images_per_second" in row)
            said = "; ".join([f"medians of {rounds} rounds", *model["noise"]["flags"]])
            parts.append(f"{one.date}, {content['machine']}; {model['model']} ({said}):\n\n{table}")
    return "\n\n".join(parts) or "None is committed yet: `bench/results/README.md` has the command."


def _peer_row(row: dict[str, Any]) -> list[str]:
    rate, ratio, distance = row.get("images_per_second"), row.get("of_ours"), row.get("distance")
    return [
        row["peer"],
        _rate(rate["median"]) if rate else "",
        f"{ratio:.2f}" if ratio else "",
        f"{distance:.1e}" if distance is not None else "",
        row.get("left_out") or row.get("failed") or row["remark"],
    ]


def retrieval() -> str:
    """Distances, neighbours, metrics and re-ranking, of `bench/retrieval.py`: medians of the runs."""
    columns = ["contender", "seconds", "CPU seconds", "GB beyond the embeddings", "runs"]
    parts = []
    for one in results("retrieval"):
        content = one.content()
        size = f"{content['queries']:,} x {content['gallery']:,} x {content['dim']:,}"
        rows = []
        for name in dict.fromkeys(row["contender"] for row in content["rows"]):
            same = [row for row in content["rows"] if row["contender"] == name]
            keys = ("seconds", "cpu_seconds", "gigabytes")
            cells = [f"{statistics.median(row[key] for row in same):.2f}" for key in keys]
            rows.append([f"`{name}`", *cells, str(len(same))])
        parts.append(f"{one.date}, {content['machine']}; {size}:\n\n{_table(columns, rows)}")
    return "\n\n".join(parts)


def growth() -> str:
    """Search, index and re-ranking as a gallery grows, of `bench/growth.py`."""
    columns = ["task", "images", "seconds", "CPU seconds", "GB", "load before", "remark"]
    parts = []
    for one in results("growth"):
        content = one.content()
        rows = []
        for row in sorted(content["rows"], key=lambda row: (row["task"], row["images"])):
            remark = ""
            if row["task"] == "index":
                remark = f"{row['kind']}, recall@10 {row['recall_at_10']:.3f}; {row['search_seconds']:.2f} s a search"
            cells = [f"{row[key]:.2f}" for key in ("seconds", "cpu_seconds", "gigabytes", "load")]
            rows.append([row["task"], f"{row['images']:,}", *cells, remark])
        asked = f"{content['queries']} queries, k = {content['k']}, {content['dim']} dimensions"
        parts.append(f"{one.date}, {content['machine']}; {asked}:\n\n{_table(columns, rows)}")
        fit = content["rerank_extrapolated"]
        if fit:
            parts.append(
                f"Re-ranking's CPU seconds grow with the power {fit['exponent']:.2f} of the images between the two "
                f"largest; extrapolated, not measured, to 500,000: {fit['cpu_seconds_at_500000']:,.0f} CPU seconds."
            )
    return "\n\n".join(parts)


def training() -> str:
    """Accuracy by time of a training run, about every tenth epoch that was evaluated."""
    (one,) = results("training")
    with one.path.open(newline="") as file:
        evaluated = [row for row in csv.DictReader(file) if row["mAP"]]
    best = max(evaluated, key=lambda row: float(row["mAP"]))
    chosen = [row for row in evaluated if int(row["epoch"]) in (5, 10) or int(row["epoch"]) % 20 == 0]
    chosen = sorted(
        {id(row): row for row in [*chosen, best, evaluated[-1]]}.values(), key=lambda row: int(row["epoch"])
    )
    rows = [
        [
            f"{float(row['seconds']) / 60:.1f}",
            row["epoch"],
            *(f"{100 * float(row[key]):.1f}" for key in ("rank-1", "mAP")),
        ]
        for row in chosen
    ]
    return _table(["minutes", "epoch", "rank-1", "mAP"], rows)


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 20 else f"{value:.0f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "engines": engines,
    "placements": placements,
    "floors": floors,
    "manifest": manifest,
    "store manifest": store_manifest,
    "bench result": bench_result,
    "recipes": recipes,
    "throughput": throughput,
    "bench": bench,
    "peers": peers,
    "retrieval": retrieval,
    "growth": growth,
    "training": training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="write README.md's tables")
    if parser.parse_args().readme:
        readme = ROOT / "README.md"
        readme.write_text(fill(readme.read_text()))
    else:
        print("\n\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()))


if __name__ == "__main__":
    main()
