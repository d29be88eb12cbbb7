"""`mgn-deploy init`, `export` and `prove`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mgn_deploy.console import print_json, print_table, progress, say
from mgn_deploy.errors import GateFailed
from mgn_deploy.packages import require_training

if TYPE_CHECKING:
    from mgn_deploy.bundle.bundle import Bundle
    from mgn_deploy.bundle.manifest import Proof


def init(
    out: Path = typer.Option(..., "-o", "--out", help="The weights folder to write."),
    backbone: str = typer.Option("resnet50", help="A torchvision ResNet."),
    size: str = typer.Option("384x128", help="Input HEIGHTxWIDTH in pixels."),
    branches: str = typer.Option("1,2,3", help="Stripes of each branch; 1 is the global branch."),
    start: str = typer.Option(
        "imagenet",
        "--init",
        help="imagenet (downloaded by torchvision), random (no branch a copy of another), or the file of a ResNet's state dict.",
    ),
    seed: int = typer.Option(0, help="Of the random weights."),
) -> None:
    """Write the weights of an untrained MGN."""
    from mgn_deploy.config import ModelConfig, parse_branches, parse_size

    height, width = parse_size(size)
    config = ModelConfig.checked(backbone=backbone, height=height, width=width, branches=parse_branches(branches))
    require_training()
    from mgn_deploy.train.weights import write_untrained_weights

    write_untrained_weights(out, config, start, seed)
    print(out)


def export(
    weights: Path = typer.Argument(help="A weights folder: config.json and mgn.safetensors."),
    out: Path = typer.Option(..., "-o", "--out", help="The bundle to write."),
    precision: str = typer.Option("fp32", help="fp32, fp16, bf16 or int8."),
    fused_heads: bool = typer.Option(False, help="The plan ends with the feature maps; the heads run as one kernel."),
    engine: str | None = typer.Option(
        None,
        help="openvino, onnxruntime, tensorrt or tensorrt-rtx: the last two also build plans; an int8 graph is placed for one of them.",
    ),
    batch: str | None = typer.Option(
        None, help="Fewest, best and most images a call of a TensorRT plan, and of Triton; 1,8,64 without it."
    ),
    compute_capability: str = typer.Option(
        "", help="Of the GPUs to build tensorrt-rtx plans for, as in 8.6,8.9,12.0; no GPU is needed here."
    ),
    workspace: float | None = typer.Option(None, help="GiB of GPU memory that a layer may take; all without it."),
    version_compatible: bool = typer.Option(False, help="A tensorrt plan that later versions run, too."),
    hardware_compatible: bool = typer.Option(False, help="A tensorrt plan for any GPU from Ampere on."),
    cache: bool = typer.Option(True, help="Take plans from the cache and put them there."),
    triton: Path | None = typer.Option(None, help="Also write a model repository for Triton Inference Server."),
    calib: Path | None = typer.Option(
        None, help="Folder of images like those to come: int8 is calibrated on them, fp16's ranges are looked at."
    ),
    calib_count: int = typer.Option(500, help="Images to take of them, from every camera as many."),
    max_drop: float | None = typer.Option(
        None, help="Points that int8 may lose: of mAP with --data, else of top-10 agreement; 0.5 without it."
    ),
    data: str | None = typer.Option(
        None,
        help="KIND:DIR, labelled people: ranked beside the reference, and int8's mAP is held on them; see validate.",
    ),
    flip: bool = typer.Option(True, help="Average the features of each image and its mirror, as in the paper."),
    reference: bool = typer.Option(
        True, help="Put the PyTorch weights into the bundle, for --backend torch and validate."
    ),
    proof_images: Path | None = typer.Option(
        None, help="Folder of images to prove the engines on; drawn people without it."
    ),
    json: bool = typer.Option(False, "--json", help="Print the proofs as JSON."),
) -> None:
    """Export weights to a bundle (one ONNX graph) and prove every engine that is installed here against PyTorch."""
    require_training()
    from mgn_deploy.datasets import open_data
    from mgn_deploy.export.exporter import export_bundle
    from mgn_deploy.export.options import ExportOptions, parse_batch, parse_capabilities

    options = ExportOptions(
        precision=precision,  # type: ignore[arg-type]
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
    )
    with progress("steps") as update:
        bundle = export_bundle(weights, out, options, progress=update)
    _tell(bundle, bundle.manifest.proofs, json)


def prove(
    bundle: Path = typer.Argument(help="A bundle that was exported elsewhere."),
    proof_images: Path | None = typer.Option(
        None, help="Folder of images to prove the engines on; drawn people without it."
    ),
    data: str | None = typer.Option(None, help="KIND:DIR, labelled people to rank beside the reference; see validate."),
    json: bool = typer.Option(False, "--json", help="Print the proofs as JSON."),
) -> None:
    """Prove a bundle with every engine that is installed here, and write the proofs into it."""
    require_training()
    from mgn_deploy.bundle.bundle import Bundle
    from mgn_deploy.datasets import open_data
    from mgn_deploy.export.proof.prove import prove_again

    labelled = open_data(data) if data else None
    made = prove_again(bundle, proof_images=proof_images, data=labelled)
    _tell(Bundle.open(bundle), made, json)


def _tell(bundle: Bundle, proofs: Mapping[str, Proof], json: bool) -> None:
    out = bundle.folder
    if json:
        print_json(
            {
                "bundle": str(out),
                "id": bundle.id,
                "proofs": {name: proof.model_dump(mode="json") for name, proof in proofs.items()},
            }
        )
    else:
        one = next(iter(proofs.values()))
        print_table(
            ["backend", "worst cosine", "mean cosine", "max abs error", "top-10 agreement", "batch drift", "proven"],
            [
                [
                    name,
                    f"{p.worst_cosine:.8f}",
                    f"{p.mean_cosine:.8f}",
                    f"{p.max_abs_error:.2e}",
                    f"{p.top10_agreement:.4f}",
                    f"{p.batch_drift:.2e}",
                    "yes" if p.passed else "NO",
                ]
                for name, p in proofs.items()
            ],
            title=f"{out}: against PyTorch on {one.images} images of {one.image_source}"
            f" (mean cosine between different images {one.other_images_cosine:.3f})",
        )
        ranked = {name: p.ranking for name, p in proofs.items() if p.ranking}
        if ranked:
            first = next(iter(ranked.values()))
            print_table(
                ["backend", "rank-1", "mAP", "reference rank-1", "reference mAP"],
                [
                    [name, *(f"{100 * value:.2f}" for value in (r.rank1, r.mAP, r.reference_rank1, r.reference_mAP))]
                    for name, r in ranked.items()
                ],
                title=f"{first.data}, {first.queries} queries, {first.gallery} gallery images, percent",
            )
        if one.drawn:
            say("The proof is on drawn images: --proof-images DIR proves on yours.")
    failed = {name: proof.misses for name, proof in proofs.items() if not proof.passed}
    if failed:
        raise GateFailed(
            f"{out} is not proven for " + "; ".join(f"{name} ({', '.join(misses)})" for name, misses in failed.items())
        )
