"""The planner: which problems it takes, and what its plans promise the kernels, without running them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgn_deploy.config import region_rows
from mgn_deploy.kernels.params import Pointers, params_of
from mgn_deploy.kernels.plan import (
    BARRIER_BYTES,
    LAYOUTS,
    OUTPUTS,
    PATHS,
    POOLINGS,
    TYPES,
    Device,
    Problem,
    launches,
    plan_on,
)

GOOD = {
    **{"dtype": "float32", "layout": "nchw", "batch": 2, "channels": 8, "reduced": 16},
    **{"branches": (1, 2), "sizes": ((2, 2), (2, 2))},
}
MANY = settings(max_examples=200, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: "other"}, f"{name} 'other' is not one of")
            for name in ("dtype", "layout", "pooling", "neck", "output", "path")
        ),
        ({"batch": 0}, "a batch of 0 is not 1 to 1024"),
        ({"batch": 1025}, "a batch of 1025 is not 1 to 1024"),
        ({"batch": 3, "output": "mirror_embeddings"}, "mirrors"),
        ({"batch": 9, "path": "rows"}, "rows is for batches up to 8, not 9"),
        ({"batch": 9, "path": "fused"}, "fused is for batches up to 8, not 9"),
        ({"channels": 0}, "0 channels are not a multiple of 8"),
        ({"channels": 20}, "20 channels are not a multiple of 8"),
        ({"reduced": 0}, "width of 0 is not a multiple of 16"),
        ({"reduced": 24}, "width of 24 is not a multiple of 16"),
        ({"branches": (), "sizes": ()}, "are not 1 to 4"),
        ({"branches": (1,) * 5, "sizes": ((2, 2),) * 5}, "are not 1 to 4"),
        ({"branches": (1, 9)}, "of 1 to 8 stripes"),
        ({"branches": (0, 1)}, "of 1 to 8 stripes"),
        ({"sizes": ((0, 2), (2, 2))}, "pixels"),
        ({"sizes": ((2, 2), (4097, 4096))}, "pixels"),
        ({"sizes": ((2, 2),)}, "not one a branch"),
    ],
)
def test_a_problem_that_the_kernels_do_not_take_is_refused_by_name(change, message):
    Problem(**GOOD)
    with pytest.raises(ValueError, match=message):
        Problem(**{**GOOD, **change})


@pytest.mark.parametrize(
    "largest", [{"batch": 1024}, {"branches": (8,) * 4, "sizes": ((4096, 4096),) * 4}, {"batch": 8, "path": "fused"}]
)
def test_the_largest_problem_is_taken(largest):
    problem = Problem(**{**GOOD, **largest})
    assert launches(problem, plan_on(problem, Device(132, 90, 2)))


@st.composite
def problems(draw):
    branches = tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=4)))
    path, output = draw(st.sampled_from(PATHS)), draw(st.sampled_from(list(OUTPUTS)))
    batch = draw(st.integers(1, 8 if path in ("fused", "rows") else 1024))
    return Problem(
        draw(st.sampled_from(list(TYPES))),
        draw(st.sampled_from(list(LAYOUTS))),
        batch + batch % 2 if output == "mirror_embeddings" else batch,
        8 * draw(st.integers(1, 512)),
        16 * draw(st.integers(1, 32)),
        branches,
        tuple((draw(st.integers(1, 40)), draw(st.integers(1, 20))) for _ in branches),
        pooling=draw(st.sampled_from(list(POOLINGS))),
        output=output,
        path=path,
    )


DEVICES = st.builds(
    Device, st.integers(1, 200), st.sampled_from([70, 75, 80, 90, 120]), st.integers(1, 4), st.sampled_from([0, 13000])
)


@MANY
@given(problem=problems(), device=DEVICES)
def test_a_plan_covers_every_channel_once_and_overlaps_nothing_in_its_workspace(problem, device):
    plan = plan_on(problem, device)
    assert (plan.splits - 1) * plan.depth < problem.channels <= plan.splits * plan.depth
    dim = problem.features * problem.reduced
    pooled = (4 if problem.pooled_type == "float" else 2) * problem.features * problem.batch * problem.channels
    ends = (BARRIER_BYTES, plan.partial_offset, plan.workspace_bytes)
    assert ends[1] - ends[0] >= pooled
    assert ends[2] - ends[1] >= 4 * plan.splits * problem.batch * dim
    assert not any(end % 16 for end in ends)


@MANY
@given(problem=problems(), device=DEVICES)
def test_launches_are_what_a_device_takes_and_waiting_blocks_fit_on_it_together(problem, device):
    for one in launches(problem, plan_on(problem, device)):
        assert min(one.grid) >= 1
        assert max(one.grid[1:]) <= 65535
        assert one.threads <= 1024
        assert one.shared <= 48 * 1024  # what a block gets without asking
        if one.cooperative:
            assert one.grid[0] <= device.multiprocessors * device.resident_blocks
        assert one.grid[0] % one.cluster == 0


@pytest.mark.parametrize(
    ("batch", "capability", "driver", "overlapped", "row_blocks"),
    [
        *((33, 90, 12030, True, 4), (34, 90, 12030, True, 2), (66, 90, 12030, True, 2), (67, 90, 12030, True, 1)),
        *((33, 89, 13000, False, 1), (33, 90, 12020, False, 1), (33, 120, 0, False, 1)),
        (2, 90, 13000, False, 1),  # one launch has no other to overlap
    ],
)
def test_launches_overlap_and_blocks_share_a_row_where_device_and_driver_can(
    batch, capability, driver, overlapped, row_blocks
):
    problem = Problem("float16", "nhwc", batch, 64, 16, (2,), ((4, 2),))
    plan = plan_on(problem, Device(132, capability, 2, driver))
    assert (plan.overlapped, plan.row_blocks) == (overlapped, row_blocks)
    own = launches(problem, plan)
    assert [one.programmatic for one in own] == ([False, overlapped, overlapped] if len(own) == 3 else [False])
    finish = own[-1]
    assert finish.cluster == row_blocks
    assert plan.path == "fused" or finish.grid[0] * finish.threads == 256 * batch  # a row has as many threads


@MANY
@given(problem=problems())
def test_a_regions_runs_have_its_rows_and_without_a_power_of_its_own_no_row_is_read_twice(problem):
    count = len(problem.branches)
    pointers = Pointers(tuple(range(16, 16 * count + 1, 16)), 256, 256, 256, 256, 256, 256, 256)
    params = params_of(problem, plan_on(problem, Device(2, 90, 1)), pointers)
    first_feature = 0
    for branch, stripes, (height, width) in zip(params.branch, problem.branches, problem.sizes, strict=False):
        runs = list(zip(branch.run_begin, branch.run_end, strict=True))[: branch.runs]
        for region, (first, last) in enumerate(region_rows(height, stripes)):
            own = runs[branch.region_begin[region] : branch.region_end[region]]
            pixels = [pixel for begin, end in own for pixel in range(begin, end)]
            assert pixels == list(range(first * width, last * width))
            assert branch.region_pixels[region] == len(pixels)
        if problem.pooling != "gem":
            assert sum(end - begin for begin, end in runs) == height * width
        assert branch.first_feature == first_feature
        first_feature += branch.regions
    assert params.features == first_feature
