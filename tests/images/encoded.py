"""Images encoded for a test, and what reading them gives."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UnreadableImage
from mgn_deploy.images.decode import load_rgb

COLOURS = np.kron(
    np.array([[[220, 30, 40], [30, 200, 50]], [[40, 60, 210], [240, 240, 240]]], np.uint8),
    np.ones((32, 32, 1), np.uint8),
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def crop_bytes(kind: str, **options: object) -> bytes:
    return encoded(draw_crop(1, 1, 0), kind, **options)


def reason(source: object) -> str:
    with pytest.raises(UnreadableImage) as refused:
        load_rgb(source)
    return str(refused.value)
