"""What an export is asked for. Options that contradict each other or would do nothing are refused before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, get_args

from mgn_deploy.backends.registry import ENGINES, EXPORT_ENGINES
from mgn_deploy.backends.tensorrt.builder import BuildSettings, check_batch
from mgn_deploy.bundle.manifest import DEFAULT_BATCH
from mgn_deploy.bundle.signature import read_private_key
from mgn_deploy.choices import Precision
from mgn_deploy.datasets import Dataset
from mgn_deploy.errors import UserError
from mgn_deploy.export.precision.calibration_images import COUNT, FEWEST

PathLike: TypeAlias = "str | os.PathLike[str]"
DEFAULT_MAX_DROP = 0.5  # points
MAX_WORKSPACE = 1024.0  # GiB
INT8_DEFAULT_ENGINE = "openvino"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `export_bundle`; each has the name of its command-line option.

    Args:
        precision: of the network; pixels, the heads' sums and the L2 norm are float32 in all.
        engine: one of `EXPORT_ENGINES`. "tensorrt" and "tensorrt-rtx" also build plans. The INT8 graph has its Q/DQ
            pairs where this engine wants them (None: OpenVINO); the other precisions' graphs are the same for every
            engine.
        batch: min, opt and max images a call of a plan, and of Triton; None: 1, 8, 64.
        compute_capabilities: as "8.6": a TensorRT-RTX plan for each; none: one for any GPU from Ampere on.
        workspace: GiB of GPU memory that a layer may take; None: all.
        version_compatible: a TensorRT plan that later releases run too.
        hardware_compatible: a TensorRT plan for any GPU from Ampere on.
        fused_heads: the plan ends with the feature maps, and the engine goes on by the stripe-pool-reduce kernel.
        cache: take plans from the cache and put them there.
        triton: folder of a model repository for Triton Inference Server to write as well.
        calib: folder of images to calibrate INT8 on; FP16's ranges are measured on them, too.
        calib_count: images to take of them, from every camera as many.
        max_drop: points that INT8 may lose: of mAP with `data`, else of top-10 agreement; None: 0.5.
        data: labelled queries and gallery: each proof also has their rank-1 and mAP.
        flip: average the features of image and mirror in the graph (section 4.1).
        reference: put the PyTorch weights into the bundle, for the torch backend, `prove` and `validate`.
        proof_images: folder of images to prove on; None: drawn people.
        sign: PEM file of an Ed25519 private key to sign the bundle with.

    Raises:
        UserError: a value that cannot be, or an option that does not go with the others.
    """

    precision: Precision = "fp32"
    engine: str | None = None
    batch: tuple[int, int, int] | None = None
    compute_capabilities: tuple[str, ...] = ()
    workspace: float | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    fused_heads: bool = False
    cache: bool = True
    triton: PathLike | None = None
    calib: PathLike | None = None
    calib_count: int = COUNT
    max_drop: float | None = None
    data: Dataset | None = None
    flip: bool = True
    reference: bool = True
    proof_images: PathLike | None = None
    sign: PathLike | None = None

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise UserError(f"--precision {self.precision}: choose {', '.join(get_args(Precision))}")
        if self.engine is not None and self.engine not in EXPORT_ENGINES:
            raise UserError(f"--engine {self.engine}: choose {', '.join(EXPORT_ENGINES)}")
        self._check_plan_options()
        self._check_calibration()
        if self.sign is not None:
            read_private_key(self.sign)
        if self.triton is not None:
            self._check_triton(Path(self.triton))

    @property
    def int8_engine(self) -> str:
        """Whose INT8 placement the graph has."""
        return self.engine or INT8_DEFAULT_ENGINE

    @property
    def int8_budget(self) -> float:
        """Points that INT8 may lose."""
        return DEFAULT_MAX_DROP if self.max_drop is None else self.max_drop

    @property
    def batch_sizes(self) -> tuple[int, int, int]:
        return self.batch or DEFAULT_BATCH

    def build_settings(self) -> BuildSettings | None:
        """Of the plans, all but the compute capability; None where none are built."""
        if self.engine is None or not ENGINES[self.engine].builds_plans:
            return None
        return BuildSettings(
            self.engine,  # type: ignore[arg-type]
            self.batch_sizes,
            workspace=None if self.workspace is None else int(self.workspace * 2**30),
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
            fused_heads=self.fused_heads,
        )

    def _check_plan_options(self) -> None:
        if self.batch is not None:
            check_batch(self.batch)
        if self.workspace is not None and not 0 < self.workspace <= MAX_WORKSPACE:
            raise UserError(f"--workspace {self.workspace}: GiB are above 0 and at most {MAX_WORKSPACE:g}")
        given: Mapping[str, object] = {
            "batch": self.batch and self.triton is None,
            "compute_capabilities": self.compute_capabilities,
            "workspace": self.workspace,
            "version_compatible": self.version_compatible,
            "hardware_compatible": self.hardware_compatible,
            "fused_heads": self.fused_heads,
            "cache": not self.cache,
        }
        allowed = ENGINES[self.engine].plan_options if self.engine else ()
        for field in (field for field, value in given.items() if value and field not in allowed):
            engines = [row.name for row in ENGINES.values() if field in row.plan_options]
            raise UserError(f"{_option(field)} is about TensorRT plans: it goes with --engine {' or '.join(engines)}")

    def _check_calibration(self) -> None:
        if self.precision == "int8" and self.calib is None:
            raise UserError("INT8 needs images to calibrate on: --calib DIR, some 500 like those that it will see")
        if self.precision in ("fp32", "bf16") and self.calib is not None:
            raise UserError(f"--calib is of no use to {self.precision}: it goes with --precision int8 or fp16")
        if self.calib is None and self.calib_count != COUNT:
            raise UserError("--calib-count is about calibration images: it goes with --calib DIR")
        if self.calib_count < FEWEST:
            raise UserError(f"--calib-count {self.calib_count}: at least {FEWEST} images are needed")
        if self.max_drop is None:
            return
        if self.precision != "int8":
            raise UserError("--max-drop is about INT8: it goes with --precision int8")
        if not 0 <= self.max_drop <= 100:
            raise UserError(f"--max-drop {self.max_drop}: points are from 0 to 100")

    def _check_triton(self, out: Path) -> None:
        if self.fused_heads:
            raise UserError("--triton: Triton serves whole graphs, leave out --fused-heads")
        if out.exists() and not out.is_dir():
            raise UserError(f"--triton {out} is a file: give a folder, new or with other models of the repository")
        runs_int8 = self.int8_engine in ENGINES["onnxruntime"].int8_for
        served = runs_int8 if self.precision == "int8" else self.precision in ENGINES["onnxruntime"].precisions
        if self.engine != "tensorrt" and not served:
            raise UserError(
                f"Triton runs graphs by ONNX Runtime, which a {self.precision} graph for {self.int8_engine} is not "
                "for: --triton goes with --engine tensorrt, with fp32 or fp16, or with int8 and --engine onnxruntime"
            )


def parse_batch(text: str) -> tuple[int, int, int]:
    """Read "1,32,64" as min, opt and max images a call.

    Raises:
        UserError: not three whole numbers, 1 <= min <= opt <= max <= 4096.
    """
    try:
        smallest, best, largest = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--batch {text}: it takes three whole numbers, min, opt and max images, as in 1,32,64"
        ) from None
    check_batch((smallest, best, largest))
    return smallest, best, largest


def parse_capabilities(text: str) -> tuple[str, ...]:
    """Read "8.6,8.9" as ("8.6", "8.9"), each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _option(field: str) -> str:
    return {"cache": "--no-cache", "compute_capabilities": "--compute-capability"}.get(
        field, f"--{field.replace('_', '-')}"
    )
