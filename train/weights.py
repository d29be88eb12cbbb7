"""Weights on disk: a folder of `config.json` (what the model is) and `mgn.safetensors` (its tensors). No pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mgn_deploy.choices import MAX_SEED
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError, first_problem
from mgn_deploy.files import atomic_folder, sha256_file
from mgn_deploy.train.memory import explained_memory, require_memory
from mgn_deploy.train.model import MGN
from mgn_deploy.train.resnet import build_resnet
from mgn_deploy.train.tensor_file import read_checkpoint, read_tensor_file

_log = logging.getLogger("mgn_deploy")

CONFIG = "config.json"
TENSORS = "mgn.safetensors"
IMPORT = "import.json"

NOISE = 0.1  # of a parameter's spread


def save_weights(model: MGN, folder: str | os.PathLike[str], imported: dict[str, Any] | None = None) -> None:
    """Write the model's config and tensors; the folder appears whole or not at all, replacing an earlier one.

    Args:
        model: on any device, in any memory format.
        folder: the weights folder.
        imported: where the weights are from (`train/importers`), kept beside them and no part of their hash.

    Raises:
        UserError: the folder holds something else, may not be written, or the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_folder(Path(folder), names=(CONFIG, TENSORS, IMPORT)) as new:
        (new / TENSORS).write_bytes(save(tensors))  # save_file tells of a full disk as no OSError
        (new / CONFIG).write_text(model.config.model_dump_json(indent=2) + "\n")
        if imported is not None:
            (new / IMPORT).write_text(json.dumps(imported, indent=2) + "\n")


def load_weights(folder: str | os.PathLike[str]) -> MGN:
    """Read the model of a weights folder, in eval mode, on the CPU.

    Raises:
        UserError: not a weights folder, an unknown key in the config, or tensors that are not this model's.
    """
    folder = Path(folder)
    if not (folder / TENSORS).is_file() or not (folder / CONFIG).is_file():
        inner = next((path.parent for path in sorted(folder.glob(f"*/{TENSORS}"), reverse=True)), None)
        raise UserError(
            f"{folder} is not a weights folder: it needs {CONFIG} and {TENSORS}, as `mgn-deploy init`, `train` and "
            f"`import` write them{f'; {inner} is one' if inner else ''}"
        )
    try:
        config = ModelConfig.model_validate_json((folder / CONFIG).read_bytes())
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG}: {first_problem(error)}") from None
    return _model_with(read_tensor_file(folder / TENSORS), config, f"{folder / TENSORS} does not fit its {CONFIG}")


def reference_model(content: bytes, config: ModelConfig) -> MGN:
    """Read the model of a bundle's reference weights, in eval mode, on the CPU.

    Raises:
        UserError: they are no safetensors, or not this model's.
    """
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise UserError(f"the bundle's reference weights are no whole safetensors file ({error})") from None
    return _model_with(tensors, config, "the bundle's reference weights do not fit its manifest")


def weights_hash(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over the hashes of the config and the tensors of a weights folder, in hex."""
    digest = hashlib.sha256()
    for name in (CONFIG, TENSORS):
        digest.update(f"{name} {sha256_file(Path(folder) / name)}\n".encode())
    return digest.hexdigest()


def empty_model(config: ModelConfig) -> MGN:
    """Make a model that has names and shapes but no storage: fast, for tensors that come from a file.

    Raises:
        UserError: torchvision has no ResNet of the config's name.
    """
    with torch.device("meta"):
        return MGN(config)


def new_model(config: ModelConfig, init: str | os.PathLike[str] = "random", seed: int = 0) -> MGN:
    """Make an untrained MGN. Its branches are copies of one another, as training starts (section 4.1).

    Args:
        config: the model.
        init: "random"; "imagenet" for torchvision's default weights (downloaded once, by torchvision), copied to the
            trunk and every branch; or a local `.pth` or `.safetensors` file of a torchvision ResNet's state dict.
        seed: of the random weights (of the reductions and classifiers in any case).

    Raises:
        UserError: the weights can be neither downloaded nor read, or are another network's; a seed out of range; or a
            model that the memory does not hold.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"--seed {seed}: seeds are 0 to {MAX_SEED}")
    require_memory(sum(parameter.nbytes for parameter in empty_model(config).parameters()))
    with explained_memory(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        resnet = build_resnet(config)
        if str(init) != "random":
            _load_resnet(resnet, config.backbone, init)
        return MGN(config, resnet)


def write_untrained_weights(
    folder: str | os.PathLike[str], config: ModelConfig, init: str | os.PathLike[str] = "random", seed: int = 0
) -> None:
    """Write the weights folder of an untrained MGN; random weights get noise, so that no branch is another's copy.

    Args:
        folder: the weights folder.
        config, init, seed: as in `new_model`.

    Raises:
        UserError: as `new_model` and `save_weights`.
    """
    model = new_model(config, init, seed)
    if str(init) == "random":
        add_noise(model, seed)
    save_weights(model, folder)
    _log.info(
        f"{os.fspath(folder)}: {config.backbone} MGN {config.branches} at {config.height}x{config.width}, {init} "
        "weights, not trained"
    )


def add_noise(model: MGN, seed: int = 0) -> None:
    """Move every parameter by a tenth of its spread, so that the branches differ as after training.

    In an untrained model the branches are copies of one another, of which an engine may compute one: the speed of such
    weights is not that of trained ones.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(NOISE * noise * (1 if parameter.ndim == 1 else parameter.std()))


def fine_tuned_model(folder: str | os.PathLike[str], num_classes: int, height: int, width: int, seed: int = 0) -> MGN:
    """Make the model of a weights folder for another input size and other people: same network, same weights.

    Its classifiers are kept where there are as many classes; else they are new, random by `seed`.

    Raises:
        UserError: not a weights folder, one that is damaged, or a size out of range.
    """
    folder = Path(folder)
    trained = load_weights(folder.parent if folder.name == TENSORS else folder)
    before = trained.config.num_classes
    changes = {"num_classes": num_classes, "height": height, "width": width}
    model = new_model(ModelConfig.checked(**{**trained.config.model_dump(), **changes}), seed=seed)
    state = trained.state_dict()
    if before != num_classes:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("classifiers.")}
    model.load_state_dict(model.state_dict() | state)
    heads = "kept" if before == num_classes else f"dropped, new ones for {num_classes} people take their place"
    _log.info(
        f"starting from {os.fspath(folder)}: {trained.config.backbone} MGN {trained.config.branches}"
        + (f"; its classifiers of {before} people are {heads}" if before else "")
    )
    return model


def _load_resnet(resnet: nn.Module, backbone: str, init: str | os.PathLike[str]) -> None:
    if str(init) != "imagenet" and not Path(init).is_file():
        raise UserError(f"--init {init}: no such file; it takes random, imagenet, or a ResNet's state dict")
    state = _download_imagenet(backbone) if str(init) == "imagenet" else read_checkpoint(Path(init)).tensors
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    own = {name: tensor for name, tensor in resnet.state_dict().items() if not name.startswith("fc.")}
    wrong = sorted(name for name in own.keys() ^ state.keys() if not name.endswith("num_batches_tracked"))
    wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        raise UserError(
            f"{init}: not the state dict of torchvision's {backbone} ({len(wrong)} tensors differ, first "
            f"{wrong[0]!r}): of a public MGN, `mgn-deploy import` makes a weights folder"
        )
    resnet.load_state_dict(state, strict=False)


def _download_imagenet(backbone: str) -> dict[str, Tensor]:
    import torchvision

    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a proxy's page in place of the file, a damaged file in torch's cache
        raise UserError(
            f"torchvision's ImageNet weights of {backbone} cannot be downloaded ({error}): fetch {weights.url} "
            "elsewhere and give the file with --init FILE, or start from random weights with --init random"
        ) from None


def _model_with(tensors: dict[str, Tensor], config: ModelConfig, wrong: str) -> MGN:
    """Make a config's model of these tensors; they are compared before it takes memory."""
    model = empty_model(config)
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise UserError(f"{wrong}: tensor {name!r} is missing")
        found, needed = list(tensors[name].shape), list(tensor.shape)
        if found != needed:
            raise UserError(f"{wrong}: tensor {name!r} has shape {found}, the model needs {needed}")
    extra = sorted(tensors.keys() - own.keys())
    if extra:
        raise UserError(f"{wrong}: tensor {extra[0]!r} is not the model's")
    model.to_empty(device="cpu").load_state_dict(tensors)
    return model.eval()
