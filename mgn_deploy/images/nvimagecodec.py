"""JPEGs decoded by NVIDIA's nvImageCodec, and crops resized by PyTorch, on a GPU; or on the CPU by the same code.

nvImageCodec: https://docs.nvidia.com/cuda/nvimagecodec/py_api.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from mgn_deploy.errors import UnreadableImage
from mgn_deploy.images.decode import MAX_PIXELS, MIN_SIDE, load_rgb
from mgn_deploy.packages import require

if TYPE_CHECKING:
    from torch import Tensor

_NEEDED = "--decoder nvimagecodec needs nvImageCodec and PyTorch"


class NvImageCodec:
    """Decodes photos and resizes crops on one device. Not for use by several threads at once.

    JPEGs of 64 megapixels at most that end as JPEGs do are nvImageCodec's; whatever else, and what it gives back, is
    `load_rgb`'s, so that the same files are refused for the same reasons. Crops are resized as by `resize_crop`, the
    horizontal pass first and rounded to 8 bits between the two, in float32.

    Attributes:
        device: `cuda`, or `cpu` where PyTorch finds no GPU.
        preprocessing: the id of its pixels, which a store records.
        by_pillow: images that Pillow decoded.

    Raises:
        CannotRun: nvImageCodec or PyTorch is not installed.
    """

    def __init__(self) -> None:
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # its lines on stderr name no file
        require("nvidia.nvimgcodec", "nvimagecodec", _NEEDED)
        require("torch", "train", _NEEDED)
        import torch
        from nvidia import nvimgcodec

        kinds = nvimgcodec.BackendKind
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.preprocessing = f"nvimagecodec-{nvimgcodec.__version__}-{self.device}-bicubic-1"
        self.by_pillow = 0
        self._nvimgcodec: Any = nvimgcodec
        # Not the JPEG engine of some GPUs: which images it takes, with upsampling of its own, depends on their number.
        self._decoder = nvimgcodec.Decoder(
            device_id=torch.cuda.current_device() if self.device == "cuda" else nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            backends=[kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU] if self.device == "cuda" else [kinds.CPU_ONLY],
            options=":fancy_upsampling=1",  # of chroma, as libjpeg does
        )

    def decode(self, contents: Sequence[bytes]) -> Iterator[Tensor | UnreadableImage]:
        """Decode the contents of image files, in their order, about 64 megapixels at a time.

        Gives each as RGB uint8 `[height, width, 3]` on the device, upright, or the reason why there is none.
        """
        sizes = list(map(self._jpeg_pixels, contents))
        groups = groupby(zip(accumulate(sizes), sizes, contents, strict=True), lambda one: one[0] // MAX_PIXELS)
        for _, group in groups:
            members = [one[1:] for one in group]
            jpegs = [content for pixels, content in members if pixels]
            decoded = iter(self._decoder.decode(jpegs) if jpegs else ())
            for pixels, content in members:
                image = next(decoded) if pixels else None
                yield self._by_pillow(content) if image is None else self._tensor(image)

    def resize(self, image: Tensor, height: int, width: int) -> np.ndarray:
        """Resize an image of `decode`, or a part of it, to uint8 `[height, width, 3]` on the host."""
        planes = image.permute(2, 0, 1)[None]
        across = _one_pass(planes, (planes.shape[2], width))
        return np.ascontiguousarray(_one_pass(across, (height, width))[0].permute(1, 2, 0).cpu().numpy())

    def _jpeg_pixels(self, content: bytes) -> int:
        """How many pixels a JPEG has that nvImageCodec may decode; 0: Pillow has to."""
        if not content.startswith(b"\xff\xd8\xff") or not content.rstrip(b"\0").endswith(b"\xff\xd9"):
            return 0
        try:
            stream = self._nvimgcodec.CodeStream(content)
            height, width = stream.height, stream.width
        except RuntimeError:  # a broken header
            return 0
        return height * width if min(height, width) >= MIN_SIDE and height * width <= MAX_PIXELS else 0

    def _by_pillow(self, content: bytes) -> Tensor | UnreadableImage:
        import torch

        try:
            image = load_rgb(content)
        except UnreadableImage as problem:
            return problem
        self.by_pillow += 1
        return torch.from_numpy(np.array(image)).to(self.device)

    def _tensor(self, image: Any) -> Tensor:
        import torch

        # The codec's memory is read through __cuda_array_interface__ or __array_interface__, which it has to outlive.
        if self.device == "cuda":
            return torch.as_tensor(image.cuda(), device="cuda").clone()
        return torch.from_numpy(np.array(image))


def _one_pass(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 `[1, 3, h, w]` in one direction, by Pillow's bicubic filter (a = -0.5) and its rounding."""
    import torch
    from torch.nn.functional import interpolate

    if planes.shape[2:] == size:
        return planes
    values = interpolate(planes.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
    return (values + 0.5).floor_().clamp_(0, 255).to(torch.uint8)
