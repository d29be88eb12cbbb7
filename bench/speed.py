"""Speed, memory, energy and accuracy of engines x bundles x batches beside PyTorch's, in one run of bounded time.

All rows take turns in random order, because a shared machine's speed drifts: each ratio is of neighbours in time.
"""

from __future__ import annotations

import datetime
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mgn_deploy.bench.contenders import REFERENCE, Contender, Rivals, open_contenders, read_images
from mgn_deploy.bench.environment import environment, joules, process_peak, sentence
from mgn_deploy.bench.result import Accuracy, Latency, Result
from mgn_deploy.bench.server import held_rate
from mgn_deploy.bench.timing import Limits, in_turns, limits, median_ratio, quantile, spread
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.datasets import Dataset, open_data
from mgn_deploy.datasets.drawn import draw_market1501
from mgn_deploy.embedder import check_batch_size
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.validate import validate

_log = logging.getLogger("mgn_deploy")

ROUNDS = 60
WANTED_ROUNDS = 12  # that the slices are cut for
SLICE = (0.03, 1.0)  # seconds of single calls
RUN = 8.0  # most seconds of an offline run and of `embed`, whose fixed cost (20 ms of CPU and 8 fsync) should not show
# Of the time that is left after warming up: at most for accuracy, and for the server's search.
ACCURACY_SHARE, SERVER_SHARE = 0.5, 0.3
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
_Path = str | os.PathLike[str]


def measure(
    bundles: Sequence[_Path],
    *,
    engines: Sequence[str] = (),
    batches: Sequence[int] = (1, 8),
    images: _Path | None = None,
    count: int = 64,
    data: str | None = None,
    p99: float | None = None,
    minutes: float = 5.0,
    reference: bool = True,
    allow_unproven: bool = False,
    seed: int = 0,
    rivals: Rivals = MappingProxyType({}),
    progress: Progress | None = None,
) -> Result:
    """Measure bundles by engines at batch sizes, in turns, within `minutes`.

    What cannot be measured is null, and the row says why. Opening engines is not interrupted: where that alone takes
    the time, each row still has one round.

    Args:
        bundles: folders.
        engines: backends; none: all that are installed and proven.
        batches: images a call.
        images: folder of images; drawn people without it.
        count: of them; a batch at least.
        data: KIND:DIR: each engine also ranks its query and gallery.
        p99: milliseconds: also find the highest rate of random requests that 99% of are answered in time.
        minutes: of the whole run.
        reference: also measure the PyTorch reference.
        allow_unproven: also run engines without a passed proof.
        seed: of the order of the turns.
        rivals: further contenders by name, opened from a bundle.
        progress: called with the seconds that are over, and all.

    Raises:
        UserError: no such bundle, backend, images or data; or a setting that makes no sense.
    """
    start = time.monotonic()
    end = start + 60 * minutes
    for batch in batches:
        check_batch_size(batch)
    for name, value in (("--minutes", minutes), ("--p99", p99), ("--count", count)):
        if value is not None and not value > 0:
            raise UserError(f"{name} {value:g}: give a number above 0")
    opened = [Bundle.open(bundle) for bundle in bundles]
    labelled = open_data(data) if data else None
    tell = None
    if progress:
        tell = lambda: progress("measuring", round(time.monotonic() - start), round(60 * minutes))  # noqa: E731
    with tempfile.TemporaryDirectory(prefix="mgn-deploy-bench-") as scratch:
        folder = Path(images) if images else Path(scratch) / "drawn"
        if images is None:
            draw_market1501(folder, train_identities=max(2, max(count, *batches) // 8), test_identities=2)
        pixels = cache(lambda height, width: read_images(folder, height, width, count, max(batches)))
        contenders, left_out = open_contenders(opened, engines, batches, pixels, reference, allow_unproven, rivals)
        seconds = _warm_up(contenders, end, Path(scratch))
        left_out += [one.row for one in contenders if "engine" in one.row.not_measured]
        contenders = [one for one in contenders if "engine" not in one.row.not_measured]
        if not contenders:
            raise CannotRun("; ".join(dict.fromkeys(f"{row.engine}: {row.not_measured['engine']}" for row in left_out)))
        machine = limits("cuda" if any(one.row.device != "CPU" for one in contenders) else "cpu")
        left = max(0.0, end - time.monotonic())
        ranking = min(ACCURACY_SHARE * left, 2 * _ranking_seconds(contenders, labelled)) if labelled else 0.0
        serving = SERVER_SHARE * (left - ranking) if p99 else 0.0
        _rounds(contenders, seconds, end - ranking - serving, seed, tell)
        _serve(contenders, p99, end - ranking)
        _rank(contenders, labelled, end)
    for contender in contenders:
        _finish(contender, machine, [one for one in contenders if one.row.engine == REFERENCE])
    energy = joules()
    return Result(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"), minutes=minutes,
        seconds=round(time.monotonic() - start, 1), seed=seed, images=str(images) if images else "drawn people",
        environment=environment(), limits=machine, peak_host_bytes=process_peak(),
        energy=energy[1] if energy else "not readable (no RAPL below /sys/class/powercap, no NVML)",
        rows=[contender.row for contender in contenders] + left_out,
    )  # fmt: skip


def _warm_up(contenders: Sequence[Contender], end: float, scratch: Path) -> float:
    """Warm all up; the seconds of a slice, so that the rounds fit. The row of what fails has the reason."""
    share = max(0.0, end - time.monotonic()) / max(1, len(contenders))
    of_round = share / WANTED_ROUNDS
    seconds = min(SLICE[1], max(SLICE[0], of_round / 4))
    run = min(RUN, max(seconds, of_round / 2 - seconds))
    for number, contender in enumerate(contenders):
        try:
            contender.warm_up(min(10.0, 0.2 * share), run)
        except Exception as error:  # as of a batch that the GPU has no memory for: the other rows are worth having
            contender.row.not_measured["engine"] = sentence(error)
            continue
        if contender.row.warm_up and not contender.row.warm_up.settled:
            _log.warning(f"{contender.row.name}: still changing after {contender.row.warm_up.calls} calls of warm-up")
        contender.copy_files(scratch / f"{number}" / "images")
    return seconds


def _ranking_seconds(contenders: Sequence[Contender], data: Dataset) -> float:
    calls = {(one.row.bundle_id, one.row.engine): one.row for one in contenders}
    images = len(data.query) + len(data.gallery)
    warm = [(row.warm_up, row.batch) for row in calls.values()]
    return sum(images / batch * one.seconds / one.calls for one, batch in warm if one)


def _rounds(
    contenders: Sequence[Contender], seconds: float, until: float, seed: int, tell: Callable[[], None] | None
) -> None:
    tasks: dict[tuple[int, str], Callable[[], Any]] = {
        (number, name): task
        for number, contender in enumerate(contenders)
        for name, task in contender.tasks(seconds).items()
    }
    if tell:
        tasks[-1, "progress"] = tell
    results = in_turns(tasks, until=until, fewest=1, most=ROUNDS, seed=seed)
    _log.info(f"{len(next(iter(results.values())))} rounds of {len(contenders)} rows")
    for number, contender in enumerate(contenders):
        row = contender.row
        row.pixels, row.image_bytes = (_latency(results[number, name]) for name in ("pixels", "image_bytes"))
        row.offline = spread(results[number, "offline"], 3)
        if (number, "embed") in results:
            rates = results[number, "embed"]
            row.embed = spread(rates, 3)
            row.embed_of_offline = median_ratio(rates, results[number, "offline"])
        else:
            row.not_measured["embed"] = "PyTorch is measured from pixels alone"
        if row.device != "CPU":
            _gpu_times(contender)
        else:
            row.not_measured["gpu_ms"] = "no GPU"


def _latency(rounds: Sequence[Sequence[float]]) -> Latency:
    every = [round(1e3 * seconds, 4) for one in rounds for seconds in one]
    medians = spread([1e3 * statistics.median(one) for one in rounds])
    p50, p90, p99, p999 = (quantile(every, share) for share in (0.5, 0.9, 0.99, 0.999))
    return Latency(calls=len(every), p50=p50, p90=p90, p99=p99, p999=p999, rounds=medians)


def _gpu_times(contender: Contender, calls: int = 5) -> None:
    """Kernels and copies of a call by CUPTI, as PyTorch's profiler reads it: of any engine in this process."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    batch = contender.images.crops[: contender.row.batch]
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            contender.embedder.backend(batch)
    events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        contender.row.not_measured["gpu_ms"] = "CUPTI shows no kernels: it may be another process's, or forbidden here"
        return
    copies = sum(event.device_time for event in events if event.name.startswith("Memcpy"))
    every = sum(event.device_time for event in events)
    contender.row.gpu_ms = round((every - copies) / calls / 1e3, 4)
    contender.row.gpu_copies_ms = round(copies / calls / 1e3, 4)


def _serve(contenders: Sequence[Contender], p99: float | None, until: float) -> None:
    for number, contender in enumerate(contenders):
        row, engine = contender.row, contender.embedder.backend
        if p99 is None:
            row.not_measured["server"] = "no --p99 was given"
            continue
        now = time.monotonic()
        share = now + max(0.0, until - now) / (len(contenders) - number)
        assert row.offline
        try:
            with contender.meter:
                row.server = held_rate(engine, contender.images.crops, row.batch, p99, row.offline.median, share)
        except CannotRun as reason:
            row.not_measured["server"] = str(reason)


def _rank(contenders: Sequence[Contender], data: Dataset | None, end: float) -> None:
    known: dict[tuple[str, str], Accuracy | str] = {}

    def watch(*_: object) -> None:
        if time.monotonic() > end:
            raise TimeoutError

    for contender in sorted(contenders, key=lambda one: -one.row.batch):
        row, key = contender.row, (contender.row.bundle_id, contender.row.engine)
        if data is None:
            row.not_measured["accuracy"] = "no --data was given"
            continue
        if key not in known:
            try:
                watch()
                scores = validate(data, contender.embedder, None, batch_size=row.batch, progress=watch).measured
                known[key] = Accuracy(data=data.name, queries=scores.queries, rank1=scores.rank[1], mAP=scores.mAP)
            except TimeoutError:
                known[key] = "it takes longer than what was left of --minutes"
        found = known[key]
        if isinstance(found, Accuracy):
            row.accuracy = found
        else:
            row.not_measured["accuracy"] = found


def _finish(contender: Contender, machine: Limits, references: Sequence[Contender]) -> None:
    row = contender.row
    assert row.offline is not None
    row.noise = contender.meter.noise(row.offline.variation)
    if len(row.offline.rounds) < 6:
        row.noise.flags.append(f"too few rounds for bounds of 95% ({len(row.offline.rounds)}): give --minutes")
    for other in references:
        if other is not contender and other.reference == contender.reference and other.row.offline:
            row.over_reference = median_ratio(row.offline.rounds, other.row.offline.rounds)
    rates = machine.operations_per_second
    if DTYPES[row.precision] in rates and row.operations_per_image:
        # A CPU without arithmetic for half precision has float32's, and engines use it.
        rate = max(rates[DTYPES[row.precision]], rates.get("float32", 0.0))
        row.of_matrix_rate = round(row.offline.median * row.operations_per_image / rate, 4)
    if contender.embedded:
        row.joules_per_image = round(contender.energy / contender.embedded, 4)
    else:
        row.not_measured["joules_per_image"] = "not readable"
