"""What `mgn-deploy bench` writes: the schema of its JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mgn_deploy.bench.environment import Environment, Noise, Strict
from mgn_deploy.bench.timing import Interval, Limits, Spread, WarmUp
from mgn_deploy.errors import UserError, first_problem

SCHEMA_VERSION = 1
JSON_NAME, PAGE_NAME = "bench.json", "bench.html"


class Latency(Strict):
    """Milliseconds of single calls of one batch, one after the other. `rounds` has the median of each round."""

    calls: int
    p50: Interval
    p90: Interval
    p99: Interval
    p999: Interval
    rounds: Spread


class Server(Strict):
    """Requests of one image that arrive at random (Poisson), by MLCommons' LoadGen: the highest rate a second at which
    99 of 100 had their answer within `limit_ms`, and the lowest that was tried and failed."""

    limit_ms: float
    held: float
    failed: float | None
    p99_ms: float | None
    requests: int


class Accuracy(Strict):
    """Of the very engine that was timed, by the Market-1501 protocol. Fractions, 0 to 1."""

    data: str
    queries: int
    rank1: float
    mAP: float


class Row(Strict):
    """One engine with one bundle at one batch. Rates are images/s; ratios are the median of the rounds' ratios.

    `pixels` begins with pixels in memory, `image_bytes` with an encoded image: decoding and resizing are in it.
    `offline` is the engine with all batches at hand, `embed` the way from a folder of image files to a store on disk.
    `gpu_ms` is the time of the GPU's kernels in a call, without the copies, whose time is `gpu_copies_ms`.
    `of_matrix_rate` is the network's operations a second over the machine's matrix products in the bundle's precision,
    or in float32 where those are faster.
    `not_measured` says why what is null is null.
    """

    bundle: str
    bundle_id: str
    model: str
    precision: str
    mirror: bool
    engine: str
    version: str
    device: str
    fused_heads: bool
    batch: int
    images: int
    warm_up: WarmUp | None = None
    pixels: Latency | None = None
    image_bytes: Latency | None = None
    offline: Spread | None = None
    embed: Spread | None = None
    embed_of_offline: float | None = None
    over_reference: float | None = None
    gpu_ms: float | None = None
    gpu_copies_ms: float | None = None
    server: Server | None = None
    host_bytes: int | None = None
    device_bytes: int | None = None
    joules_per_image: float | None = None
    operations_per_image: int | None = None
    of_matrix_rate: float | None = None
    accuracy: Accuracy | None = None
    noise: Noise = Noise()
    not_measured: dict[str, str] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tells a row from the others of its run; the same in another run of the same model."""
        mirror = "" if self.mirror else " no mirror"
        heads = " fused heads" if self.fused_heads else ""
        return f"{self.model} {self.precision}{mirror}, {self.engine}{heads}, batch {self.batch}"


class Result(Strict):
    """A run. `seconds` is how long it took, `minutes` how long it was allowed to."""

    schema_version: Literal[1] = 1
    bench: Literal["mgn-deploy"] = "mgn-deploy"
    date: str
    minutes: float
    seconds: float
    seed: int
    images: str
    environment: Environment
    limits: Limits
    energy: str
    peak_host_bytes: int
    rows: list[Row]

    @property
    def models(self) -> str:
        return ", ".join(dict.fromkeys(row.model for row in self.rows))


def read_result(path: str | os.PathLike[str]) -> Result:
    """Read a result's JSON, or the one in a folder that `bench --out` wrote.

    Raises:
        UserError: there is none, or it has another schema.
    """
    path = Path(path)
    file = path / JSON_NAME if path.is_dir() else path
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; `mgn-deploy bench BUNDLE --out DIR` writes one") from None
    except ValueError:
        raise UserError(f"{file} is no JSON: give what `mgn-deploy bench --out` wrote") from None
    if not isinstance(content, dict) or content.get("bench") != "mgn-deploy":
        raise UserError(f"{file} is no result of `mgn-deploy bench`")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{file} has schema {content.get('schema_version')!r} and this mgn-deploy reads {SCHEMA_VERSION}: "
            "run the bench again"
        )
    try:
        return Result.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error)}") from None
