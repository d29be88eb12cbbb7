"""What the service takes at most, and how long it waits for it. The defaults are listed in docs/how-to/serve.md."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mgn_deploy.choices import MAX_BATCH
from mgn_deploy.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Every limit of the service.

    Attributes:
        batch: most images a call of the engine; an engine that was compiled for less gets less.
        wait_seconds: how long the first image of a batch waits for others.
        queued: most images that were taken and are not answered; beyond, requests get 503.
        body_bytes: of a request.
        held_bytes: of all requests together that are being received or answered; beyond, requests get 503.
        images: crops a request, boxes counted.
        pixels: of an image, as its header gives them.
        results: most rows of a rank list.
        connections: open at once; beyond, new ones get 503.
        header_seconds: for a request's first line and headers.
        body_seconds: for its body.
        write_seconds: for a client that reads no answer.
        idle_seconds: that a connection is kept open without a request.
        shutdown_seconds: that requests in progress have after SIGTERM.

    Raises:
        UserError: one of them is not above zero, or a request may have more images than the queue.
    """

    batch: int = 8
    wait_seconds: float = 0.005
    queued: int = 256
    body_bytes: int = 32 << 20
    held_bytes: int = 256 << 20
    images: int = 64
    pixels: int = 40_000_000
    results: int = 200
    connections: int = 256
    header_seconds: float = 10
    body_seconds: float = 30
    write_seconds: float = 30
    idle_seconds: float = 15
    shutdown_seconds: float = 60

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 and not (field.name == "wait_seconds" and value == 0):
                raise UserError(f"the limit {field.name} must be above 0, not {value}")
        if self.batch > MAX_BATCH:
            raise UserError(f"the limit batch must be at most {MAX_BATCH}, not {self.batch}")
        if max(self.images, self.batch) > self.queued:
            raise UserError(
                f"a request of {self.images} images or a batch of {self.batch} could never be taken by a queue of "
                f"{self.queued}: raise the limit queued (--max-queue)"
            )
