"""seathiefwang/MGN-pytorch.

Sources: model/mgn.py, trainer.py, option.py and data/ of commit 4c4acfdf, README.md of 384e8200.
Input: RGB, bicubic 384x128, ImageNet's mean and deviation; features of image and mirror summed, then L2: as ours.
"""

from __future__ import annotations

from torch import Tensor

from mgn_deploy.train.importers.source import REDUCTIONS, Source, network_table

# reduction_0 to 2 are the branches' global ones; here in the order of our features.
NUMBERS = (0, 1, 3, 4, 2, 5, 6, 7)

CLASSIFIERS = ("2048_0", "2048_1", "2048_2", "256_1_0", "256_1_1", "256_2_0", "256_2_1", "256_2_2")
REDUCTION_TABLE = tuple((f"reduction_{number}.", ours) for number, ours in zip(NUMBERS, REDUCTIONS, strict=True))
DROPPED = {
    f"fc_id_{name}.{kind}": "classifiers: only training uses them"
    for name in CLASSIFIERS
    for kind in ("weight", "bias")
}

SOURCE = Source(
    name="seathiefwang",
    title="seathiefwang/MGN-pytorch",
    backbone="backone",  # as it is spelt there
    branch="p",
    table=network_table("backone", "p") + REDUCTION_TABLE,
    dropped=DROPPED,
    neck="relu",
    pooling="avg",  # the default of its --pool
    global_stride=2,
    stem_pool="padded",
    evaluation=(
        "its README's mAP 93.8 is with re-ranking (82.5 without, another run); it averages image and mirror as here "
        "and ranks by Euclidean distance of unit rows, which is the order of cosine similarity"
    ),
)


def recognise(tensors: dict[str, Tensor]) -> Source | None:
    """Tell whether this code wrote the tensors; None if not."""
    return SOURCE if "backone.0.weight" in tensors else None
