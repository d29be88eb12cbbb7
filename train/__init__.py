"""The PyTorch reference: the model, its losses, its data and the loop that trains it."""

from __future__ import annotations

from typing import Literal

# Where a run trains; "auto": on CUDA where PyTorch finds a device.
Device = Literal["auto", "cpu", "cuda"]
