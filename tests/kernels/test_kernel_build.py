"""The CUDA source through the real compilers: every architecture, no spills, wide loads, NVRTC, the C API."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mgn_deploy.kernels import build, nvrtc
from mgn_deploy.kernels.plan import MAX_BRANCHES, Device, Pointers, launches, make_problem, params_of, plan_on

FOLDER = Path(build.__file__).parent
NVCC = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
KERNELS = 18 + 18 + 5 + 5 + 2 + 3  # pool, fused; rows, fma; mma; epilogue


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", build.ARCHITECTURES)
def test_every_architecture_compiles_without_spills(arch, tmp_path):
    uses = build.compile_for(arch, tmp_path, NVCC)
    assert len({use.kernel for use in uses}) == KERNELS
    assert {use.kernel: use.spilled for use in uses if use.spilled} == {}
    # Two blocks of 256 threads share 65536 registers: what the fused kernel's grid counts on.
    assert max(use.registers for use in uses) <= 128


@pytest.mark.slow
@needs_nvcc
def test_maps_and_weights_are_loaded_16_bytes_at_a_time(tmp_path):
    """As PTX has it, from which the machine code is made. Only the ends of an NCHW map's ranges are loaded one by one."""
    ptx = tmp_path / "kernel.ptx"
    source = str(FOLDER / "stripe_pool_reduce.cu")
    subprocess.run([NVCC, "-std=c++17", "-arch=compute_90", "-ptx", "-o", str(ptx), source], check=True)
    wide, loads = "ld.global.nc.v4", {}
    for body in ptx.read_text().split(".entry ")[1:]:
        found = [load.rsplit(".", 1)[0] for load in re.findall(r"ld\.global[.\w]+", body)]
        loads[build.kernel_name(body.split("(")[0].strip())] = found
    for kernel in ("pool<Half, nhwc, max>", "pool<Bfloat, nhwc, avg>", "pool<float, nhwc, max>"):
        assert set(loads[kernel]) == {wide}
    for kernel in ("rows<Half, Half>", "mma<Bfloat>", "fma<float, float>"):
        assert set(loads[kernel]) == {wide, "ld.global.v4"}  # the weights, the pooled vectors
    for kernel in ("pool<Half, nchw, max>", "pool<float, nchw, max>"):
        assert loads[kernel].count("ld.global") == 2
        assert set(loads[kernel]) == {wide, "ld.global"}


def test_the_compilers_report_is_read():
    report = """
ptxas info    : Compiling entry function '_ZN12_x_11pool_kernelINS_4HalfELi1ELi2EEEvNS_6ParamsE' for 'sm_90'
ptxas info    : Function properties for _ZN12_x_11pool_kernelINS_4HalfELi1ELi2EEEvNS_6ParamsE
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN12_x_10fma_kernelINS_6BfloatES1_EEvNS_6ParamsE' for 'sm_90'
ptxas info    : Function properties for _ZN12_x_10fma_kernelINS_6BfloatES1_EEvNS_6ParamsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 63 registers, used 1 barriers
"""
    assert build.read_report(report) == [
        build.Use("fma<Bfloat, Bfloat>", 63, 0),
        build.Use("pool<Half, nhwc, gem>", 64, 16),
    ]


@pytest.mark.slow
@needs_nvcc
def test_the_example_builds(tmp_path):
    sources = [str(FOLDER / name) for name in ("example.cu", "stripe_pool_reduce.cu")]
    program = tmp_path / "example"
    subprocess.run(
        [NVCC, "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-o", str(program), *sources], check=True
    )
    run = subprocess.run([program], capture_output=True, text=True)
    if "largest error" not in run.stdout:  # no GPU: it says so
        assert run.returncode == 1
        assert re.match(r"(CUDA|stripe-pool-reduce): .*(driver|device)", run.stderr)
    else:
        assert run.returncode == 0, run.stdout


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_header_is_c(tmp_path):
    source = tmp_path / "one.c"
    source.write_text('#include "stripe_pool_reduce.h"\nint main(void) { mgn_spr_problem p = {0}; return p.batch; }\n')
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I", str(FOLDER)]
    subprocess.run(["gcc", *flags, str(source)], check=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mgn-deploy" / "kernels"


def test_nvrtc_compiles_a_problems_kernels_without_a_gpu_and_keeps_them(cache, monkeypatch):
    problem = make_problem("bfloat16", "nhwc", 64, 2048, 256, (1, 2, 3), ((12, 4), (24, 8), (24, 8)))
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


def test_architectures_do_not_share_machine_code(cache):
    kernels = ("epilogue_kernel<Half>",)
    assert nvrtc.compile_kernels(kernels, "sm_80").cubin != nvrtc.compile_kernels(kernels, "sm_120").cubin


def pointers_at(*addresses):
    """Maps, then weight, bias, scale, shift, power, workspace, output; None: not given."""
    return Pointers((ctypes.c_void_p * MAX_BRANCHES)(*addresses[:MAX_BRANCHES]), *addresses[MAX_BRANCHES:])


@pytest.mark.parametrize("n", [2, 64])
def test_kernels_are_told_the_same_again_without_working_it_out_again_and_anew_where_an_address_differs(n):
    problem = make_problem("float16", "nhwc", n, 2048, 256, (1, 2, 3), ((12, 4), (24, 8), (24, 8)))
    plan = plan_on(problem, Device(132, 90, 2))
    told = nvrtc.arguments_by_addresses(problem, plan)
    addresses = [256, 512, 768, None, 1024, 1280, None, None, None, 1536, 1792]
    sets = [addresses] + [
        [4096 if index == place else old for index, old in enumerate(addresses)]
        for place in range(len(addresses))
        if place != 3  # of a fourth map, which this problem has not
    ]
    for changed in sets:
        pointers = pointers_at(*changed)
        arguments = told(bytes(pointers))
        assert bytes(arguments[0].contents) == bytes(params_of(problem, plan, pointers))
        assert told(bytes(pointers_at(*changed))) is arguments
