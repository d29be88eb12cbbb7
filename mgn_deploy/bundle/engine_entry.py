"""What the manifest says of one built TensorRT plan."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TensorRtName = Literal["tensorrt", "tensorrt-rtx"]
Batch = Annotated[int, Field(ge=1)]
DEFAULT_BATCH = (1, 8, 64)  # min, opt and max images a call


class EngineEntry(BaseModel):
    """One plan. Its hash is in the manifest's `files`, under `file`.

    `compute_capability` ("8.6") is what the plan was built for; None: any GPU from Ampere on. `gpu` is the name of the
    GPU that a `tensorrt` plan was timed on; TensorRT-RTX times nothing, so its plans have none. `batch` is the profile:
    min, opt and max images a call. A plan with `fused_heads` ends with the feature maps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.plan$")
    engine: TensorRtName
    version: str
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")
    gpu: str | None = None
    batch: tuple[Batch, Batch, Batch]
    fused_heads: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
