"""Reading a file of tensors that somebody else wrote. Nothing in it is run: `weights_only=True`, or safetensors."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mgn_deploy.errors import UserError


def read_tensor_file(path: Path) -> Any:
    """Read what `torch.save` wrote, or the tensors by name of a `.safetensors` file, on the CPU.

    Raises:
        UserError: no such file, a damaged one, or one with Python objects in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy it again") from None


def _read_torch(path: Path) -> Any:
    try:
        # fast-reid keeps the best metric beside the model, as a NumPy number.
        with torch.serialization.safe_globals(_numpy_numbers()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol: what matters is whether it can be read
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a foreign file; the message says what
        unsafe = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        if unsafe:
            raise UserError(
                f"{path} cannot be read as weights: it holds Python objects ({unsafe[1]}), and reading them could run "
                "code; save `model.state_dict()` where it was made"
            ) from None
        reason = next((line for line in str(error).splitlines() if line), "it ends too early")[:120]
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}: {reason}): it is damaged, or something else"
        ) from None


def _numpy_numbers() -> list[Any]:
    """List what a pickled NumPy number is made of, under NumPy's old and new module names: it runs nothing."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = {type(np.dtype(kind)) for kind in ("f8", "f4", "i8")}
    return [*((scalar, name) for name in names), np.dtype, *kinds]
