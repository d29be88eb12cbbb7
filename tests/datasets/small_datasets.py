"""Datasets of a few empty files."""

from __future__ import annotations

from pathlib import Path


def fill(root: Path, folders: dict[str, list[str]]) -> Path:
    """Empty files of these names: opening a dataset decodes no image."""
    for folder, names in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / name).touch()
    return root


def market1501(place: Path) -> Path:
    """All three subsets of Market-1501, junk and distractors included."""
    return fill(
        place / "data" / "Market-1501-v15.09.15",
        {
            "bounding_box_train": ["0007_c2s1_000002_00.jpg", "0007_c1s1_000001_00.jpg"],
            "query": ["0009_c1s1_000001_00.jpg"],
            "bounding_box_test": [
                "0009_c2s1_000001_00.jpg",
                "-1_c1s1_000001_00.jpg",
                "0000_c1s1_000001_00.JPG",
                "0010_c1s1_000001_00.png",
            ],
        },
    )
