"""`mgn-deploy validate` and `mgn-deploy evaluate`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgn_deploy.choices import DEFAULT_TOLERANCE, Metric, QueryPooling
from mgn_deploy.cli.options import AllowUnproven, Backend, Batch, Bundle, Data, Json, RankDevice, Seed
from mgn_deploy.console import percent, print_json, print_table, progress, say
from mgn_deploy.errors import UserError

if TYPE_CHECKING:
    from mgn_deploy.identity.open_set import OpenSet
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
_more = partial(typer.Option, rich_help_panel="More figures")

MetricOption = Annotated[Metric, _ranking("--metric", help="Of the distances.")]
Cameras = Annotated[
    bool, _ranking("--cameras/--no-cameras", help="Leave out the query's person by the query's camera.")
]
Rerank = Annotated[bool, _ranking("--rerank", help="Also after k-reciprocal re-ranking.")]
Aqe = Annotated[int, _ranking("--aqe", min=0, help="Neighbours that expand a query; 0: none.")]
Dba = Annotated[int, _ranking("--dba", min=0, help="Neighbours that augment a gallery image; 0: none.")]
RocOption = Annotated[bool, _more("--roc", help="TPR at FPR 1e-2 to 1e-5, and EER, over all pairs.")]
SingleShotOption = Annotated[bool, _more("--single-shot", help="CUHK03's classic protocol, 100 draws.")]
Intervals = Annotated[bool, _more("--ci", help="95% bootstrap intervals over queries.")]
NoIndex = Annotated[str | None, _ranking(callback=_refuse_index, help="Refused: figures depend on every neighbour.")]
PerQuery = Annotated[Path | None, _more("--per-query", help="Write each query's figures to a Parquet file.")]


def validate(
    data: Data,
    bundle: Bundle,
    backend: Backend = "auto",
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest allowed difference of rank-1 or mAP, in points.")
    ] = DEFAULT_TOLERANCE,
    reference: Annotated[
        bool, typer.Option(help="Also run the PyTorch reference; without it there is nothing to differ from.")
    ] = True,
    multi_query: Annotated[
        QueryPooling | None,
        typer.Option(help="Pool each query with gt_bbox's images of its person and camera (Market-1501)."),
    ] = None,
    reference_sample: Annotated[
        int | None, _more("--reference-sample", min=2, help="Run the reference only on people with so many images.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Where embeddings are kept, for a run that is stopped; without it the user's cache."),
    ] = None,
    batch: Batch = 8,
    metric: MetricOption = "cosine",
    cameras: Cameras = True,
    rerank: Rerank = False,
    aqe: Aqe = 0,
    dba: Dba = 0,
    roc: RocOption = False,
    single_shot: SingleShotOption = False,
    ci: Intervals = False,
    open_set: Annotated[
        bool, _more("--open-set", help="Enrol half of the people and measure DIR at FPIR, 100 draws.")
    ] = False,
    per_query: PerQuery = None,
    index: NoIndex = None,
    device: RankDevice = "cpu",
    seed: Seed = 0,
    allow_unproven: AllowUnproven = False,
    json: Json = False,
) -> None:
    """Measure rank-1/5/10, mAP and mINP beside PyTorch's.

    By the Market-1501 protocol, over exact neighbours and never through an index. With --json the figures are
    fractions, not points. p is the probability of a difference like this one by chance, from a permutation test over
    the queries.
    """
    from mgn_deploy.datasets import open_data
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.identity.calibration import Calibration
    from mgn_deploy.identity.open_set import open_set_of
    from mgn_deploy.retrieval.evaluation import Protocol
    from mgn_deploy.retrieval.multi_query import needed_subsets
    from mgn_deploy.retrieval.validate import validate as run
    from mgn_deploy.retrieval.validate import validation_store

    protocol = Protocol(metric, cameras, aqe, dba, rerank, roc, single_shot, ci, seed, device)
    images = open_data(data, needed_subsets(multi_query))
    embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    original = Embedder.open_reference(bundle) if reference else None
    calibration = Calibration.find(embedder.bundle) if open_set else None
    kept = store or validation_store(embedder.bundle, images)
    if kept:
        say(f"embeddings are kept in {kept}: a run that is stopped goes on from there")
    with progress() as update:
        result = run(
            images,
            embedder,
            original,
            multi_query=multi_query,
            protocol=protocol,
            per_query=per_query,
            store=kept,
            reference_sample=reference_sample,
            batch_size=batch,
            progress=update,
        )
    found = None
    if open_set:
        assert result.embeddings is not None
        assert result.ranked is not None
        found = open_set_of(result.ranked, *result.embeddings, calibration=calibration, seed=seed)
    if json:
        notes = [*images.notes, *result.notes]
        asked = {"multi_query": multi_query, "notes": notes, "tolerance_points": tolerance}
        opened = {"open_set": found.to_dict()} if found else {}
        judged = {"protocol": protocol.to_dict(), **asked, "passed": result.passes(tolerance)}
        print_json({**result.to_dict(), **opened, **judged})
    else:
        pooled = f", multiple-query ({multi_query})" if multi_query else ""
        _print_scores(
            f"{data}, {result.measured.queries} queries{pooled}; percent",
            {result.backend: result.measured_scores, "PyTorch": result.reference_scores},
            result.paired() if result.sample is None else {},
        )
        if result.sample:
            _print_scores(
                f"of these, {result.sample.measured.queries} queries beside the reference; percent",
                {result.backend: result.sample.measured_scores, "PyTorch": result.sample.reference_scores},
                result.paired(),
            )
        if found:
            _print_open_set(found)
    result.require(tolerance)


def evaluate(
    query: Annotated[Path, typer.Argument(help="Embedding store of the queries, with labels.")],
    gallery: Annotated[Path, typer.Argument(help="Embedding store of the gallery, with labels; may be the same.")],
    against: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="QUERY GALLERY", help="Stores of the same images to compare with, query by query."),
    ] = None,
    junk: Annotated[
        list[int] | None, typer.Option(help="An identity that is ignored; Market-1501's is -1. By default none.")
    ] = None,
    distractor: Annotated[
        list[int] | None, typer.Option(help="An identity that is nobody; Market-1501's is 0. By default none.")
    ] = None,
    metric: MetricOption = "cosine",
    cameras: Cameras = True,
    rerank: Rerank = False,
    aqe: Aqe = 0,
    dba: Dba = 0,
    roc: RocOption = False,
    single_shot: SingleShotOption = False,
    ci: Intervals = False,
    per_query: PerQuery = None,
    index: NoIndex = None,
    device: RankDevice = "cpu",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure two labelled stores, as `validate` measures images.

    Over exact neighbours and never through an index. Every number is a person's, 0 and -1 too, unless --junk or
    --distractor names it.
    """
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.retrieval.evaluate_stores import evaluate_stores
    from mgn_deploy.retrieval.evaluation import Protocol, write_per_query

    protocol = Protocol(metric, cameras, aqe, dba, rerank, roc, single_shot, ci, seed, device)
    with progress() as update:
        result = evaluate_stores(
            Store.open(query),
            Store.open(gallery),
            against=(Store.open(against[0]), Store.open(against[1])) if against else None,
            junk=junk or (),
            distractors=distractor or (),
            protocol=protocol,
            progress=update,
        )
    if per_query is not None:
        reranked = result.scores.reranked
        of_each = {"": result.scores.metrics.scores, "reranked_": reranked.scores if reranked else None}
        of_each["against_"] = result.against.metrics.scores if result.against else None
        write_per_query(per_query, result.names, result.identities, of_each)
    if json:
        print_json({**result.to_dict(), "protocol": protocol.to_dict()})
    else:
        _print_scores(
            f"{query} in {gallery}, {result.scores.metrics.queries} queries; percent",
            {query.name: result.scores, f"against {against[0].name}" if against else "": result.against},
            result.paired(),
        )


def _print_scores(title: str, columns: dict[str, Scores | None], paired: dict[str, Difference]) -> None:
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


def _print_open_set(found: OpenSet) -> None:
    rows = [
        [
            point.name,
            *(f"{value:.4f} ({low:.4f} to {high:.4f})" for value, low, high in [point.threshold]),
            *(f"{percent(value)} ({percent(low)} to {percent(high)})" for value, low, high in (point.fpir, point.dir)),
            point.problem or "",
        ]
        for point in found.points
    ]
    title = (
        f"open set: {found.enrolled} of {found.people} people enrolled, {found.mated:.0f} searches of them and "
        f"{found.non_mated:.0f} of others, {found.draws} draws; median and 95%, percent"
    )
    print_table(["threshold of", "threshold", "FPIR", "DIR, rank 1", "note"], rows, title=title)


def _figure(scores: Scores, key: str) -> str:
    figure = _of(scores.metrics, key)
    if scores.intervals is None:
        return figure
    low, high = scores.intervals[key]
    return f"{figure} ({percent(low)} to {percent(high)})"


def _of(metrics: RankingMetrics | None, key: str) -> str:
    return percent(metrics.to_dict()[key]) if metrics else ""
