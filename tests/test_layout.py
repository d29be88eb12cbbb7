"""Who may import whom: data flows one way, and nobody imports upwards but where it is listed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"mgn_deploy": "mgn_deploy"} | {
    name: f"mgn_deploy.{name}" for name in ("train", "export", "kernels", "bench")
}

# From what everyone stands on to what stands on everything. A room may import its own modules and those of earlier
# lines.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("", "choices", "errors", "progress", "config", "machine", "locks", "packages", "interrupt", "telemetry"),
    ("files", "cached"),
    ("console",),
    ("images", "bundle", "cuda"),
    ("datasets",),
    ("backends",),
    ("embedder",),
    ("gallery",),
    ("retrieval",),
    ("index",),
    ("identity",),
    ("report",),
    ("serve",),
    ("kernels",),
    ("train",),
    ("export",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Upward imports, each inside a function: the reference and the kernel are opened by name, where somebody asks for them.
UPWARD = {
    ("backends.torch", "train.model"),
    ("backends.torch", "train.weights"),
    ("backends.torch_cuda.backend", "train.weights"),
    ("backends.torch_cuda.network", "train.model"),
    ("backends.torch_cuda.network", "kernels.torch_heads"),
    ("backends.torch_cuda.network", "kernels.torch_op"),
    ("backends.heads.cut", "kernels.plan"),
    ("backends.heads.cuda", "kernels.nvrtc"),
    ("backends.heads.cuda", "kernels.params"),
    ("backends.heads.cuda", "kernels.plan"),
}


class Import(NamedTuple):
    source: str  # below mgn_deploy, as "backends.torch"
    target: str
    lazy: bool


def module_name(path: Path) -> str:
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((FOLDERS[folder], *parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


def imports() -> Iterator[Import]:
    """Of all modules of the project, those for type checkers alone left out."""
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        for_types = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        top = {*tree.body, *(inner for node in tree.body if isinstance(node, ast.Try) for inner in node.body)}
        for node in ast.walk(tree):
            if node in for_types:
                continue
            for target in targets(node):
                yield Import(short(name), short(target), node not in top)


def targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in MODULES)
    elif isinstance(node, ast.ImportFrom) and (node.module or "") in MODULES:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in MODULES else str(node.module)


def short(name: str) -> str:
    return name.removeprefix("mgn_deploy").removeprefix(".")


def level(name: str) -> int:
    return LEVEL[name.partition(".")[0]]


IMPORTS = list(imports())


def test_nobody_imports_upwards_but_where_it_is_listed() -> None:
    upward = {(one.source, one.target) for one in IMPORTS if level(one.target) > level(one.source)}
    assert upward == UPWARD


def test_upward_imports_wait_until_they_are_needed() -> None:
    assert all(one.lazy for one in IMPORTS if (one.source, one.target) in UPWARD)


def test_modules_import_each_other_in_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    for one in IMPORTS:
        if not one.lazy and one.source != one.target:
            edges.setdefault(one.source, set()).add(one.target)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


@pytest.mark.parametrize("room", [room for rooms in LAYERS for room in rooms if room not in ("", "__main__")])
def test_every_room_that_is_named_is_there(room: str) -> None:
    assert f"mgn_deploy.{room}" in MODULES
