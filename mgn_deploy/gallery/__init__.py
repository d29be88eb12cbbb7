"""A folder of images into an embedding store, and reading one."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "float16"]  # of a store's embeddings
