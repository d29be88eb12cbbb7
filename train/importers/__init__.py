"""Importers of public MGN checkpoints: each module knows one code that writes them, by the names of its tensors."""

from __future__ import annotations

from typing import Literal

# Whose code wrote a checkpoint, for `import --from`; "auto": the names of its tensors tell.
SourceName = Literal["auto", "fastreid", "seathiefwang", "levyfan", "gnayuohz"]
