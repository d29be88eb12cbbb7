"""The losses against plain loops in float64, and against where the paper puts them (section 3.2)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mgn_deploy.train.losses import PAPER, batch_hard_triplet, mgn_loss
from mgn_deploy.train.model import MGNOutput
from mgn_deploy.train.recipe import Loss

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine


def plain_triplet(features: np.ndarray, identities: list[int], margin: float) -> float:
    """Every anchor's farthest same and nearest other, one distance at a time."""
    losses = []
    for anchor, identity in enumerate(identities):
        farthest, nearest = 0.0, math.inf
        for other, other_identity in enumerate(identities):
            distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(features[anchor], features[other], strict=True)))
            if other_identity == identity:
                farthest = max(farthest, distance)
            else:
                nearest = min(nearest, distance)
        losses.append(max(0.0, margin + farthest - nearest))
    return sum(losses) / len(losses)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=10),  # also one image of an identity
    st.integers(1, 4),
    st.sampled_from([0.0, 0.3, PAPER.margin]),
    st.sampled_from([1, 10_000]),
    st.randoms(use_true_random=False),
)
def test_the_triplet_loss_is_a_plain_double_loops(identities, dim, margin, scale, random):
    assume(len(set(identities)) > 1)
    # Few small whole numbers: equal rows, equal distances and ties for farthest and nearest are common.
    features = scale * np.array([[random.randint(-2, 2) for _ in range(dim)] for _ in identities], np.float64)
    loss = batch_hard_triplet(torch.from_numpy(features), torch.tensor(identities), margin)
    assert loss.item() == pytest.approx(plain_triplet(features, identities, margin), abs=1e-5)


def test_the_triplet_loss_by_hand():
    features = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
    # Farthest same: 1, 1, 0.5, 0.5; nearest other: 3, 2, 2, 2.5.
    loss = batch_hard_triplet(features, torch.tensor([5, 5, 9, 9]), margin=1.2)
    assert loss.item() == pytest.approx((0 + 0.2 + 0 + 0) / 4, abs=1e-6)


def test_the_margin_is_the_papers():
    assert PAPER.margin == 1.2


def test_a_batch_of_one_identity_has_no_triplet():
    with pytest.raises(ValueError, match="one identity"):
        batch_hard_triplet(torch.randn(4, 3), torch.tensor([2, 2, 2, 2]))


def test_identical_features_cost_the_margin_and_have_a_finite_gradient():
    features = torch.ones(4, 3, requires_grad=True)
    loss = batch_hard_triplet(features, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(PAPER.margin, abs=1e-5)
    assert torch.isfinite(features.grad).all()


def test_the_gradient_is_that_of_finite_differences():
    features = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    identities = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda one: batch_hard_triplet(one, identities), features)


def test_half_precision_features_are_measured_in_float32():
    features = 50 * torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    identities = torch.tensor([0, 0, 1, 1, 2, 2])
    half = batch_hard_triplet(features.half(), identities)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(batch_hard_triplet(features.half().double(), identities).item(), rel=1e-4)


def output_of_ones(classes: int = 3) -> MGNOutput:
    """A batch of four, two identities: every tensor asks for its gradient."""
    generator = torch.Generator().manual_seed(0)

    def leaves(count: int, width: int) -> list[torch.Tensor]:
        return [torch.randn(4, width, generator=generator).requires_grad_() for _ in range(count)]

    return MGNOutput(leaves(3, 8), leaves(3, 4), leaves(5, 4), leaves(8, classes))


def test_the_loss_is_the_mean_of_8_softmax_losses_and_the_mean_of_3_triplet_losses():
    output, identities = output_of_ones(), torch.tensor([0, 0, 2, 2])
    softmax = np.mean(
        [
            -math.log(math.exp(row[identity]) / sum(math.exp(value) for value in row))
            for logits in output.logits
            for row, identity in zip(logits.tolist(), identities.tolist(), strict=True)
        ]
    )
    triplet = np.mean(
        [
            plain_triplet(feature.detach().double().numpy(), identities.tolist(), PAPER.margin)
            for feature in output.globals
        ]
    )
    loss, parts = mgn_loss(output, identities)
    assert parts["softmax"] == pytest.approx(softmax, abs=1e-5)
    assert parts["triplet"] == pytest.approx(triplet, abs=1e-5)
    assert loss.item() == pytest.approx(softmax + triplet, abs=1e-5)


def test_the_triplet_loss_takes_the_reduced_globals_and_nothing_else():
    output = output_of_ones()
    loss, _ = mgn_loss(output, torch.tensor([0, 0, 2, 2]))
    loss.backward()
    assert all(feature.grad is not None for feature in output.globals + output.logits)
    assert all(
        feature.grad is None for feature in output.pooled_globals + output.stripes
    )  # reached by their logits only


def test_no_feature_has_both_losses():
    """Softmax reaches the pooled globals and the reduced stripes, the triplet loss the reduced globals."""
    from mgn_deploy.config import ModelConfig
    from mgn_deploy.train.model import MGN

    model = MGN(
        ModelConfig(backbone="resnet18", base_width=8, reduced_width=4, height=96, width=32, num_classes=3)
    ).train()
    images, identities = (
        torch.randn(4, 3, 96, 32, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 0, 2, 2]),
    )
    reductions = {
        f"{branch}.{place}": reduction[0].weight
        for branch, part in enumerate(model.branches)
        for place, reduction in enumerate(part.reductions)
    }
    reached = {}
    for name in ("softmax", "triplet"):
        output = model(images)
        if name == "softmax":
            loss = sum(torch.nn.functional.cross_entropy(logits, identities) for logits in output.logits)
        else:
            loss = sum(batch_hard_triplet(feature, identities) for feature in output.globals)
        gradients = torch.autograd.grad(loss, list(reductions.values()), allow_unused=True)
        reached[name] = {place for place, gradient in zip(reductions, gradients, strict=True) if gradient is not None}
    assert reached["triplet"] == {"0.0", "1.0", "2.0"}
    assert reached["softmax"] == {"1.1", "1.2", "2.1", "2.2", "2.3"}


def test_the_soft_margin_by_hand():
    features = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
    loss = batch_hard_triplet(features, torch.tensor([5, 5, 9, 9]), soft_margin=True)
    gaps = (1 - 3, 1 - 2, 0.5 - 2, 0.5 - 2.5)
    assert loss.item() == pytest.approx(np.mean([math.log1p(math.exp(gap)) for gap in gaps]), abs=1e-5)


def test_weights_and_label_smoothing_are_the_recipes():
    output, identities = output_of_ones(), torch.tensor([0, 0, 2, 2])
    loss, parts = mgn_loss(output, identities, Loss(softmax_weight=2.0, triplet_weight=0.5, label_smoothing=0.1))
    smooth = np.mean(
        [
            -sum((0.9 * (place == identity) + 0.1 / len(row)) * value for place, value in enumerate(logs))
            for logits in output.logits
            for row, identity in zip(logits, identities.tolist(), strict=True)
            for logs in [row.log_softmax(0).tolist()]
        ]
    )
    assert parts["softmax"] == pytest.approx(smooth, abs=1e-5)
    assert loss.item() == pytest.approx(2 * smooth + 0.5 * parts["triplet"].item(), abs=1e-5)


def test_the_margin_of_the_triplet_loss_is_the_recipes():
    output, identities = output_of_ones(), torch.tensor([0, 0, 2, 2])
    features = [feature.detach().double().numpy() for feature in output.globals]
    _, parts = mgn_loss(output, identities, Loss(margin=3.5))
    expected = np.mean([plain_triplet(feature, identities.tolist(), 3.5) for feature in features])
    assert parts["triplet"] == pytest.approx(expected, abs=1e-5)
