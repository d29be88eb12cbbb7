"""Recipes: everything that decides a training run, as a small TOML file with `--set key=value` on top."""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mgn_deploy.choices import MAX_SEED
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError, first_problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent / "recipes"


Finite = Annotated[float, Field(ge=0, le=1e30)]  # float32, which the network computes in, ends at 3e38
Count = Annotated[int, Field(ge=1, le=10**9)]
# TOML's are lists, and the tables take no other type than their own elsewhere.
Branches = Annotated[tuple[int, ...], Field(strict=False)]
Steps = Annotated[tuple[Count, ...], Field(strict=False)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelTable(_Table):
    """The network, as in `ModelConfig`, and what training starts from."""

    backbone: str = "resnet50"
    base_width: int = 64
    branches: Branches = (1, 2, 3)
    reduced_width: int = 256
    height: int = 384
    width: int = 128
    # imagenet, random, or the file of a torchvision ResNet's state dict; or a weights folder to go on from, imported
    # ones too: then all but height and width is as in that folder.
    init: str = Field("imagenet", min_length=1)

    def config(self, num_classes: int) -> ModelConfig:
        """Make the config of a network for that many identities.

        Raises:
            UserError: a value is out of range.
        """
        return ModelConfig.checked(**self.model_dump(exclude={"init"}), num_classes=num_classes)


class Batch(_Table):
    """P x K batches (section 4.1)."""

    identities: int = Field(16, ge=2, le=4096)
    images: int = Field(4, ge=1, le=4096)
    accumulate: Count = 1  # batches whose gradients are averaged before a step


class Optim(_Table):
    """The optimizer, over every parameter: SGD with momentum is the paper's (section 4.1)."""

    name: Literal["sgd", "adam"] = "sgd"
    lr: float = Field(0.01, gt=0, le=1e30)
    momentum: float = Field(0.9, ge=0, lt=1)  # of sgd
    weight_decay: Finite = 5e-4


class Schedule(_Table):
    """How long a run is, and its learning rate over that time."""

    epochs: Count = 80
    kind: Literal["steps", "cosine"] = "steps"
    steps: Steps = ()
    gamma: float = Field(0.1, gt=0, le=1)
    warm_up: float = Field(0.0, ge=0, lt=1)  # share of the run over which the rate rises linearly
    max_seconds: Finite = 0.0  # end by then, the schedule squeezed to fit; 0: no limit

    def rate_factor(self, done: float) -> float:
        """Return what the learning rate is multiplied by when the share `done` (0 to 1) of the run is over."""
        if done < self.warm_up:
            return max(0.01, done / self.warm_up)
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (done - self.warm_up) / (1 - self.warm_up)))
        epoch = done * self.epochs + 1e-9  # 40/80 * 80 must not be 39.999
        return self.gamma ** sum(epoch >= step for step in self.steps)


class Loss(_Table):
    """The two losses (section 3.2); `margin` is in the features' unit."""

    margin: Finite = 1.2
    soft_margin: bool = False
    softmax_weight: Finite = 1.0
    triplet_weight: Finite = 1.0
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class Augment(_Table):
    """What training images undergo."""

    flip: float = Field(0.5, ge=0, le=1)  # share of images mirrored
    erase: float = Field(0.0, ge=0, le=1)  # share of images with a random rectangle erased (Zhong et al. 2017)
    pad: int = Field(0, ge=0, le=4096)  # pixels of black around the image before a random crop of the old size


class Loop(_Table):
    """Seed, number formats and evaluation of the loop."""

    seed: int = Field(0, ge=0, le=MAX_SEED)
    amp: Literal["off", "bf16", "fp16"] = "off"
    compile: bool = False
    evaluate_every: Count = 10  # epochs


class Recipe(_Table):
    """All that decides a run but the data; the defaults are the paper's, except for `schedule.steps` (none)."""

    model: ModelTable = ModelTable()
    batch: Batch = Batch()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    augment: Augment = Augment()
    loop: Loop = Loop()


def load_recipe(
    name: str | os.PathLike[str], overrides: Sequence[str] = (), init: str | os.PathLike[str] | None = None
) -> Recipe:
    """Read a shipped recipe (`paper`, `strong`, `cpu`, `small`) or a TOML file, and apply overrides in order.

    Args:
        name: of a shipped recipe, or the path of a `.toml` file.
        overrides: as "optim.lr=0.02"; the value is TOML, or a bare word.
        init: what `model.init` is, whatever the recipe says.

    Raises:
        UserError: no such recipe, broken TOML, an unknown key (with the nearest known one), or a value out of range.
    """
    own = Path(name).suffix == ".toml"
    path = Path(name) if own else SHIPPED / f"{name}.toml"
    if not path.is_file():
        if own:
            raise UserError(f"{path}: no such recipe file")
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise UserError(f"no recipe {str(name)!r}: choose {known}, or give a .toml file")
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not valid TOML: byte {error.start} is not UTF-8, save it as that") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or of a number of 5000 digits its base
        raise UserError(f"{name}: not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    for override in overrides:
        _apply(content, *_parse(override))
    if init is not None:
        _apply(content, "model", "init", os.fspath(init))
    _refuse_unknown(content, str(name))
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"recipe {name}: {first_problem(error).replace('tuple', 'list')}") from None
    try:
        recipe.model.config(num_classes=0)
    except UserError as error:
        raise UserError(f"recipe {name}: model.{error}") from None
    return recipe


def _parse(override: str) -> tuple[str, str, Any]:
    """Split "table.key=value", and read the value."""
    key, equals, value = override.partition("=")
    table, dot, name = key.strip().partition(".")
    if not equals or not dot:
        raise UserError(f"--set {override}: give table.key=value, as in optim.lr=0.02")
    try:
        return table, name, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return table, name, value.strip()  # a bare word, as in optim.name=adam


def _apply(content: dict[str, Any], table: str, name: str, value: Any) -> None:
    if isinstance(content.setdefault(table, {}), dict):  # what is no table is refused later, by its name
        content[table][name] = value


def _refuse_unknown(content: dict[str, Any], where: str) -> None:
    """Refuse keys that no table has, naming the nearest known one: pydantic's own message does not."""
    known = [f"{table}.{key}" for table, field in Recipe.model_fields.items() for key in field.annotation.model_fields]  # type: ignore[union-attr]
    for table, keys in content.items():
        for key in keys if isinstance(keys, dict) else [""]:
            full = f"{table}.{key}" if key else table
            if full not in known:
                near = difflib.get_close_matches(full, known, n=1, cutoff=0) or known[:1]
                raise UserError(f"recipe {where}: no key {full!r}; did you mean {near[0]!r}?")
