"""What `validate` and `evaluate` share: how figures are asked for, and their table."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgn_deploy.choices import Metric
from mgn_deploy.console import percent, print_table
from mgn_deploy.errors import UserError

if TYPE_CHECKING:
    from mgn_deploy.retrieval.evaluation import Scores
    from mgn_deploy.retrieval.ranking import RankingMetrics
    from mgn_deploy.retrieval.statistics import Difference


def _refuse_index(index: str | None) -> None:
    if index is not None:
        raise UserError(
            "--index: rank-k and mAP depend on every neighbour, and what an approximate index misses would look like "
            "the model's fault: leave it out"
        )


_ranking = partial(typer.Option, rich_help_panel="Ranking")
more = partial(typer.Option, rich_help_panel="More figures")

MetricOption = Annotated[Metric, _ranking("--metric", help="Of the distances.")]
Cameras = Annotated[
    bool, _ranking("--cameras/--no-cameras", help="Leave out the query's person by the query's camera.")
]
Rerank = Annotated[bool, _ranking("--rerank", help="Also after k-reciprocal re-ranking.")]
Aqe = Annotated[int, _ranking("--aqe", min=0, help="Neighbours that expand a query; 0: none.")]
Dba = Annotated[int, _ranking("--dba", min=0, help="Neighbours that augment a gallery image; 0: none.")]
RocOption = Annotated[bool, more("--roc", help="TPR at FPR 1e-2 to 1e-5, and EER, over all pairs.")]
SingleShotOption = Annotated[bool, more("--single-shot", help="CUHK03's classic protocol, 100 draws.")]
Intervals = Annotated[bool, more("--ci", help="95% bootstrap intervals over queries.")]
NoIndex = Annotated[str | None, _ranking(callback=_refuse_index, help="Refused: figures depend on every neighbour.")]
PerQuery = Annotated[Path | None, more("--per-query", help="Write each query's figures to a Parquet file.")]


def print_scores(title: str, columns: dict[str, Scores | None], paired: dict[str, Difference]) -> None:
    """One column a ranking, and where there are two their difference with its p-value."""
    from mgn_deploy.retrieval.ranking import KEYS

    shown = {name: scores for name, scores in columns.items() if scores is not None}
    rows = []

    def add(label: str, cells: list[str], key: str = "") -> None:
        one = paired.get(key)
        difference = [f"{100 * one.mean:+.2f}", f"{one.p:.4f}"] if one else ["", ""]
        rows.append([label, *cells, *(difference if paired else [])])

    for key in KEYS:
        add(key, [_figure(scores, key) for scores in shown.values()], key)
    lonely = [str(scores.metrics.queries_without_match) for scores in shown.values()]
    add("queries without a right answer", lonely)
    first = next(iter(shown.values()))
    if first.reranked:
        for key in KEYS:
            add(f"{key}, re-ranked", [_of(scores.reranked, key) for scores in shown.values()])
    if first.single_shot:
        for k in first.single_shot.rank:
            cells = [percent(scores.single_shot.rank[k]) for scores in shown.values() if scores.single_shot]
            add(f"rank-{k}, single-shot", cells)
    if first.roc:
        for rate in first.roc.to_dict()["tpr_at_fpr"]:
            found = [scores.roc.tpr_at(float(rate)) for scores in shown.values() if scores.roc]
            add(f"TPR at FPR {rate}", ["too few pairs" if tpr is None else percent(tpr) for tpr in found])
        add("EER", [percent(scores.roc.eer()) for scores in shown.values() if scores.roc])
    print_table(["", *shown, *(["difference", "p"] if paired else [])], rows, title=title)


def _figure(scores: Scores, key: str) -> str:
    figure = _of(scores.metrics, key)
    if scores.intervals is None:
        return figure
    low, high = scores.intervals[key]
    return f"{figure} ({percent(low)} to {percent(high)})"


def _of(metrics: RankingMetrics | None, key: str) -> str:
    return percent(metrics.to_dict()[key]) if metrics else ""
