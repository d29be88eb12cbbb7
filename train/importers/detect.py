"""Which public code a checkpoint is of, by the names of its tensors."""

from __future__ import annotations

import re
from typing import get_args

from torch import Tensor

from mgn_deploy.choices import SourceName
from mgn_deploy.errors import UserError
from mgn_deploy.train.importers import fastreid, levyfan, seathiefwang
from mgn_deploy.train.importers.source import Source


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
