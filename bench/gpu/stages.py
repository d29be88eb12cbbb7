"""The stages of the suite: each yields rows, dicts with `row` and its figures, `left_out` or `failed` with the reason.

A stage is the same code on a GPU and on a CPU; there the sizes are small, and what only a GPU has is left out by name.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgn_deploy.bench.environment import environment, sentence
from mgn_deploy.cuda.management import nvml
from mgn_deploy.packages import import_problem

Rows = Iterator[dict[str, Any]]

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
# Packages and the stages that need them, beside torch and numpy.
NEEDS = {
    "pydantic": "all", "torchvision": "all but distances and rerank", "PIL": "engines, embed", "pyarrow": "embed",
    "array_api_compat": "distances, rerank", "safetensors": "engines, embed", "platformdirs": "the kernel's cache",
    "cuda.core": "the kernel, engines", "cuda.bindings.nvrtc": "the kernel", "triton": "the kernel's rival",
    "onnx": "engines but PyTorch's", "onnxscript": "engines but PyTorch's", "onnxruntime": "onnxruntime-cuda",
    "tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx", "pytest": "correctness (the tests marked gpu)",
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What a stage is told. `until` is of `time.monotonic()`; `weights` a folder, None: random ones."""

    device: str
    scratch: Path
    until: float
    weights: Path | None = None

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        return max(0.0, self.until - time.monotonic())

    def config(self, **other: Any) -> Any:
        """The paper's network on a GPU, a small one on a CPU."""
        from mgn_deploy.config import ModelConfig

        small = {"backbone": "resnet18", "base_width": 16, "reduced_width": 16, "height": 96, "width": 32}
        return ModelConfig(**({} if self.cuda else small), **other)


def facts(setup: Setup) -> Rows:
    """Say what is here: machine, limits, packages that stages need, tools."""
    from mgn_deploy.bench.timing import limits

    yield {"row": "environment", **environment().model_dump(mode="json")}
    for name, stages in NEEDS.items():
        problem = import_problem(name, "train")
        missing = {"left_out": problem.partition(" (pip install")[0]} if problem else {}  # the extra is another's
        yield {"row": f"package {name}", "for": stages, **missing}
    if setup.cuda:
        import torch

        one = torch.cuda.get_device_properties(0)
        facts = {"l2_bytes": one.L2_cache_size, "multiprocessors": one.multi_processor_count, "bytes": one.total_memory}
        clocks = {"megahertz": gpu.megahertz(), "slowed": gpu.slowed()} if (gpu := nvml()) else {}
        yield {"row": "gpu", "name": one.name, **facts, **clocks, "cudnn": torch.backends.cudnn.version()}
    yield {"row": "limits", **limits(setup.device).model_dump()}
    yield {"row": "compute-sanitizer", **({} if sanitizer_program() else {"left_out": "not found"})}


def correctness(setup: Setup) -> Rows:
    """Compare the heads' contenders with float64, the operator's gradients with PyTorch's; run the tests marked gpu."""
    import torch

    from mgn_deploy.bench.kernel.cases import DTYPES, OUTPUTS, Case, Inputs, random_inputs
    from mgn_deploy.bench.kernel.contenders import KERNEL_PATHS, Heads, makers
    from mgn_deploy.bench.kernel.measure import checked
    from mgn_deploy.kernels.torch_op import stripe_pool_reduce

    small: dict[str, Any] = {"channels": 64, "reduced": 16, "sizes": ((3, 2), (4, 3), (6, 3))}
    quick = "MGN_QUICK" in os.environ  # under a sanitizer all is fifty times slower
    kinds = itertools.product((2,) if quick else (1, 3, 9) if setup.cuda else (3,), DTYPES, ("nhwc", "nchw"), OUTPUTS)
    for seed, (images, dtype, layout, output) in enumerate(kinds):
        case = Case(dtype, layout, output, images, **small)
        inputs = random_inputs(case, setup.device, seed)
        ways = makers(case, inputs)
        ways.pop("compiled_graph", None)  # it takes seconds a case; `kernel` checks what it times
        if quick:  # without PyTorch's cache of memory no graph can be captured
            ways = {name: way for name, way in ways.items() if name in ("torch_op", "kernel", *KERNEL_PATHS)}
        with torch.inference_mode():
            yield from (row for row, _ in checked(case, inputs, ways))
    case = Case("float32", "nchw", "features", 2, **small)
    drawn = random_inputs(case, setup.device, 1)
    gradients = []
    for fused in (True, False):
        maps = [map_.clone().requires_grad_() for map_ in drawn.maps]
        if fused:
            found = stripe_pool_reduce(maps, list(case.branches), drawn.weight, drawn.bias)
        else:
            found = Heads(case, Inputs(maps, drawn.weight, drawn.bias))(*maps)
        found.square().sum().backward()
        gradients.append(torch.cat([map_.grad.flatten() for map_ in maps if map_.grad is not None]))
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    yield {"row": "gradient", "contender": "torch_op", "error": error, **({"failed": "wrong"} if error > 1e-5 else {})}
    if setup.cuda and not quick:
        yield _gpu_tests(setup)


def _gpu_tests(setup: Setup) -> dict[str, Any]:
    """The tests that are marked gpu, where pytest is installed."""
    row = {"row": "tests marked gpu"}
    problem = import_problem("pytest", "dev")
    if problem:
        return {**row, "left_out": problem}
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-q", "-p", "no:cacheprovider"]
    command += ["-m", "gpu", "--continue-on-collection-errors", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=setup.left, check=False)
    last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    return {**row, "said": last, **({} if done.returncode in (0, 5) else {"failed": last})}


def sanitizer_program() -> str | None:
    """NVIDIA's compute-sanitizer, on PATH or in the CUDA toolkit."""
    name = "compute-sanitizer"
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which(name) or shutil.which(name, path=cuda)


def sanitizer(setup: Setup) -> Rows:
    """Run the stage `correctness` under each tool of compute-sanitizer.

    PyTorch allocates each tensor by itself for it: in its blocks of many, an access beyond one's end would not show.
    A tool that refuses (under MPS, in a container, on a new architecture) found nothing, and is no failure.
    """
    program = sanitizer_program()
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "MGN_QUICK": "1"}
    for number, tool in enumerate(TOOLS):
        row = {"row": f"sanitizer {tool}"}
        if program is None:
            yield {**row, "left_out": "compute-sanitizer was not found: install the CUDA toolkit, or set CUDA_HOME"}
            continue
        seconds = setup.left / (len(TOOLS) - number)
        stage = [sys.executable, "-m", "mgn_deploy.bench.gpu", "--run-stage", "correctness", "--device", setup.device]
        stage += ["--out", str(setup.scratch / tool), "--minutes", f"{seconds / 60:.3f}"]
        try:
            done = subprocess.run(
                [program, "--tool", tool, "--error-exitcode", "9", *stage],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            yield {**row, "left_out": f"out of its {seconds:.0f} s: --stages sanitizer gives it all --minutes"}
            continue
        said = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        if not said:  # it ends with one where it could watch the program
            last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
            yield {**row, "left_out": f"the tool refuses: {last[:200]}"}
        elif done.returncode:
            yield {**row, "failed": f"{said[-1].strip('= ')} (exit {done.returncode})"}
        else:
            yield {**row, "said": said[-1].strip("= ")}


def kernel(setup: Setup) -> Rows:
    """Measure the heads alone beside PyTorch's; what matters most first."""
    import torch

    from mgn_deploy.bench.kernel.cases import Case, all_cases, random_inputs
    from mgn_deploy.bench.kernel.contenders import makers
    from mgn_deploy.bench.kernel.measure import measured
    from mgn_deploy.bench.timing import Clock, limits

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    small = [Case(dtype, "nhwc", "mirror_embeddings", 2, 256, 64) for dtype in ("float32", "bfloat16")]
    machine, clock, longest = limits(setup.device), Clock(setup.device), 0.0
    for number, case in enumerate(all_cases((32, 1, 8, 64, 2, 128, 512)) if setup.cuda else small):
        started = time.monotonic()
        if number and started + longest > setup.until:  # the first is always measured
            yield {"row": case.name, "left_out": "no time was left"}
            continue
        try:
            with torch.inference_mode():
                inputs = random_inputs(case, setup.device, number)
                ways = makers(case, inputs)
                if not setup.cuda:
                    del ways["triton"]  # the interpreter's time says nothing; `correctness` has what it computes
                yield from measured(case, inputs, ways, clock, machine, 40 if setup.cuda else 5)
        except torch.OutOfMemoryError as error:
            yield {"row": case.name, "left_out": sentence(error)}
        longest = max(longest, time.monotonic() - started)


def engines(setup: Setup) -> Rows:
    """Measure the engines beside PyTorch in several ways, by the code of `mgn-deploy bench`; what is slow to open last,
    beside the engine alone, so that a stage that is ended before has the rest."""
    from mgn_deploy.bench.gpu.bundles import bundles
    from mgn_deploy.bench.gpu.rivals import TorchRival, rivals

    others, first = rivals(setup.cuda), None
    for precision, bundle in bundles(setup, ("fp16", "fp32", "int8") if setup.cuda else ("fp32",)):
        if isinstance(bundle, str):
            yield {"row": f"bundle {precision}", "left_out": bundle}
            continue
        first = first or bundle
        share = setup.left / (2 if setup.cuda else 1)
        yield from _measured(setup, bundle, (64, 1, 8, 32) if setup.cuda else (1, 4), share, others)
        others = {}
    if setup.cuda and first:
        ways = {"torch.compile fp16": lambda bundle: TorchRival(bundle, "fp16", "compiled")}
        yield from _measured(setup, first, (64, 1), setup.left, ways, engines=("torch-cuda",))


def embed(setup: Setup) -> Rows:
    """Measure the way from image files to a store, and the decoding alone, which bounds it."""
    from mgn_deploy.bench.gpu.bundles import bundles
    from mgn_deploy.datasets.drawn import draw_market1501
    from mgn_deploy.images.decode import read_crop
    from mgn_deploy.images.listing import list_images
    from mgn_deploy.images.prefetch import in_order

    config = setup.config()
    folder = setup.scratch / "files"
    draw_market1501(folder, train_identities=64 if setup.cuda else 4, test_identities=2)
    files = [file.path for file in list_images(folder) if file.path]
    start = time.perf_counter()
    for _ in in_order(lambda path: read_crop(path, config.height, config.width), files):
        pass
    yield {"row": "decoding alone", "images_per_second": round(len(files) / (time.perf_counter() - start), 1)}
    problem = import_problem("pyarrow", "cpu")
    for precision, bundle in bundles(setup, ("fp16",) if setup.cuda else ("fp32",)):
        if problem or isinstance(bundle, str):
            yield {"row": f"embed {precision}", "left_out": problem or bundle}
        else:
            yield from _measured(setup, bundle, (32,) if setup.cuda else (4,), setup.left, {}, folder, len(files))


def _measured(
    setup: Setup, bundle: Path, batches: tuple[int, ...], seconds: float, rivals: Any, images: Path | None = None,
    count: int = 64, engines: Sequence[str] = (),
) -> Rows:  # fmt: skip
    from mgn_deploy.backends.registry import ENGINES
    from mgn_deploy.bench.speed import measure

    wanted = "GPU" if setup.cuda else "CPU"
    names = [name for name, row in ENGINES.items() if wanted in row.device and name != "torch"]
    result = measure(
        [bundle], engines=engines or names, batches=batches, images=images, count=count, rivals=rivals,
        minutes=max(seconds - 1, 1) / 60, allow_unproven=True,
    )  # fmt: skip
    for row in result.rows:
        missing = row.not_measured.get("engine")
        yield {"row": row.name, **({"left_out": missing} if missing else row.model_dump(mode="json"))}


def distances(setup: Setup) -> Rows:
    """Measure the distances of queries to a gallery, beside PyTorch's product alone."""
    import torch

    from mgn_deploy.bench.timing import Clock
    from mgn_deploy.retrieval.distance import distance_matrix

    queries, rows, dim = (2000, 100_000, 2048) if setup.cuda else (100, 2000, 256)
    drawn = torch.randn(queries + rows, dim, generator=torch.Generator().manual_seed(0))
    query, gallery = torch.nn.functional.normalize(drawn, dim=1).split((queries, rows))
    start = time.perf_counter()
    found = distance_matrix(query.numpy(), gallery.numpy(), device=setup.device)  # type: ignore[arg-type]
    took = time.perf_counter() - start
    expected = 1 - query[:8].double() @ gallery.double().T
    error = float((torch.from_numpy(found[:8]).double() - expected).abs().max())
    wrong = {"failed": f"off by {error:.1e}"} if error > 1e-4 else {}
    yield {"row": "distances, host to host", "pairs_per_second": queries * rows / took, "error": error, **wrong}
    left, right = query.to(setup.device), gallery.to(setup.device)
    clock = Clock(setup.device)
    alone = statistics.median(clock(lambda: left @ right.T, cold=False) for _ in range(5))
    yield {"row": "product alone, on the device", "pairs_per_second": queries * rows / alone}


def rerank(setup: Setup) -> Rows:
    """Measure re-ranking by k-reciprocal neighbours on the device, beside the same on the CPU."""
    from mgn_deploy.bench.retrieval import drawn_people
    from mgn_deploy.retrieval.rerank import rerank_top_k

    queries, gallery, dim = (2000, 16_000, 2048) if setup.cuda else (40, 320, 64)
    rows, _ = drawn_people(queries + gallery, dim)
    answers = {}
    for device in dict.fromkeys((setup.device, "cpu")):
        start = time.perf_counter()
        indices, _ = rerank_top_k(rows[:queries], rows[queries:], 10, device=device)  # type: ignore[arg-type]
        took, answers[device] = time.perf_counter() - start, indices[:, 0]
        same = float((answers[device] == answers[setup.device]).mean())
        wrong = {"failed": "the device's nearest are not the CPU's"} if same < 0.999 else {}
        rate = {"queries_per_second": round(queries / took, 1)}
        yield {"row": f"rerank on {device}", **rate, "same_first": same, **wrong}


def train_step(setup: Setup) -> Rows:
    """Measure a training step: forward, losses, backward and the optimizer, on one batch of P people with K images."""
    for amp in ("off", "bf16", *(("fp16",) if setup.cuda else ())):
        yield _train_step(setup, amp, *((16, 4) if setup.cuda else (2, 2)))


def _train_step(setup: Setup, amp: str, people: int, images: int) -> dict[str, Any]:
    import torch

    from mgn_deploy.bench.timing import Clock
    from mgn_deploy.train.losses import mgn_loss
    from mgn_deploy.train.model import MGN

    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    config = setup.config(num_classes=people)
    model = MGN(config).to(setup.device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler(setup.device, enabled=amp == "fp16")
    crops = torch.randn(people * images, 3, config.height, config.width, device=setup.device)
    crops = crops.contiguous(memory_format=torch.channels_last)
    identities = torch.arange(people, device=setup.device).repeat_interleave(images)
    losses: list[torch.Tensor] = []

    def step() -> None:
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        with torch.autocast(setup.device, dtype, enabled=amp != "off"):
            output = model(crops)
        loss, _ = mgn_loss(output, identities)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    if setup.cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(setup.device)
    seconds = statistics.median(clock(step, cold=False) for _ in range(10 if setup.cuda else 2))
    row = {"row": f"train-step amp={amp}", "batch": people * images}
    wrong = {} if bool(torch.stack(losses).isfinite().all()) else {"failed": "the loss is not finite"}
    memory = {"device_bytes": torch.cuda.max_memory_allocated()} if setup.cuda else {}
    return {**row, **memory, "images_per_second": round(people * images / seconds, 2), **wrong}


STAGES: dict[str, tuple[float, Callable[[Setup], Rows]]] = {  # with each one's share of the time
    "facts": (0.5, facts),
    "correctness": (1.5, correctness),
    "sanitizer": (1.5, sanitizer),
    "kernel": (1.5, kernel),
    "engines": (2.0, engines),
    "embed": (0.7, embed),
    "distances": (0.4, distances),
    "rerank": (0.4, rerank),
    "train-step": (0.8, train_step),
}
