"""What the project says or aims at of GPUs, each with its target and what the suite measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mgn_deploy.backends.registry import ENGINES

Stages = Mapping[str, Sequence[Mapping[str, Any]]]  # rows by stage
NOT_MEASURED = "not measured"
OURS = set(ENGINES) - {"torch"}
HEADLINE = "float16 nhwc mirror_embeddings"  # what the pipeline gives the kernel


class Claim(NamedTuple):
    """`figure` reads it off the rows, None where they lack it; it holds from `at_least` on, with 0 at nothing else."""

    text: str
    target: str
    at_least: float
    figure: Callable[[Stages], float | None]
    form: str = ".2f"


def _rows(stages: Stages, stage: str, **values: Any) -> list[Mapping[str, Any]]:
    return [row for row in stages.get(stage, ()) if all(row.get(key) == value for key, value in values.items())]


def _first(figures: Iterable[float | None]) -> float | None:
    return next((one for one in figures if one is not None), None)


def _kernel(images: int, figure: str) -> Callable[[Stages], float | None]:
    return lambda stages: _first(
        row.get(figure) for row in _rows(stages, "kernel", row=f"{HEADLINE} {images}", contender="kernel_graph")
    )


def _over(rival: str, images: int) -> Callable[[Stages], float | None]:
    def figure(stages: Stages) -> float | None:
        cold = _kernel(images, "cold_us")(stages)
        rivals = _rows(stages, "kernel", row=f"{HEADLINE} {images}", contender=rival)
        theirs = _first(row.get("cold_us") for row in rivals)
        return theirs / cold if cold and theirs else None

    return figure


def _ours(stages: Stages, batch: int) -> list[Mapping[str, Any]]:
    """The engines' rows in float16 on a GPU, with our kernel as their heads, too."""
    rows = _rows(stages, "engines", precision="fp16", batch=batch)
    return [row for row in rows if row["device"] != "CPU" and row["engine"].split()[0] in OURS]


def _of_matrix_rate(stages: Stages) -> float | None:
    return max((row["of_matrix_rate"] for row in _ours(stages, 64) if row["of_matrix_rate"]), default=None)


def _over_eager(stages: Stages) -> float | None:
    eager = _rows(stages, "engines", engine="torch eager fp16", batch=64)
    rates = [row["offline"]["median"] for row in _ours(stages, 64)]
    return max(rates) / eager[0]["offline"]["median"] if rates and eager else None


def _failures(stage: str, on_gpu: bool) -> Callable[[Stages], float | None]:
    def figure(stages: Stages) -> float | None:
        ran = [row for row in stages.get(stage, ()) if "left_out" not in row]
        ours = any(str(row.get("contender", "")).startswith("kernel") for row in ran) or stage == "sanitizer"
        return float(sum("failed" in row for row in ran)) if ran and (ours or not on_gpu) else None

    return figure


def _embed(stages: Stages) -> float | None:
    shares = [row.get("embed_of_offline") for row in stages.get("embed", ()) if row.get("device") not in (None, "CPU")]
    return _first(shares)


CLAIMS = (
    Claim("the kernel is right: error against float64, same bits twice", "no failure", 0,
          _failures("correctness", True), ".0f"),
    Claim("compute-sanitizer finds nothing, in four tools", "no failure", 0, _failures("sanitizer", True), ".0f"),
    Claim("the kernel at batch 32: share of a copy's bytes a second", "at least 0.85", 0.85, _kernel(32, "of_copy")),
    Claim("the kernel at batch 1 over PyTorch's eager heads", "at least 4x", 4.0, _over("eager", 1), ".1f"),
    Claim("the kernel at batch 32 over its rival in Triton's language (else it goes)", "at least 1.05x",
          1.05, _over("triton_graph", 32)),
    Claim("the network at batch 64, fp16 with mirrors: share of matrix products", "at least 0.50", 0.5,
          _of_matrix_rate),
    Claim("the network at batch 64 over PyTorch eager, both in fp16", "at least 2x", 2.0, _over_eager, ".1f"),
    Claim("`embed` at batch 32: share of the engine alone", "at least 0.90", 0.9, _embed),
    Claim("re-ranking on the GPU finds what the CPU finds", "at least 0.999", 0.999,
          lambda stages: _first(row.get("same_first") for row in _rows(stages, "rerank", row="rerank on cpu"))
          if _rows(stages, "rerank", row="rerank on cuda") else None, ".4f"),
)  # fmt: skip


def judge(stages: Stages) -> list[dict[str, Any]]:
    """Each claim with its target, what was measured, and whether it holds (None: not measured)."""
    judged = []
    for claim in CLAIMS:
        figure = claim.figure(stages)
        kept = None if figure is None else figure >= claim.at_least if claim.at_least else figure == 0
        measured = NOT_MEASURED if figure is None else format(figure, claim.form)
        judged.append({"claim": claim.text, "target": claim.target, "measured": measured, "holds": kept})
    return judged


def markdown(result: Mapping[str, Any]) -> str:
    """The suite's result for people: stages, claims, and what failed or was left out."""
    machine = result["environment"]["hardware"]
    lines = [f"# GPU suite on {machine['gpu'] or machine['cpu']}, {result['date']}", ""]
    lines += ["| stage | state | seconds | rows |", "| --- | --- | --- | --- |"]
    for name, stage in result["stages"].items():
        lines.append(f"| {name} | {stage['state']} | {stage['seconds']} | {len(stage['rows'])} |")
    lines += ["", "| claim | target | measured | holds |", "| --- | --- | --- | --- |"]
    words = {None: "", True: "yes", False: "**no**"}
    for one in result["claims"]:
        lines.append(f"| {one['claim']} | {one['target']} | {one['measured']} | {words[one['holds']]} |")
    lines.append("")
    for name, stage in result["stages"].items():
        reasons: dict[str, list[str]] = {}
        for row in stage["rows"]:
            for key in ("failed", "left_out"):
                if key in row:
                    reasons.setdefault(f"{key.replace('_', ' ')}: {row[key]}", []).append(row["row"])
        lines += [
            f"- {name}: {rows[0]}{f' and {len(rows) - 1} more' if rows[1:] else ''}: {why}"
            for why, rows in reasons.items()
        ]
    return "\n".join(lines) + "\n"
