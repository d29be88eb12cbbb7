"""nvImageCodec's images are Pillow's, its crops are to a rounding, and what it does not decode Pillow does."""

import io

import numpy as np
import pytest
from hostile import png_bomb
from PIL import Image

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UnreadableImage
from mgn_deploy.images.decode import load_rgb, read_crop

pytest.importorskip("nvidia.nvimgcodec", reason="the extra nvimagecodec is not installed")
from mgn_deploy.images.nvimagecodec import NvImageCodec


def encoded(kind: str = "JPEG", image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or draw_crop(1, 1, 0)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def codec() -> NvImageCodec:
    return NvImageCodec()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


JPEGS = {
    "baseline": encoded(),
    "progressive": encoded(progressive=True),
    "420": encoded(subsampling=2, quality=60),
    "444": encoded(subsampling=0),
    "grey": encoded(image=draw_crop(1, 1, 0).convert("L")),
    "cmyk": encoded(image=draw_crop(1, 1, 0).convert("CMYK")),
    "turned": turned(),
    "odd": encoded(image=draw_crop(1, 1, 0).crop((0, 0, 53, 101))),
}
BROKEN = {
    "truncated": encoded()[:900],
    "end alone": b"\xff\xd8\xff" + b"a" * 50 + b"\xff\xd9",
    "empty": b"",
    "bomb": png_bomb(20_000),
    "tiny": encoded(image=Image.new("RGB", (3, 3))),
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_is_as_pillow_decodes_it(codec, name):
    codec.by_pillow = 0
    [image] = codec.decode([JPEGS[name]])
    expected = np.asarray(load_rgb(JPEGS[name])).astype(int)
    assert tuple(image.shape) == expected.shape
    assert np.abs(image.cpu().numpy() - expected).max() <= (2 if codec.device == "cuda" else 0)
    assert codec.by_pillow == 0


@pytest.mark.parametrize("size", [(384, 128), (96, 32), (144, 64), (160, 40)])
def test_crops_are_pillows_to_a_rounding(codec, size):
    content = encoded("PNG")  # equal pixels on any device
    [image] = codec.decode([content])
    change = np.abs(codec.resize(image, *size).astype(int) - read_crop(content, *size))
    assert change.max() <= 1
    assert (change > 0).mean() < 0.001


def test_what_is_no_jpeg_is_pillows_and_counted(codec):
    codec.by_pillow = 0
    contents = [JPEGS["baseline"], encoded("PNG"), JPEGS["odd"], encoded("GIF"), encoded("TIFF")]
    images = list(codec.decode(contents))
    assert [tuple(image.shape) for image in images] == [np.asarray(load_rgb(content)).shape for content in contents]
    assert np.array_equal(images[1].cpu().numpy(), np.asarray(draw_crop(1, 1, 0)))
    assert codec.by_pillow == 3


def test_broken_images_have_pillows_reasons_and_spoil_no_other(codec):
    contents = [content for broken in BROKEN.values() for content in (JPEGS["baseline"], broken)]
    images = list(codec.decode(contents))
    for broken, content in zip(images[1::2], BROKEN.values(), strict=True):
        with pytest.raises(UnreadableImage) as refused:
            load_rgb(content)
        assert str(broken) == str(refused.value)
    assert all(image.shape == images[0].shape for image in images[::2])
