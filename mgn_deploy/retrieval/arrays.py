"""Where distances are computed: NumPy on the CPU, PyTorch or CuPy on a CUDA device, by one code.

The code is written for the array API standard (data-apis.org/array-api), which array-api-compat gives all three. What
the standard lacks (the k largest of a row) is here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, get_args

import numpy as np

from mgn_deploy.choices import Compute, Device
from mgn_deploy.errors import CannotRun, UserError


@dataclass(frozen=True)
class Arrays:
    """A library of the array API and one of its devices.

    Attributes:
        xp: the library's namespace, of array-api-compat.
        device: as the library names it.
        name: for messages, as in "torch on cuda:0".
        compute: the precision of products. float16: both factors are rounded to it. tf32: to 10 bits of mantissa, by
            the tensor cores of a CUDA device. Sums are float32 in all.
    """

    xp: Any
    device: Any
    name: str
    compute: Compute = "float32"

    @classmethod
    def open(cls, device: Device | Arrays = "cpu", compute: Compute = "float32") -> Arrays:
        """NumPy for cpu; PyTorch or else CuPy for cuda; auto takes cuda where one of them finds a device.

        What is open already is returned as it is.

        Raises:
            CannotRun: cuda without a CUDA device, or without either library; tf32 elsewhere than PyTorch on CUDA.
            UserError: another word.
        """
        if isinstance(device, Arrays):
            return device
        if compute not in get_args(Compute):
            raise UserError(f"products in {compute!r} are not known: choose one of {', '.join(get_args(Compute))}")
        if device not in get_args(Device):
            raise UserError(f"the device {device!r} is not known: choose one of {', '.join(get_args(Device))}")
        found = None if device == "cpu" else _cuda()
        if found is None and device == "cuda":
            raise CannotRun("--device cuda: neither PyTorch nor CuPy finds a CUDA device here; use --device cpu")
        arrays = replace(found or cls.of("numpy", "cpu"), compute=compute)
        if compute == "tf32" and not (arrays.is_torch and arrays.name.startswith("torch on cuda")):
            raise CannotRun(f"tf32 is computed by PyTorch on CUDA devices, and this is {arrays.name}: choose float32")
        return arrays

    @classmethod
    def of(cls, library: str, device: Any, compute: Compute = "float32") -> Arrays:
        """One of numpy, torch and cupy on the device that the library knows by this name."""
        return cls(import_module(f"array_api_compat.{library}"), device, f"{library} on {device}", compute)

    @property
    def is_numpy(self) -> bool:
        return self.name.startswith("numpy")

    @property
    def is_torch(self) -> bool:
        return self.name.startswith("torch")

    def product(self, left: Any, right: Any, out: np.ndarray | None = None) -> Any:
        """Inner products of two sets of rows that `put` gave, float32 `[n, m]`.

        Args:
            left, right: `[n, d]` and `[m, d]`.
            out: for NumPy, where to put them.
        """
        if self.compute == "float16" and self.is_torch and left.is_cuda:
            torch = import_module("torch")
            return torch.mm(left.half(), right.half().T, out_dtype=torch.float32)
        if self.compute == "float16":  # the same factors; the sums are float32's anyway
            left, right = self._halved(left), self._halved(right)
        if self.compute == "tf32":
            cuda = import_module("torch").backends.cuda
            before, cuda.matmul.allow_tf32 = cuda.matmul.allow_tf32, True
            try:
                return left @ right.T
            finally:
                cuda.matmul.allow_tf32 = before
        return np.matmul(left, right.T, out=out) if self.is_numpy else left @ right.T

    def _halved(self, rows: Any) -> Any:
        return self.xp.astype(self.xp.astype(rows, self.xp.float16), self.xp.float32)

    def put(self, rows: np.ndarray) -> Any:
        """C-contiguous float32 rows on the device, without a copy where they are there already."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if self.is_numpy:
            return rows
        if not rows.flags.writeable:  # PyTorch warns of those
            rows = rows.copy()
        return self.xp.asarray(rows, device=self.device)

    def get(self, values: Any) -> np.ndarray:
        """The same values in NumPy."""
        if self.is_numpy:
            return values
        return values.get() if hasattr(values, "get") else values.cpu().numpy()

    def largest(self, values: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Each row's k largest values: their columns, int64 `[n, k]`, in no order, and themselves.

        By NumPy the first of equal values are kept, by another library any.
        """
        if self.is_numpy:
            columns = first_largest(values, k)
            return columns, np.take_along_axis(values, columns, axis=1)
        if self.is_torch:
            found = values.topk(k, dim=1, sorted=False)
            return self.get(found.indices), self.get(found.values)
        columns = self.xp.argpartition(values, -k, axis=1)[:, -k:]
        return self.get(columns), self.get(self.xp.take_along_axis(values, columns, axis=1))


def first_largest(values: np.ndarray, k: int) -> np.ndarray:
    """Columns `[n, k]`, ascending, of each row's k largest values; of equal ones the first."""
    width = values.shape[1]
    if k >= width:
        return np.broadcast_to(np.arange(width), values.shape)
    kth = np.partition(values, width - k, axis=1)[:, width - k, None]
    kept = values >= kth
    if np.count_nonzero(kept) > k * len(kept):
        surplus = np.count_nonzero(kept, axis=1) - k
        for row in np.flatnonzero(surplus):
            ties = np.flatnonzero(values[row] == kth[row])
            kept[row, ties[-surplus[row] :]] = False
    return np.flatnonzero(kept).reshape(-1, k) % width


def _cuda() -> Arrays | None:
    try:
        import torch

        if torch.cuda.is_available():
            return Arrays.of("torch", f"cuda:{torch.cuda.current_device()}")
    except ImportError:
        pass
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount():
            return Arrays.of("cupy", cupy.cuda.Device())
    except ImportError:
        pass
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver
        pass
    return None
