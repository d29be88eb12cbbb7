"""Where CUDA's libraries are found for ONNX Runtime, and what is said where they are not."""

from __future__ import annotations

import onnxruntime
import pytest

from mgn_deploy.backends.onnxruntime.session import (
    cuda_library_problem,
)


def preloading(monkeypatch, found_in: str | None) -> list[str | None]:
    """Let ONNX Runtime say what it does where the libraries lie in one folder: pip's packages (None), a folder, or
    nowhere ("")."""
    folders = []

    def preload_dlls(directory=None):
        folders.append(directory)
        if directory != found_in:
            print("Failed to load libcublasLt.so.12: libcublasLt.so.12: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload_dlls)
    cuda_library_problem.cache_clear()
    return folders


def test_cudas_libraries_are_found_in_a_toolkit_that_the_environment_names(monkeypatch, tmp_path) -> None:
    (tmp_path / "lib64").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    folders = preloading(monkeypatch, str(tmp_path / "lib64"))
    assert cuda_library_problem() is None
    assert folders == [None, str(tmp_path / "lib64")]


def test_pips_packages_come_first(monkeypatch, tmp_path) -> None:
    (tmp_path / "lib64").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    folders = preloading(monkeypatch, None)
    assert cuda_library_problem() is None
    assert folders == [None]


def test_libraries_that_lie_nowhere_are_a_sentence(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    preloading(monkeypatch, "")
    assert "libcublasLt.so.12" in cuda_library_problem()
    assert "set CUDA_HOME" in cuda_library_problem()


def test_a_broken_file_in_pips_packages_is_none_where_the_systems_own_loads(monkeypatch) -> None:
    def preload_dlls(directory=None):
        print("Failed to load /venv/site-packages/nvidia/cublas/lib/libcublasLt.so.12: wrong ELF class")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload_dlls)
    cuda_library_problem.cache_clear()
    assert cuda_library_problem() is None


@pytest.fixture(autouse=True)
def forget_libraries():
    """What was found with a stand-in is no more true after the test."""
    yield
    cuda_library_problem.cache_clear()
