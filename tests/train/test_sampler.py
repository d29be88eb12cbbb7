"""P x K batches: what an epoch holds, on one process and on several."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mgn_deploy.train.sampler import IdentitySampler


@pytest.mark.parametrize(("identities", "p"), [(7, 3), (6, 3), (16, 16), (17, 16), (5, 16), (3, 2)])
def test_an_epoch_is_p_x_k_batches_that_visit_every_identity(identities, p):
    classes = np.repeat(np.arange(identities), 5)
    sampler = IdentitySampler(classes, p, 4)
    batches = sampler.epoch(0)
    p = min(p, identities)
    assert len(batches) == len(sampler) == math.ceil(identities / p)
    for batch in batches:
        chosen, counts = np.unique(classes[batch], return_counts=True)
        assert (len(chosen), set(counts)) == (p, {4})
        assert len(np.unique(batch)) == len(batch)  # five images each: none need come twice
    assert set(classes[np.concatenate(batches)]) == set(range(identities))


def test_an_identity_with_fewer_images_gives_all_of_them_and_some_again():
    classes = np.array([0, 0, 0, 0, 1, 1, 2])
    sampler = IdentitySampler(classes, 3, 4)
    for batch in [sampler.epoch(number)[0] for number in range(50)]:
        for identity, members in ((0, {0, 1, 2, 3}), (1, {4, 5}), (2, {6})):
            own = [index for index in batch if classes[index] == identity]
            assert (len(own), set(own)) == (4, members)


@pytest.mark.parametrize(("identities", "p", "ranks"), [(12, 3, 2), (13, 3, 2), (7, 4, 3), (5, 16, 2)])
def test_ranks_share_an_epoch_s_identities(identities, p, ranks):
    classes = np.repeat(np.arange(identities), 4)
    samplers = [IdentitySampler(classes, p, 4, seed=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    epochs = [sampler.epoch(2) for sampler in samplers]
    assert {len(epoch) for epoch in epochs} == {len(samplers[0])}, "ranks with fewer batches would hang the others"
    assert set(classes[np.concatenate([batch for epoch in epochs for batch in epoch])]) == set(range(identities))
    if identities % (p * ranks) == 0:
        first, second = (set(classes[np.concatenate(epoch)]) for epoch in epochs)
        assert not first & second


def test_batches_are_a_function_of_seed_and_epoch():
    classes = np.repeat(np.arange(9), 6)

    def epoch(seed, number):
        return np.array(IdentitySampler(classes, 3, 4, seed=seed).epoch(number))

    assert np.array_equal(epoch(1, 5), epoch(1, 5))
    assert not np.array_equal(epoch(1, 5), epoch(2, 5))
    assert not np.array_equal(epoch(1, 5), epoch(1, 6))


def test_every_image_comes_at_last():
    sampler = IdentitySampler(np.repeat(np.arange(4), 9), 4, 4)
    assert {int(index) for number in range(40) for batch in sampler.epoch(number) for index in batch} == set(range(36))
