"""The CUDA source through NVRTC: every architecture, no spills, wide loads, the cache of machine code."""

from __future__ import annotations

import re

import pytest

from mgn_deploy.errors import UserError
from mgn_deploy.kernels import build, nvrtc
from mgn_deploy.kernels.params import Pointers, params_of
from mgn_deploy.kernels.plan import Device, Problem, all_kernels, launches, plan_on

needs_nvrtc = pytest.mark.skipif(nvrtc.nvrtc_problem() is not None, reason="needs NVRTC")
PAPER = ((1, 2, 3), ((12, 4), (24, 8), (24, 8)))  # branches and sizes
# Of each kernel the one that comes nearest to spilling, and what a GPU in half precision runs most.
TIGHTEST = (
    *("fused_kernel<float, kNchw, kMax>", "fused_kernel<float, kNhwc, kGem>", "rows_kernel<float, float>"),
    *("fma_kernel<float, float>", "mma_kernel<Bfloat>", "epilogue_kernel<float>"),
    *("fused_kernel<Half, kNhwc, kMax>", "pool_kernel<Half, kNhwc, kMax>", "mma_kernel<Half>", "epilogue_kernel<Half>"),
)


def test_every_kernel_of_every_plan_is_counted():
    kernels = all_kernels()
    assert {*TIGHTEST} < {*kernels}
    assert len(kernels) == 18 + 18 + 5 + 5 + 2 + 3  # pool, fused; rows, fma; mma; epilogue


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("arch", build.ARCHITECTURES)
def test_every_architecture_compiles_without_spills(arch):
    """All kernels for 7.5, whose instructions differ from 8.0's, and for 9.0; `make kernels` builds all for all."""
    uses = build.compile_for(arch, all_kernels() if arch in ("75", "90") else TIGHTEST)
    assert {name: use.spilled for name, use in uses.items() if use.spilled} == {}
    # Two blocks of 256 threads share 65536 registers: what the fused kernel's grid counts on.
    assert max(use.registers for name, use in uses.items() if name.startswith("fused")) <= 128


@needs_nvrtc
def test_maps_and_weights_are_loaded_16_bytes_at_a_time():
    """As PTX has it, from which the machine code is made. Only the ends of an NCHW map's runs are loaded one by one."""
    wide, written = "ld.global.nc.v4", "ld.global.v4"
    allowed = {
        "pool_kernel<Half, kNhwc, kMax>": {wide},
        "pool_kernel<Bfloat, kNhwc, kAvg>": {wide},
        "pool_kernel<float, kNhwc, kMax>": {wide},
        "rows_kernel<Half, Half>": {wide, written},  # the weights, the pooled vectors
        "mma_kernel<Bfloat>": {wide, written},
        "fma_kernel<float, float>": {wide, written},
        "pool_kernel<Half, kNchw, kMax>": {wide, "ld.global"},
        "pool_kernel<float, kNchw, kMax>": {wide, "ld.global"},
    }
    for kernel, loads in loads_by_kernel(list(allowed)).items():
        assert set(loads) == allowed[kernel], kernel
        assert loads.count("ld.global") == (2 if "kNchw" in kernel else 0)


def loads_by_kernel(kernels):
    """The global loads in each kernel's PTX. By NVRTC itself, as cuda-core makes PTX only where there is a driver."""
    from cuda.bindings import nvrtc as library

    source, options = nvrtc.SOURCE.read_bytes(), [b"--std=c++17", b"--gpu-architecture=compute_90"]
    _, program = library.nvrtcCreateProgram(source, b"", 0, [], [])
    for kernel in kernels:
        library.nvrtcAddNameExpression(program, kernel.encode())
    (status,) = library.nvrtcCompileProgram(program, len(options), options)
    assert status == library.nvrtcResult.NVRTC_SUCCESS
    _, size = library.nvrtcGetPTXSize(program)
    ptx = b" " * size
    library.nvrtcGetPTX(program, ptx)
    bodies = {body.split("(")[0].strip(): body for body in ptx.decode().split(".entry ")[1:]}
    found = {}
    for kernel in kernels:
        _, symbol = library.nvrtcGetLoweredName(program, kernel.encode())
        found[kernel] = [load.rsplit(".", 1)[0] for load in re.findall(r"ld\.global[.\w]+", bodies[symbol.decode()])]
    return found


def test_the_compilers_report_is_read():
    report = """
ptxas info    : Compiling entry function '_ZN12_x_11pool_kernelINS_4HalfELi1ELi2EEEvNS_6ParamsE' for 'sm_90'
ptxas info    : Function properties for _ZN12_x_11pool_kernelINS_4HalfELi1ELi2EEEvNS_6ParamsE
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN12_x_10fma_kernelINS_6BfloatES1_EEvNS_6ParamsE' for 'sm_90'
ptxas info    : Function properties for _ZN12_x_10fma_kernelINS_6BfloatES1_EEvNS_6ParamsE
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 63 registers, used 1 barriers
"""
    assert build.read_report(report) == {
        "_ZN12_x_11pool_kernelINS_4HalfELi1ELi2EEEvNS_6ParamsE": build.Use(64, 16),
        "_ZN12_x_10fma_kernelINS_6BfloatES1_EEvNS_6ParamsE": build.Use(63, 0),
    }


@needs_nvrtc
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "__device__ int unset() { int left_over; return left_over; }\n",
            "NVRTC warns of the kernels for sm_90: .*left_over",
        ),
        (
            "wrong\n",
            r"NVRTC \d+\.\d+ does not compile the kernels for sm_90 \(.*no storage class.*\): install one that",
        ),
    ],
)
def test_a_source_that_does_not_compile_cleanly_is_one_sentence(line, message, tmp_path, monkeypatch):
    changed = tmp_path / "changed.cu"
    changed.write_text(nvrtc.SOURCE.read_text() + line)
    monkeypatch.setattr(nvrtc, "SOURCE", changed)
    with pytest.raises(UserError, match=message):
        build.compile_for("90", ["epilogue_kernel<Half>"])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    if nvrtc.nvrtc_problem():
        pytest.skip("needs NVRTC")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mgn-deploy" / "kernels"


def test_nvrtc_compiles_a_problems_kernels_without_a_gpu_and_keeps_them(cache, monkeypatch):
    problem = Problem("bfloat16", "nhwc", 64, 2048, 256, *PAPER)
    kernels = tuple(one.kernel for one in launches(problem, plan_on(problem, Device(132, 90, 2))))
    code = nvrtc.compile_kernels(kernels, "sm_90")
    assert set(code.symbols) == set(kernels)
    assert all(symbol.encode() in code.cubin for symbol in code.symbols.values())
    monkeypatch.setattr("cuda.core.Program", None)  # a second compilation would fail
    assert nvrtc.compile_kernels(kernels, "sm_90") == code


def test_damaged_machine_code_is_compiled_again(cache):
    kernels = ("epilogue_kernel<float>",)
    code = nvrtc.compile_kernels(kernels, "sm_75")
    (cubin,) = cache.glob("*.cubin")
    cubin.write_bytes(code.cubin[:100])
    assert nvrtc.compile_kernels(kernels, "sm_75").symbols.keys() == code.symbols.keys()
    assert len(cubin.read_bytes()) > 100


def test_where_the_cache_cannot_be_written_the_kernels_are_compiled_all_the_same(cache, monkeypatch, caplog):
    (cache.parents[1] / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1] / "file"))
    assert nvrtc.compile_kernels(("epilogue_kernel<float>",), "sm_75").symbols
    assert ".cubin is not cached" in caplog.text


def test_architectures_do_not_share_machine_code(cache):
    kernels = ("epilogue_kernel<Half>",)
    assert nvrtc.compile_kernels(kernels, "sm_80").cubin != nvrtc.compile_kernels(kernels, "sm_120").cubin


ADDRESSES = {
    **{"maps": (256, 512, 768), "weight": 1024, "bias": 1280, "scale": None, "shift": None, "power": None},
    **{"workspace": 1536, "output": 1792},
}


@pytest.mark.parametrize("n", [2, 64])
def test_kernels_are_told_the_same_again_without_working_it_out_again_and_anew_where_an_address_differs(n):
    problem = Problem("float16", "nhwc", n, 2048, 256, *PAPER)
    plan = plan_on(problem, Device(132, 90, 2))
    told = nvrtc.arguments_by_addresses(problem, plan)
    changes = [{}, *({"maps": tuple(4096 if i == j else 256 for j in range(3))} for i in range(3))]
    changes += [{name: 4096} for name in ADDRESSES if name != "maps"]
    for change in changes:
        pointers = Pointers(**{**ADDRESSES, **change})
        arguments = told(pointers)
        assert bytes(arguments[0].contents) == bytes(params_of(problem, plan, pointers))
        assert told(Pointers(**{**ADDRESSES, **change})) is arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": (256, 8, 768)}, "map 1 begins at 0x8, not at a multiple of 16 bytes"),
        ({"weight": 1032}, "weight begins at 0x408"),
        ({"workspace": 1540}, "workspace begins at 0x604"),
        ({"maps": (256, None, 768)}, "the address of map 1 is missing"),
        ({"maps": (256, 512)}, "2 maps are not the 3 of the problem"),
        *(({name: None}, f"the address of {name} is missing") for name in ADDRESSES if name != "maps"),
    ],
)
def test_addresses_that_are_missing_or_off_their_alignment_are_refused_by_name(change, message):
    problem = Problem("float16", "nhwc", 2, 2048, 256, *PAPER, pooling="gem", neck="relu_norm")
    told = nvrtc.arguments_by_addresses(problem, plan_on(problem, Device(132, 90, 2)))
    complete = {**ADDRESSES, "scale": 2048, "shift": 2304, "power": 2560}
    told(Pointers(**complete))
    with pytest.raises(ValueError, match=message):
        told(Pointers(**{**complete, **change}))
