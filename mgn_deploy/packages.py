"""Which optional packages are installed, and what to install for those that are not."""

from __future__ import annotations

import signal
from importlib import import_module

from mgn_deploy.errors import CannotRun
from mgn_deploy.interrupt import DeferredInterrupt
from mgn_deploy.telemetry import without_openvino_telemetry


def import_problem(package: str, extra: str) -> str | None:
    """Import a package; None, or the sentence that says why it cannot be and what to install.

    Ctrl-C and its kin act after the import: extension modules, as OpenVINO's, turn what a signal's handler raises while
    they are initialised into an ImportError.
    """
    with DeferredInterrupt() as interrupt:
        problem = _import_problem(package, extra)
    if interrupt.wanted:
        signal.raise_signal(interrupt.wanted)
    return problem


def _import_problem(package: str, extra: str) -> str | None:
    try:
        with without_openvino_telemetry():
            import_module(package)
    except ImportError as error:
        if getattr(error, "name", None) in (package, package.partition(".")[0]):
            return f"{package} is not installed (pip install 'mgn-deploy[{extra}]')"
        return f"{package} is installed and cannot be imported ({error})"
    except (OSError, RuntimeError) as error:  # broken shared libraries
        return f"{package} is installed and cannot be loaded ({error})"
    return None


def require(package: str, extra: str, what: str) -> None:
    """Import a package.

    Args:
        package: its import name.
        extra: of mgn-deploy, which installs it.
        what: needs it, as a sentence for the message.

    Raises:
        CannotRun: it cannot be imported.
    """
    problem = import_problem(package, extra)
    if problem:
        raise CannotRun(f"{what}: {problem}")


# What init, import, train, export and demo need besides a backend: the extra `train`.
TRAINING_PACKAGES = ("torch", "torchvision", "safetensors", "onnx", "onnxscript", "tensorboard")


def require_training() -> None:
    """Raise CannotRun unless what `train/` and `export/` import is installed."""
    for package in TRAINING_PACKAGES:
        require(package, "train", "this command needs PyTorch and the exporter's packages")


# What the service needs besides a backend: the extra `serve`, by import names.
SERVING_PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def require_serving() -> None:
    """Raise CannotRun unless what `serve/` imports is installed."""
    for package in SERVING_PACKAGES:
        require(package, "serve", "the service needs a web server")
