"""A public checkpoint -> a weights folder whose embeddings are the original's.

Every tensor of the file is used, or dropped by a rule that has a reason, or the file is refused: no lenient loading.
What no tensor tells is assumed to be as in the public code, and reported.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mgn_deploy.choices import GlobalStride, Pooling, SourceName, StemPool
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError, first_names
from mgn_deploy.files import sha256_file
from mgn_deploy.train.importers import fastreid, levyfan, seathiefwang
from mgn_deploy.train.importers.settings import Assumption, settings
from mgn_deploy.train.importers.source import Source
from mgn_deploy.train.model import GEM_POWER, MGN
from mgn_deploy.train.tensor_file import read_checkpoint
from mgn_deploy.train.weights import empty_model, save_weights


@dataclass(frozen=True)
class Dropped:
    """Tensors, by their names in the file, that are not used, and why."""

    reason: str
    names: list[str]


@dataclass(frozen=True)
class Report:
    """What an import made of a checkpoint; also in the weights folder, as `import.json`.

    - `source`, `title`: whose code wrote it, as in `--from` and for people.
    - `checkpoint`, `sha256`: the file's name and hash.
    - `read`: what of the model the tensors told; `given`: what the caller said; `assumed`: what neither did.
    - `dropped`: tensors that are not used; `filled`: counters that the file lacks, by its names, set to 0.
    - `evaluation`: how the source's own figures were made.
    """

    source: str
    title: str
    checkpoint: str
    sha256: str
    read: dict[str, Any]
    assumed: list[Assumption]
    given: dict[str, Any]
    dropped: list[Dropped]
    filled: list[str]
    evaluation: str


def import_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    source: SourceName = "auto",
    *,
    pooling: Pooling | None = None,
    global_stride: GlobalStride | None = None,
    stem_pool: StemPool | None = None,
    size: tuple[int, int] | None = None,
) -> Report:
    """Write the weights folder of a public MGN checkpoint.

    Args:
        path: a file of `torch.save` or safetensors.
        out: the weights folder; it appears whole, replacing an earlier one.
        source: whose code wrote it; another one than the tensors tell is refused.
        pooling, global_stride, stem_pool: as in `ModelConfig`, instead of what the public code does.
        size: height and width of the input in pixels; None: 384 and 128.

    Raises:
        UserError: the file cannot be read, is of no code that is known here, has a tensor too many, too few or of
            another shape, has values that no trained network has, or does not tell how it pools and `pooling` is None.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    try:
        found = detect(checkpoint.tensors, source)
        _require_sound_values(checkpoint.tensors)
        given = {"pooling": pooling, "global_stride": global_stride, "stem_pool": stem_pool, "size": size}
        given = {name: value for name, value in given.items() if value is not None}
        config, read, assumed = settings(found, checkpoint.tensors, given)
        model = empty_model(config)
        tensors, filled = _translate(found, checkpoint.tensors, model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    model.load_state_dict(tensors, assign=True)
    dropped: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        if name in found.dropped:
            dropped.setdefault(found.dropped[name], []).append(name)
    if checkpoint.beside:
        dropped["beside the model in the file"] = list(checkpoint.beside)
    report = Report(
        source=found.name,
        title=found.title,
        checkpoint=path.name,
        sha256=sha256_file(path),
        read=read,
        assumed=assumed,
        given=given,
        dropped=[Dropped(reason, names) for reason, names in dropped.items()],
        filled=filled,
        evaluation=found.evaluation,
    )
    save_weights(model, out, asdict(report))
    return report


def detect(tensors: dict[str, Tensor], wanted: SourceName = "auto") -> Source:
    """Tell the source of these tensors.

    Raises:
        UserError: no MGN, one of code that is not known here, one that our model cannot be, or another one than
            `wanted`.
    """
    if wanted not in get_args(SourceName):
        raise UserError(f"--from {wanted}: choose one of {', '.join(get_args(SourceName))}")
    for module in (seathiefwang, fastreid, levyfan):
        source = module.recognise(tensors)
        if source is None:
            continue
        if wanted not in ("auto", source.name):
            raise UserError(f"this looks like {source.title}, not like {wanted}: use --from {source.name}")
        return source
    raise UserError(_explanation(tensors))


def _explanation(tensors: dict[str, Tensor]) -> str:
    """Say why these tensors, which are no known MGN, cannot be imported."""
    if "trunk.0.weight" in tensors:
        return "this is mgn-deploy's own model already: `mgn-deploy export` takes the weights folder that it is from"
    if "backbone.conv1.weight" in tensors and any(key.startswith("heads.") for key in tensors):
        return "a fast-reid baseline (BoT, AGW or SBS), not an MGN"
    if any(re.match(r"(module\.)?classifier\d*\.add_block\.", key) for key in tensors):
        return (
            "a baseline or PCB of layumi/Person_reID_baseline_pytorch, which has no MGN: nothing here can be made of it"
        )
    if "conv1.weight" in tensors and "layer4.0.conv1.weight" in tensors:
        return "a bare ResNet, not an MGN: give it to `mgn-deploy init --init FILE`"
    return f"no MGN that is known here; its first tensors are {', '.join(list(tensors)[:5])}"


def _translate(source: Source, tensors: dict[str, Tensor], model: MGN) -> tuple[dict[str, Tensor], list[str]]:
    """Make our tensors from theirs, and list the counters that are not in the file."""
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".powers")}
    theirs = {own: source.theirs(own) for own in expected}
    known = {*theirs.values(), *source.dropped, *source.pixels, *source.powers}
    unknown = [name for name in tensors if name not in known]
    lacking = [name for name in dict.fromkeys(theirs.values()) if name not in tensors]
    filled = [name for name in lacking if name.endswith(".num_batches_tracked")]
    missing = [name for name in lacking if name not in filled]
    for group in (source.powers, source.pixels):
        missing += [name for name in group if name not in tensors and any(other in tensors for other in group)]
    problems = []
    if unknown:
        problems.append(f"has {first_names(unknown)}, which {source.title} has not")
    if missing:
        problems.append(f"lacks {first_names(missing)}")
    if problems:
        raise UserError(" and ".join(problems))
    ours: dict[str, Tensor] = {}
    for own, needed in expected.items():
        tensor = tensors.get(theirs[own], torch.tensor(0))
        if tensor.shape != needed.shape:
            raise UserError(
                f"{theirs[own]} has shape {list(tensor.shape)} where a {model.config.backbone} of this width needs "
                f"{list(needed.shape)}"
            )
        ours[own] = tensor.to(needed.dtype, copy=True)
    if model.config.pooling == "gem":
        powers = _powers(source, tensors, model.config).split(list(model.config.features_per_branch))
        ours |= {f"branches.{branch}.powers": power for branch, power in enumerate(powers)}
    return ours, filled


def _powers(source: Source, tensors: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """Return the powers of the generalised mean, float32 `[features]`; where the file has none, the fixed one."""
    powers = {name: tensors[name] for name in source.powers if name in tensors}
    for name, power in powers.items():
        if power.numel() != 1 or power.item() <= 0:
            raise UserError(f"{name} is {power.tolist()}, and the power of a generalised mean is one positive number")
    if not powers:
        return torch.full((config.features,), GEM_POWER)
    return torch.cat([power.reshape(1) for power in powers.values()])


def _require_sound_values(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or (
            not tensor.is_floating_point() and not name.endswith("num_batches_tracked")
        ):
            raise UserError(
                f"{name} is a tensor of {tensor.dtype}, {tensor.layout}: only plain floating point can be imported"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} has values that are not finite")
        if name.endswith("running_var") and (tensor < 0).any():
            raise UserError(f"{name} has negative variances")
