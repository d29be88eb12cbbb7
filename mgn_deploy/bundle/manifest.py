"""The bundle's manifest: what the model is, the hash of every file, and the proofs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mgn_deploy.choices import Precision
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError, first_problem
from mgn_deploy.files import write_bytes
from mgn_deploy.machine import Hardware

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
GRAPH = "graph.onnx"
REFERENCE = "reference.safetensors"

TensorRtName = Literal["tensorrt", "tensorrt-rtx"]
Batch = Annotated[int, Field(ge=1)]
DEFAULT_BATCH = (1, 8, 64)  # min, opt and max images a call


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Ranking(_Strict):
    """A backend's ranking of labelled people beside the reference's. Fractions, 0 to 1."""

    data: str
    queries: int
    gallery: int
    rank1: float
    mAP: float
    reference_rank1: float
    reference_mAP: float


class Proof(_Strict):
    """How far one backend's embeddings of this bundle are from the PyTorch reference's, on the same pixels.

    `top10_agreement` is the mean share of each image's ten nearest neighbours that the reference names too.
    `other_images_cosine` is the reference's mean cosine between different images: the nearer to 1, the less a cosine
    near 1 says. `batch_drift` is the largest change of a coordinate with the size of the batch, the position in it and
    the neighbours.
    """

    images: int
    image_source: str
    drawn: bool
    worst_cosine: float
    mean_cosine: float
    max_abs_error: float
    top10_agreement: float
    other_images_cosine: float
    batch_drift: float
    ranking: Ranking | None = None
    passed: bool
    misses: list[str]
    backend_version: str
    hardware: Hardware
    fused_heads: bool = False
    date: str

    @property
    def in_words(self) -> str:
        """What it found, in one line."""
        if not self.passed:
            return f"not proven: {'; '.join(self.misses)}"
        images = f"{self.images} images of {self.image_source}"
        return f"proven: {self.max_abs_error:.1e} from PyTorch's embeddings at most, on {images}"


class BlockError(_Strict):
    """One block in INT8: the mean 1 - cosine that it causes alone, and the milliseconds an image that it saves by the
    profiler, both of the engine that ran the candidates (`export/precision/`: for TensorRT's graphs ONNX Runtime)."""

    block: str
    error: float
    milliseconds: float


class Quantisation(_Strict):
    """How an INT8 graph was made.

    `errors` is the mean 1 - cosine on held-out calibration images by method; `drop` the points of `drop_of` that INT8
    loses; `sweep` and `in_float` are filled where INT8 everywhere lost more than `max_drop`.
    """

    engine: str
    method: str
    errors: dict[str, float]
    images: int
    image_source: str
    images_sha256: str
    max_drop: float
    drop: float
    drop_of: str
    sweep: list[BlockError] = []
    in_float: list[str] = []


class EngineEntry(_Strict):
    """One built TensorRT plan. Its hash is in the manifest's `files`, under `file`.

    `compute_capability` ("8.6") is what the plan was built for; None: any GPU from Ampere on. `gpu` is the name of the
    GPU that a `tensorrt` plan was timed on; TensorRT-RTX times nothing, so its plans have none. `batch` is the profile:
    min, opt and max images a call. A plan with `fused_heads` ends with the feature maps.
    """

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.plan$")
    engine: TensorRtName
    version: str
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")
    gpu: str | None = None
    batch: tuple[Batch, Batch, Batch]
    fused_heads: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False


class Manifest(_Strict):
    schema_version: Literal[2] = 2
    model: ModelConfig
    flip: bool
    precision: Precision
    preprocessing: str
    files: dict[str, FileEntry]
    source_weights_sha256: str
    tools: dict[str, str]
    quantisation: Quantisation | None = None
    engines: list[EngineEntry] = []  # built TensorRT plans
    float32_nodes: list[str] = []  # of a graph with half precision: what would have overflowed
    proofs: dict[str, Proof] = {}

    @property
    def id(self) -> str:
        """SHA-256 of what determines the embeddings: the same with and without reference weights, whatever was
        proven."""
        content = self.model_dump(
            mode="json", include={"model", "flip", "precision", "preprocessing", "source_weights_sha256"}
        )
        content["graph"] = self.files[GRAPH].sha256
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def proof_in_words(self, backend: str) -> str:
        """How far a backend was found from PyTorch, in one line, or that nobody looked."""
        return self.proofs[backend].in_words if backend in self.proofs else "not proven"

    def has_fused_heads(self, backend: str) -> bool:
        """Whether a backend on a GPU was proven with fused heads here; without a proof, whether its plans were built
        so."""
        if backend in self.proofs:
            return self.proofs[backend].fused_heads
        return any(entry.fused_heads for entry in self.engines if entry.engine == backend)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and its hash. Whenever it is killed, the manifest is one that the hash file has a line of."""
    content = manifest.model_dump_json(indent=2).encode() + b"\n"
    line, hashes = hash_line(content), folder / MANIFEST_HASH
    before = hashes.read_bytes() if hashes.is_file() else b""
    for path, written in ((hashes, before + line), (folder / MANIFEST, content), (hashes, line)):
        write_bytes(path, written)


def hash_line(manifest: bytes) -> bytes:
    """As sha256sum writes it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """Validate a manifest's bytes.

    Raises:
        UserError: it is no manifest, of another schema, or has a key that is not known; `path` is named.
    """
    try:
        version = json.loads(content)["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{path} is not a manifest of mgn-deploy") from None
    if version != SCHEMA_VERSION:
        later = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "upgrade mgn-deploy" if later else "export the weights again with this mgn-deploy"
        raise UserError(f"{path} has schema {version!r} and this mgn-deploy reads schema {SCHEMA_VERSION}: {advice}")
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
