"""The paper's two losses and the features that they take (section 3.2).

The softmax loss takes the pooled globals before reduction and the stripe features after it, the batch-hard triplet loss
the reduced globals. No feature is in both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mgn_deploy.train.model import MGNOutput
from mgn_deploy.train.recipe import Loss

PAPER = Loss()


def batch_hard_triplet(
    features: Tensor, identities: Tensor, margin: float = PAPER.margin, *, soft_margin: bool = False
) -> Tensor:
    """Average max(0, margin + farthest same identity - nearest other identity), Euclidean, over the batch.

    Equation 2 of the paper (after Hermans et al. 2017); its leading minus sign is a slip: the hinge is minimised.

    Args:
        features: float `[n, d]`.
        identities: integer `[n]`.
        margin: in the features' unit.
        soft_margin: take log(1 + exp(farthest - nearest)) instead of the hinge (Hermans et al. 2017), without margin.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: the batch holds a single identity, so that no triplet exists.
    """
    same = identities[:, None] == identities[None, :]
    if bool(same.all()):
        raise ValueError("the batch holds one identity: a triplet needs images of at least two")
    distances = pairwise_distances(features)
    farthest_same = distances.masked_fill(~same, -torch.inf).amax(dim=1)
    nearest_other = distances.masked_fill(same, torch.inf).amin(dim=1)
    if soft_margin:
        return F.softplus(farthest_same - nearest_other).mean()
    return F.relu(margin + farthest_same - nearest_other).mean()


def pairwise_distances(features: Tensor) -> Tensor:
    """Compute the Euclidean distances `[n, n]` of rows `[n, d]`, in float32 or wider; the gradient at 0 is finite."""
    features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    squares = features.square().sum(dim=1)
    squared = squares[:, None] + squares[None, :] - 2 * features @ features.T
    return squared.clamp(min=1e-12).sqrt()


def mgn_loss(output: MGNOutput, identities: Tensor, options: Loss = PAPER) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the mean softmax loss and the mean triplet loss, weighted.

    Args:
        output: of the model in training mode, with classifiers.
        identities: class indices `[n]`.
        options: weights, margin, label smoothing; the default is the paper's.

    Returns:
        The sum, and both means, detached, as "softmax" and "triplet".
    """
    smoothing, margin, soft = options.label_smoothing, options.margin, options.soft_margin
    entropies = [F.cross_entropy(logits.float(), identities, label_smoothing=smoothing) for logits in output.logits]
    triplets = [batch_hard_triplet(one, identities, margin, soft_margin=soft) for one in output.globals]
    softmax, triplet = torch.stack(entropies).mean(), torch.stack(triplets).mean()
    loss = options.softmax_weight * softmax + options.triplet_weight * triplet
    return loss, {"softmax": softmax.detach(), "triplet": triplet.detach()}
