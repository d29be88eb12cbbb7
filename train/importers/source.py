"""What a source says about its checkpoints, and what the public MGNs have in common.

All of them cut a torchvision-like ResNet as we do: `backbone.N` is our `trunk.N`. Their branches are
`Sequential(Sequential(*layer3[1:]), layer4)`, which numbers layer3's blocks from 0 where ours keep torchvision's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mgn_deploy.config import Neck, Pooling, StemPool

# Our reductions in the order of the embedding (Table 1): f_g^G, f_g^P2, f_p0..1^P2, f_g^P3, f_p0..2^P3.
REDUCTIONS = tuple(
    f"branches.{branch}.reductions.{index}." for branch in range(3) for index in range((1, 3, 4)[branch])
)

MOST_BLOCKS = 36  # of layer3, in ResNet-152


@dataclass(frozen=True)
class Source:
    """One kind of checkpoint.

    `table`: (their prefix, ours); where theirs stands twice, its tensors are copied.
    `powers`: names of the GeM powers in the order of our features. `dropped`: names that only training uses, and why.
    `pooling`, `global_stride`, `stem_pool`: what the public code does where no tensor tells; a pooling of None is asked for.
    `order`: our features, as the numbers of theirs. `evaluation`: how the source's own figures were made.
    """

    name: str
    title: str
    backbone: str
    branch: str
    table: tuple[tuple[str, str], ...]
    dropped: dict[str, str]
    neck: Neck
    pooling: Pooling | None
    global_stride: Literal[1, 2]
    stem_pool: StemPool
    evaluation: str
    powers: tuple[str, ...] = ()
    pixels: tuple[str, ...] = ()  # names of the mean and the standard deviation, on the scale of 0 to 255
    order: tuple[int, ...] = field(default=(0, 1, 3, 4, 2, 5, 6, 7))

    def ours(self, theirs: str) -> list[str]:
        """Our names of one of their tensors; none where the table does not know it."""
        return [ours + theirs[len(prefix) :] for prefix, ours in self.table if theirs.startswith(prefix)]

    def theirs(self, ours: str) -> str:
        """Their name of one of our tensors."""
        for prefix, own in self.table:
            if ours.startswith(own):
                return prefix + ours[len(own) :]
        raise KeyError(ours)

    def blocks(self, tensors: dict[str, Tensor]) -> tuple[int, int, int, int]:
        """Residual blocks of layer1 to layer4."""

        def count(prefix: str) -> int:
            return len({key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)})

        first = f"{self.branch}1"
        return (
            count(f"{self.backbone}.4."),
            count(f"{self.backbone}.5."),
            1 + count(f"{first}.0."),
            count(f"{first}.1."),
        )


def network_table(backbone: str, branch: str) -> tuple[tuple[str, str], ...]:
    """Trunk and branches: `backbone.N`, `b1` to `b3`."""
    table = [(f"{backbone}.{index}.", f"trunk.{index}.") for index in (0, 1, 4, 5, 6)]
    for number in range(3):
        theirs, ours = f"{branch}{number + 1}", f"branches.{number}"
        table += [(f"{theirs}.0.{block}.", f"{ours}.layer3.{block + 1}.") for block in range(MOST_BLOCKS - 1)]
        table.append((f"{theirs}.1.", f"{ours}.layer4."))
    return tuple(table)
