from __future__ import annotations

from pathlib import Path


class Bomb:
    """A pickle that makes a file when it is loaded by a careless reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))
