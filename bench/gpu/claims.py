"""What the project says or aims at of GPUs, each with its target and what the suite measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mgn_deploy.backends.registry import ENGINES

Stages = Mapping[str, Sequence[Mapping[str, Any]]]  # rows by stage
NOT_MEASURED = "not measured"
OURS = set(ENGINES) - {"torch"}
HEADLINE = "float16 nhwc mirror_embeddings"  # what the pipeline gives the kernel


class Claim(NamedTuple):
    """`figure` is None where the rows lack it; it holds from `at_least` on, with 0 at nothing else."""

    text: str
    target: str
    at_least: float
    figure: float | None
    form: str = ".2f"


def claims(stages: Stages) -> list[Claim]:
    """Each claim with its figure, read off the rows."""

    def first(stage: str, figure: str, **values: Any) -> Any:
        rows = [row for row in stages.get(stage, ()) if all(row.get(key) == value for key, value in values.items())]
        return next((row[figure] for row in rows if row.get(figure) is not None), None)

    def kernel(images: int, figure: str = "cold_us", contender: str = "kernel_graph") -> float | None:
        return first("kernel", figure, row=f"{HEADLINE} {images}", contender=contender)

    def over(rival: str, images: int) -> float | None:
        ours, theirs = kernel(images), kernel(images, contender=rival)
        return theirs / ours if ours and theirs else None

    def failures(stage: str, of: str = "") -> float | None:
        ran = [row for row in stages.get(stage, ()) if "left_out" not in row]
        ours = any(row.get("contender", "").startswith(of) for row in ran)
        return float(sum("failed" in row for row in ran)) if ours else None

    # The engines in float16 on a GPU, with our kernel as their heads, too.
    network = [row for row in stages.get("engines", ()) if (row.get("precision"), row.get("batch")) == ("fp16", 64)]
    network = [row for row in network if row["device"] != "CPU" and row["engine"].split()[0] in OURS]
    fastest = max((row["offline"]["median"] for row in network), default=None)
    eager = first("engines", "offline", engine="torch eager fp16", batch=64)
    on_gpu = [row for row in stages.get("embed", ()) if row.get("device") not in (None, "CPU")]
    same = first("rerank", "same_first", row="rerank on cpu")
    return [
        Claim("the kernel is right: error against float64, same bits twice", "no failure", 0,
              failures("correctness", of="kernel"), ".0f"),
        Claim("compute-sanitizer finds nothing, in four tools", "no failure", 0, failures("sanitizer"), ".0f"),
        Claim("the kernel at batch 32: share of a copy's bytes a second", "at least 0.85", 0.85, kernel(32, "of_copy")),
        Claim("the kernel at batch 1 over PyTorch's eager heads", "at least 4x", 4.0, over("eager", 1), ".1f"),
        Claim("the kernel at batch 32 over its rival in Triton's language (else it goes)", "at least 1.05x",
              1.05, over("triton_graph", 32)),
        Claim("the network at batch 64, fp16 with mirrors: share of matrix products", "at least 0.50", 0.5,
              max((row["of_matrix_rate"] for row in network if row["of_matrix_rate"]), default=None)),
        Claim("the network at batch 64 over PyTorch eager, both in fp16", "at least 2x", 2.0,
              fastest / eager["median"] if fastest and eager else None, ".1f"),
        Claim("`embed` at batch 32: share of the engine alone", "at least 0.90", 0.9,
              next((row["embed_of_offline"] for row in on_gpu if row["embed_of_offline"] is not None), None)),
        Claim("re-ranking on the GPU finds what the CPU finds", "at least 0.999", 0.999,
              same if first("rerank", "row", row="rerank on cuda") else None, ".4f"),
    ]  # fmt: skip


def judge(stages: Stages) -> list[dict[str, Any]]:
    """Each claim with its target, what was measured, and whether it holds (None: not measured)."""
    judged = []
    for text, target, at_least, figure, form in claims(stages):
        kept = None if figure is None else figure >= at_least if at_least else figure == 0
        measured = NOT_MEASURED if figure is None else format(figure, form)
        judged.append({"claim": text, "target": target, "measured": measured, "holds": kept})
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
