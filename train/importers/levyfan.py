"""levyfan/reid-mgn and its forks, and GNAYUOHZ/ReID-MGN, where one reduction serves all eight features.

Sources: mgn/mgn.py and mgn/market1501.py of commits 9f0daacf and b6a91f01, and GNAYUOHZ's network.py and data.py of
0e452a09. levyfan concatenates its features branch by branch, as we do; GNAYUOHZ, like the others, globals first.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mgn_deploy.errors import UserError
from mgn_deploy.train.importers.seathiefwang import DROPPED, REDUCTION_TABLE
from mgn_deploy.train.importers.source import REDUCTIONS, Source, network_table

SOURCE = Source(
    name="levyfan",
    title="levyfan/reid-mgn",
    backbone="backbone",
    branch="p",
    table=network_table("backbone", "p") + REDUCTION_TABLE,
    dropped=DROPPED,
    neck="relu",
    pooling="max",
    global_stride=2,
    stem_pool="padded",
    evaluation=(
        "it resizes bilinearly and ranks by Euclidean distance without the L2 norm, here it is bicubic and cosine: "
        "its own figures (mAP 57.9) are not met exactly"
    ),
)

GNAYUOHZ = replace(
    SOURCE,
    name="gnayuohz",
    title="GNAYUOHZ/ReID-MGN (one reduction, copied to all eight features)",
    table=network_table("backbone", "p") + tuple(("reduction.", ours) for ours in REDUCTIONS),
    evaluation="its figures (mAP 85.96) are cosine similarity with the mirror average, as here",
)


def recognise(tensors: dict[str, Tensor]) -> Source | None:
    """Tell which of them wrote the tensors; None for anything else.

    Raises:
        UserError: branches that were never trained.
    """
    if "backbone.0.weight" not in tensors or "p1.0.0.conv1.weight" not in tensors:
        return None
    if "reduction.0.weight" in tensors:
        return GNAYUOHZ
    if "reduction_0.0.weight" not in tensors:
        return None
    _refuse_untrained_branches(tensors)
    # levyfan's classifiers take the globals before their reduction. A fork that changed this may pool otherwise too.
    classifier, reduction = tensors.get("fc_id_2048_0.weight"), tensors["reduction_0.0.weight"]
    if classifier is not None and classifier.shape[1:] == reduction.shape[1:2]:
        return SOURCE
    return replace(SOURCE, title="a fork of levyfan/reid-mgn", pooling=None)


def _refuse_untrained_branches(tensors: dict[str, Tensor]) -> None:
    counters = {key: int(value.max()) for key, value in tensors.items() if key.endswith(".num_batches_tracked")}
    trained = {key[:2] for key, batches in counters.items() if batches}  # p1, p2 and p3
    idle = sorted({"p1", "p2", "p3"} - trained)
    if 0 < len(idle) < 3:
        raise UserError(
            f"branches {', '.join(idle)} were never trained (num_batches_tracked is 0), as with `--model p1_single`: "
            "this is not a whole MGN"
        )
