"""What the manifest says of one built TensorRT plan, and whether that plan runs on a given GPU with a given runtime."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# The names of the import packages and of the backends.
Flavour = Literal["tensorrt", "tensorrt_rtx"]
TITLES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}

Batch = Annotated[int, Field(ge=1)]

OLDEST_PORTABLE = (8, 0)  # Ampere: what hardware-compatible and portable plans need


class EngineEntry(BaseModel):
    """One plan. Its hash is in the manifest's `files`, under `file`.

    `compute_capability` ("8.6") is what the plan was built for; None: any GPU from Ampere on. `gpu` is the name of the GPU
    that a `tensorrt` plan was timed on; TensorRT-RTX times nothing, so its plans have none. `batch` is the shape profile:
    fewest, best and most images a call.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.plan$")
    flavour: Flavour
    version: str
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")
    gpu: str | None = None
    batch: tuple[Batch, Batch, Batch]
    version_compatible: bool = False
    hardware_compatible: bool = False

    def misfit(self, flavour: Flavour, version: str, gpu: str, compute_capability: str) -> str | None:
        """Why this plan cannot run on that GPU with that runtime, as half a sentence; None where it can."""
        if flavour != self.flavour:
            return f"{self.file} is for {TITLES[self.flavour]}"
        if version != self.version and not (self.version_compatible and _later(version, self.version)):
            return f"{self.file} was built by {TITLES[flavour]} {self.version} and {version} is installed"
        portable = self.hardware_compatible or self.compute_capability is None
        if portable and capability_pair(compute_capability) >= OLDEST_PORTABLE:
            return None
        if portable or compute_capability != self.compute_capability:
            needed = "8.0 or later" if portable else self.compute_capability
            return f"{self.file} needs compute capability {needed} and {gpu} has {compute_capability}"
        if self.gpu is not None and gpu != self.gpu:
            return f"{self.file} was built for {self.gpu} and this is {gpu}"
        return None


def capability_pair(compute_capability: str) -> tuple[int, int]:
    """ "8.6" -> (8, 6)."""
    major, _, minor = compute_capability.partition(".")
    return int(major), int(minor)


def _later(version: str, built: str) -> bool:
    """Whether a runtime is of the plan's major version or later: what version-compatible plans promise."""
    return [int(part) for part in version.split(".")[:2]] >= [int(part) for part in built.split(".")[:2]]


DEFAULT_BATCH = (1, 8, 64)
