"""What a source says about its checkpoints, and what the public MGNs have in common.

All of them cut a torchvision-like ResNet as we do: `backbone.N` is our `trunk.N`. Their branches are
`Sequential(Sequential(*layer3[1:]), layer4)`, which numbers layer3's blocks from 0; ours keep torchvision's numbers,
from 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from mgn_deploy.choices import GlobalStride, Neck, Pooling, StemPool

# Our reductions in the order of the embedding (Table 1): f_g^G, f_g^P2, f_p0..1^P2, f_g^P3, f_p0..2^P3.
REDUCTIONS = tuple(
    f"branches.{branch}.reductions.{index}." for branch in range(3) for index in range((1, 3, 4)[branch])
)

MOST_BLOCKS = 36  # of layer3, in ResNet-152


@dataclass(frozen=True)
class Source:
    """One kind of checkpoint.

    - `name`, `title`: as in `--from`, and for people.
    - `backbone`, `branch`: prefixes of the trunk's tensors and, before the branch's number, of the branches'.
    - `table`: pairs of their prefix and ours; where theirs stands twice, its tensors are copied.
    - `dropped`: names of tensors that only training uses, each with the reason.
    - `neck`, `pooling`, `global_stride`, `stem_pool`: what the public code does where no tensor tells (`ModelConfig`);
      with a pooling of None the user has to say it.
    - `evaluation`: how the source's own figures were made.
    - `powers`: names of the GeM powers, in the order of our features.
    - `pixels`: names of the pixels' mean and standard deviation, on the scale of 0 to 255.
    """

    name: str
    title: str
    backbone: str
    branch: str
    table: tuple[tuple[str, str], ...]
    dropped: dict[str, str]
    neck: Neck
    pooling: Pooling | None
    global_stride: GlobalStride
    stem_pool: StemPool
    evaluation: str
    powers: tuple[str, ...] = ()
    pixels: tuple[str, ...] = ()

    def theirs(self, ours: str) -> str:
        """Translate the name of one of our tensors.

        Raises:
            KeyError: the table does not have it.
        """
        for prefix, own in self.table:
            if ours.startswith(own):
                return prefix + ours[len(own) :]
        raise KeyError(ours)


def network_table(backbone: str, branch: str) -> tuple[tuple[str, str], ...]:
    """Make the table of trunk and branches: `backbone.N`, and the branch's prefix with 1 to 3."""
    table = [(f"{backbone}.{index}.", f"trunk.{index}.") for index in (0, 1, 4, 5, 6)]
    for number in range(3):
        theirs, ours = f"{branch}{number + 1}", f"branches.{number}"
        table += [(f"{theirs}.0.{block}.", f"{ours}.layer3.{block + 1}.") for block in range(MOST_BLOCKS - 1)]
        table.append((f"{theirs}.1.", f"{ours}.layer4."))
    return tuple(table)
