"""JDAI-CV/fast-reid, meta-architecture MGN, in two of its three generations of heads.

Sources: fastreid/modeling/meta_arch/mgn.py, heads/*.py, layers/pooling.py and configs/ of commits 95a3c62a (2020) to
1dce15ef (the newest). The checkpoints of the model zoo (`*_mgn_R50-ibn.pth`) are of the first generation.

Input: RGB, Pillow's bicubic, 0 to 255 minus PIXEL_MEAN by PIXEL_STD: as ours.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mgn_deploy.errors import UserError
from mgn_deploy.train.importers.source import REDUCTIONS, Source, network_table

HEADS = ("b1", "b2", "b21", "b22", "b3", "b31", "b32", "b33")  # in the order of our features

TRAINING_ONLY = "classifiers: only training uses them"
EVALUATION = (
    "fast-reid's figures are cosine similarity of whole embeddings without the mirror average: "
    "export with --no-flip to compare with them"
)

# Pooling, convolution, norm, ReLU, and the "bnneck", whose output is compared.
POOL_AND_BNNECK = Source(
    name="fastreid",
    title="fast-reid MGN of 2020 (heads of pool and bnneck, as in its model zoo)",
    backbone="backbone",
    branch="b",
    table=network_table("backbone", "b")
    + tuple((f"{head}_pool.1.", f"{ours}0.") for head, ours in zip(HEADS, REDUCTIONS, strict=True))
    + tuple((f"{head}_pool.2.", f"{ours}1.") for head, ours in zip(HEADS, REDUCTIONS, strict=True))
    + tuple((f"{head}_head.bnneck.", f"{ours}3.") for head, ours in zip(HEADS, REDUCTIONS, strict=True)),
    powers=tuple(f"{head}_pool.0.p" for head in HEADS),
    dropped={f"{head}_head.classifier.weight": TRAINING_ONLY for head in HEADS},
    neck="relu_norm",
    pooling="gem",
    global_stride=1,
    stem_pool="padded",
    evaluation=EVALUATION,
    pixels=("pixel_mean", "pixel_std"),
)

# Pooling with a power of its own, convolution, norm.
EMBEDDING_HEAD = replace(
    POOL_AND_BNNECK,
    title="fast-reid MGN since v1.0 (EmbeddingHead)",
    table=network_table("backbone", "b")
    + tuple(
        (f"{head}_head.bottleneck.{i}.", f"{ours}{i}.")
        for head, ours in zip(HEADS, REDUCTIONS, strict=True)
        for i in (0, 1)
    ),
    powers=tuple(f"{head}_head.pool_layer.p" for head in HEADS),
    dropped={f"{head}_head.{name}": TRAINING_ONLY for head in HEADS for name in ("weight", "classifier.weight")},
    neck="linear",
    stem_pool="ceil",
)


def recognise(tensors: dict[str, Tensor]) -> Source | None:
    """Tell which generation of fast-reid's MGN wrote the tensors; None for anything else.

    Raises:
        UserError: a fast-reid MGN that our model cannot be.
    """
    if "backbone.0.weight" not in tensors or not {"b1_pool.1.weight", "b1_head.bottleneck.0.weight"} & tensors.keys():
        return None
    for key in tensors:
        if ".se." in key:
            raise UserError(f"a fast-reid MGN with squeeze-and-excitation blocks ({key}), which is not supported")
    if not any(key.endswith(".running_mean") for key in tensors):
        raise UserError("a fast-reid MGN whose norms have no running statistics (GroupNorm), which is not supported")
    if "b1_pool.1.weight" in tensors:
        if "b1_pool.0.p" in tensors:
            return POOL_AND_BNNECK
        return replace(POOL_AND_BNNECK, pooling="max", global_stride=2)  # the first configuration, projects/MGN
    if "b1_head.bnneck.weight" in tensors:
        raise UserError(
            "a fast-reid MGN with ReductionHead (bottleneck, LeakyReLU and bnneck; a short time of 2020), which is not "
            "supported: none is known to be published"
        )
    if "b1_head.bottleneck.1.weight" not in tensors:
        raise UserError(
            "a fast-reid MGN trained with WITH_BNNECK False (no b1_head.bottleneck.1), which is not supported"
        )
    # Whether it pools by a fixed power, maximum or mean cannot be told without powers.
    return EMBEDDING_HEAD if "b1_head.pool_layer.p" in tensors else replace(EMBEDDING_HEAD, pooling=None)
