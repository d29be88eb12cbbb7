"""`PlannedKernel` without a GPU: what it asks of the driver, through stand-ins for the driver's calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mgn_deploy.errors import UserError
from mgn_deploy.kernels import nvrtc
from mgn_deploy.kernels.params import Pointers
from mgn_deploy.kernels.plan import Device, Problem, all_kernels, launches, may_be_fused, plan_on

driver = pytest.importorskip("cuda.bindings.driver")
pytest.importorskip("cuda.core")

PAPER = ((1, 2, 3), ((12, 4), (24, 8), (24, 8)))
POINTERS = Pointers((256, 512, 768), 1024, 1280, None, None, None, 1536, 1792)
OK, TOO_LARGE = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE


def problem(batch: int, path: str = "auto") -> Problem:
    return Problem("float16", "nhwc", batch, 2048, 256, *PAPER, path=path)


@pytest.fixture
def machine(monkeypatch):
    """A GPU with 132 multiprocessors: `loaded` are the kernels that were compiled and loaded, `started` those that the
    driver was told to start and `attributes` what it was told of each, `answers` what it says to launches that have
    attributes, `resident` what occupancy says."""
    state = SimpleNamespace(
        loaded=[], started=[], attributes=[], answers=[], resident=2, cooperative=True, version=13000
    )
    handles = {index + 1: name for index, name in enumerate(all_kernels())}

    class FakeDevice:
        arch, compute_capability = "90", (9, 0)

        def __init__(self, number):
            self.properties = SimpleNamespace(cooperative_launch=state.cooperative, multiprocessor_count=132)

        def set_current(self):
            pass

    def loaded(kernels, arch, device_id):
        state.loaded += kernels
        occupancy = SimpleNamespace(max_active_blocks_per_multiprocessor=lambda threads, shared: state.resident)
        numbers = {name: number for number, name in handles.items()}
        return {name: SimpleNamespace(handle=numbers[name], occupancy=occupancy) for name in kernels}

    def start(config, function, arguments, extra):
        assert len(config.attrs) == config.numAttrs
        state.started.append(handles[int(function)])
        state.attributes.append([one.id.name.removeprefix("CU_LAUNCH_ATTRIBUTE_") for one in config.attrs])
        return (state.answers.pop(0) if config.attrs and state.answers else OK,)

    monkeypatch.setattr("cuda.core.Device", FakeDevice)
    monkeypatch.setattr(nvrtc, "_loaded", loaded)
    monkeypatch.setattr(driver, "cuLaunchKernelEx", start)
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (OK, state.version))
    return state


def names(batch: int, path: str) -> list[str]:
    chosen = problem(batch, path)
    return [one.kernel for one in launches(chosen, plan_on(chosen, Device(132, 90, 2)))]


def test_a_large_batch_compiles_no_fused_kernel(machine):
    planned = nvrtc.PlannedKernel(problem(64))
    planned.launch(POINTERS, 0)
    assert machine.loaded == machine.started == names(64, "tiles")
    assert not may_be_fused(problem(9))
    assert may_be_fused(problem(8))


@pytest.mark.parametrize("path", ["rows", "tiles"])
def test_a_path_that_is_asked_for_compiles_no_fused_kernel(machine, path):
    nvrtc.PlannedKernel(problem(2, path))
    assert machine.loaded == names(2, path)


def test_a_small_batch_is_one_launch(machine):
    planned = nvrtc.PlannedKernel(problem(2))
    planned.launch(POINTERS, 0)
    assert machine.started == names(2, "fused")
    assert machine.attributes == [["COOPERATIVE"]]


OVERLAPPED = [[], ["PROGRAMMATIC_STREAM_SERIALIZATION"], ["PROGRAMMATIC_STREAM_SERIALIZATION", "CLUSTER_DIMENSION"]]


def test_three_launches_overlap_and_few_rows_are_finished_by_clusters(machine):
    nvrtc.PlannedKernel(problem(33)).launch(POINTERS, 0)
    assert machine.attributes == OVERLAPPED


def test_an_older_driver_gets_plain_launches(machine):
    machine.version = 12020
    nvrtc.PlannedKernel(problem(33)).launch(POINTERS, 0)
    assert machine.started == names(33, "tiles")
    assert machine.attributes == [[], [], []]


@pytest.mark.parametrize("answer", ["NOT_SUPPORTED", "INVALID_VALUE"])
def test_where_overlapping_is_refused_the_launches_are_plain_for_good(machine, answer, said):
    machine.answers = [OK, getattr(driver.CUresult, f"CUDA_ERROR_{answer}")]
    planned = nvrtc.PlannedKernel(problem(33))
    planned.launch(POINTERS, 0)
    assert machine.started == 2 * names(33, "tiles")
    assert machine.attributes == [*OVERLAPPED, [], [], []]
    assert any("refuses to overlap" in sentence and answer in sentence for sentence in said)
    planned.launch(POINTERS, 0)
    assert machine.attributes[6:] == [[], [], []]


@pytest.mark.parametrize("change", [{"cooperative": False}, {"resident": 0}])
def test_without_room_for_a_cooperative_launch_it_is_three_from_the_start(machine, change):
    vars(machine).update(change)
    nvrtc.PlannedKernel(problem(2)).launch(POINTERS, 0)
    assert machine.started == names(2, "rows")


def test_a_refused_cooperative_launch_becomes_three_for_good(machine):
    machine.answers = [TOO_LARGE]
    planned = nvrtc.PlannedKernel(problem(2))
    workspace = planned.workspace_bytes
    planned.launch(POINTERS, 0)
    assert machine.started == [*names(2, "fused"), *names(2, "rows")]
    assert planned.workspace_bytes <= workspace  # the caller has allocated it
    machine.started.clear()
    planned.launch(POINTERS, 0)
    assert machine.started == names(2, "rows")


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_three_launches_need_no_more_memory_than_one(batch, dtype):
    chosen = Problem(dtype, "nhwc", batch, 2048, 256, *PAPER)
    one, three = (plan_on(chosen, Device(132, 90, resident)) for resident in (2, 0))
    assert (one.path, three.path) == ("fused", "rows")
    assert three.workspace_bytes <= one.workspace_bytes


def test_another_refusal_is_an_error(machine):
    machine.answers = [driver.CUresult.CUDA_ERROR_INVALID_VALUE]
    with pytest.raises(UserError, match="CUDA_ERROR_INVALID_VALUE"):
        nvrtc.PlannedKernel(problem(2)).launch(POINTERS, 0)
    assert machine.started == names(2, "fused")


def test_the_path_fused_is_not_left_without_a_word(machine):
    machine.answers = [TOO_LARGE]
    with pytest.raises(UserError, match="COOPERATIVE_LAUNCH_TOO_LARGE"):
        nvrtc.PlannedKernel(problem(2, "fused")).launch(POINTERS, 0)


def test_an_old_cuda_core_is_one_sentence(monkeypatch):
    from cuda.bindings import nvrtc as library

    monkeypatch.setattr(library, "nvrtcVersion", lambda: (0, 13, 0))
    monkeypatch.setattr(nvrtc, "version", lambda _: "0.6.0")
    assert nvrtc.nvrtc_problem() == (
        "cuda-core 0.6.0 is older than 1.0, whose interface the CUDA kernels need: "
        "pip install 'cuda-core>=1.0' nvidia-cuda-nvrtc"
    )
    for fine in ("1.0.0", "1.2.2", "12.0"):
        monkeypatch.setattr(nvrtc, "version", lambda _, fine=fine: fine)
        assert nvrtc.nvrtc_problem() is None


def test_without_nvrtc_one_line_says_what_to_install(monkeypatch):
    from cuda.bindings import nvrtc as library

    def missing() -> None:
        raise RuntimeError("Failure finding libnvrtc.so.13:\n No such file\n")  # as cuda.pathfinder words it

    monkeypatch.setattr(library, "nvrtcVersion", missing)
    assert nvrtc.nvrtc_problem() == (
        "the CUDA kernels are compiled on first use, which needs NVRTC (Failure finding libnvrtc.so.13: No such file): "
        "pip install 'cuda-core>=1.0' nvidia-cuda-nvrtc"
    )
