"""`mgn-deploy export` and `mgn-deploy prove`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgn_deploy.backends.registry import EXPORT_ENGINES
from mgn_deploy.choices import Precision
from mgn_deploy.cli.options import Bundle, EngineName, Json, ProofData, ProofImages, out
from mgn_deploy.console import percent, print_json, print_table, progress
from mgn_deploy.packages import require_training

if TYPE_CHECKING:
    from mgn_deploy.bundle import bundle as bundles
    from mgn_deploy.bundle.manifest import Proof


_precision = partial(typer.Option, rich_help_panel="Precision")
_plans = partial(typer.Option, rich_help_panel="Engine and TensorRT plans")
_content = partial(typer.Option, rich_help_panel="What the bundle holds")


def export(
    weights: Annotated[Path, typer.Argument(help="A weights folder: config.json and mgn.safetensors.")],
    folder: Annotated[Path, out("The bundle to write.")],
    precision: Annotated[Precision, _precision(help="Of the network; pixels and embeddings are float32 in all.")] = (
        "fp32"
    ),
    calib: Annotated[
        Path | None,
        _precision(help="Folder of images like those to come: int8 is calibrated on them, fp16's ranges are measured."),
    ] = None,
    calib_count: Annotated[int, _precision(help="Images to take of them, from every camera as many.")] = 500,
    max_drop: Annotated[
        float | None,
        _precision(help="Points that int8 may lose: of mAP with --data, else of top-10 agreement; 0.5 without it."),
    ] = None,
    engine: Annotated[
        EngineName | None,
        _plans(
            metavar="ENGINE",
            help=f"{', '.join(EXPORT_ENGINES)}: build its plans, and quantise an int8 graph as it wants it.",
        ),
    ] = None,
    batch: Annotated[
        str | None, _plans(help="Min, opt and max images a call of a plan, and of Triton; 1,8,64 without it.")
    ] = None,
    compute_capability: Annotated[
        str, _plans(help="Of the GPUs to build tensorrt-rtx plans for, as in 8.6,8.9,12.0; no GPU is needed here.")
    ] = "",
    workspace: Annotated[float | None, _plans(help="GiB of GPU memory that a layer may take; all without it.")] = None,
    version_compatible: Annotated[
        bool, _plans("--version-compatible", help="A tensorrt plan that later releases run, too.")
    ] = False,
    hardware_compatible: Annotated[
        bool, _plans("--hardware-compatible", help="A tensorrt plan for any GPU from Ampere on.")
    ] = False,
    fused_heads: Annotated[
        bool, _plans("--fused-heads", help="The plan ends with the feature maps; the heads run as one kernel.")
    ] = False,
    cache: Annotated[bool, _plans(help="Take plans from the cache and put them there.")] = True,
    proof_images: ProofImages = None,
    data: ProofData = None,
    flip: Annotated[bool, _content(help="Average the features of each image and its mirror, as in the paper.")] = True,
    reference: Annotated[
        bool, _content(help="Include the PyTorch weights, for prove, validate and --backend torch.")
    ] = True,
    triton: Annotated[
        Path | None, _content(help="Also write a model repository for Triton Inference Server, to this folder.")
    ] = None,
    sign: Annotated[
        Path | None, _content(help="Sign it with this Ed25519 private key (PEM); --verify-key checks it.")
    ] = None,
    json: Json = False,
) -> None:
    """Export weights to a bundle and prove it against PyTorch.

    The bundle holds one ONNX graph, and a proof of every engine that is installed here.
    """
    require_training()
    from mgn_deploy.datasets import open_data
    from mgn_deploy.export.exporter import export_bundle
    from mgn_deploy.export.options import ExportOptions, parse_batch, parse_capabilities

    options = ExportOptions(
        precision=precision,
        engine=engine,
        batch=parse_batch(batch) if batch else None,
        compute_capabilities=parse_capabilities(compute_capability),
        workspace=workspace,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        fused_heads=fused_heads,
        cache=cache,
        triton=triton,
        calib=calib,
        calib_count=calib_count,
        max_drop=max_drop,
        data=open_data(data) if data else None,
        flip=flip,
        reference=reference,
        proof_images=proof_images,
        sign=sign,
    )
    with progress("steps") as update:
        bundle = export_bundle(weights, folder, options, progress=update)
    _tell(bundle, bundle.manifest.proofs, json)


def prove(
    bundle: Bundle,
    proof_images: ProofImages = None,
    data: ProofData = None,
    sign: Annotated[Path | None, typer.Option(help="Sign the new proofs with this Ed25519 private key (PEM).")] = None,
    json: Json = False,
) -> None:
    """Prove a bundle again, on this machine's engines.

    The proofs of every engine that is installed here are written into the bundle, as after copying it to another
    machine. It needs PyTorch only for images that the export did not record, and for --data.
    """
    from mgn_deploy.bundle.bundle import Bundle
    from mgn_deploy.datasets import open_data
    from mgn_deploy.export.proof.prove import prove_again

    made = prove_again(bundle, proof_images=proof_images, data=open_data(data) if data else None, sign_key=sign)
    _tell(Bundle.open(bundle), made, json)


def _tell(bundle: bundles.Bundle, proofs: Mapping[str, Proof], json: bool) -> None:
    from mgn_deploy.export.proof.prove import require_passed

    if json:
        made = {name: proof.model_dump(mode="json") for name, proof in proofs.items()}
        print_json({"bundle": str(bundle.folder), "id": bundle.id, "proofs": made})
    else:
        _print_proofs(bundle.folder, proofs)
    require_passed(bundle.folder, proofs)


def _print_proofs(folder: Path, proofs: Mapping[str, Proof]) -> None:
    one = next(iter(proofs.values()))
    print_table(
        ["backend", "worst cosine", "mean cosine", "max abs error", "top-10 agreement", "batch drift", "proven"],
        [
            [
                name,
                f"{proof.worst_cosine:.8f}",
                f"{proof.mean_cosine:.8f}",
                f"{proof.max_abs_error:.2e}",
                f"{proof.top10_agreement:.4f}",
                f"{proof.batch_drift:.2e}",
                "yes" if proof.passed else "NO",
            ]
            for name, proof in proofs.items()
        ],
        title=f"{folder}: against PyTorch on {one.images} images of {one.image_source}"
        f" (mean cosine between different images {one.other_images_cosine:.3f})",
    )
    ranked = {name: proof.ranking for name, proof in proofs.items() if proof.ranking}
    if ranked:
        first = next(iter(ranked.values()))
        print_table(
            ["backend", "rank-1", "mAP", "reference rank-1", "reference mAP"],
            [
                [name, *map(percent, (one.rank1, one.mAP, one.reference_rank1, one.reference_mAP))]
                for name, one in ranked.items()
            ],
            title=f"{first.data}, {first.queries} queries, {first.gallery} gallery images, percent",
        )
