"""Images in, embeddings out, in one call.

>>> from mgn_deploy import Embedder
>>> Embedder.open("bundle/").embed(["a.jpg", "b.jpg"]).shape     # doctest: +SKIP
(2, 2048)
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from PIL import Image

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.opening import open_backend
from mgn_deploy.backends.remote import ServedModel, open_server
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.choices import MAX_BATCH
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun, UnreadableImage, UserError
from mgn_deploy.files import is_utf8
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.prefetch import batched, in_order
from mgn_deploy.progress import Progress

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


class Embedder:
    """A model opened by one backend. Not for use by several threads at once.

    Attributes:
        backend: the opened engine; its `name`, `version` and `device` say which.
        height, width: of the crops that the network sees, in pixels.
        dim: of an embedding.
    """

    def __init__(self, backend: Backend, config: ModelConfig | ServedModel, bundle: Bundle | None = None) -> None:
        self.backend = backend
        self.height, self.width, self.dim = config.height, config.width, config.dim
        self._bundle = bundle
        self._served_id = config.bundle_id if isinstance(config, ServedModel) else None

    def __repr__(self) -> str:
        model = self._bundle or f"{self.height}x{self.width} crops"
        return f"Embedder({model!s}, by {self.backend.name} {self.backend.version} on {self.backend.device})"

    @classmethod
    def open(
        cls, bundle: Bundle | str | os.PathLike[str], backend: str = "auto", *, allow_unproven: bool = False
    ) -> Embedder:
        """Open a bundle with the named backend or, by default, the fastest that is proven.

        Args:
            bundle: its folder, or one that is open.
            backend: an engine's name, or auto.
            allow_unproven: open an engine whose embeddings were not compared with the PyTorch reference's, too.

        Raises:
            UserError: no bundle there, or its files are not what was exported.
            CannotRun: the backend is not installed, or has no passed proof in the bundle.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        return cls(open_backend(opened, backend, allow_unproven=allow_unproven), opened.config, opened)

    @classmethod
    def connect(cls, server: str, bundle: Bundle | str | os.PathLike[str] | None = None) -> Embedder:
        """Open the model that a server runs: images are decoded here and embedded there.

        Args:
            server: `http://HOST:PORT` of `mgn-deploy serve`, or `grpc://HOST:PORT` of Triton.
            bundle: which the server must run; None: whichever it runs.

        Raises:
            UserError: nobody answers there, or it runs another bundle.
            CannotRun: Triton's client is not installed.
        """
        backend = open_server(server)
        wanted = None
        if bundle is not None:
            wanted = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
            if wanted.id != backend.model.bundle_id:
                raise UserError(
                    f"{server} runs bundle {backend.model.bundle_id[:12]} and {wanted.folder} is {wanted.id[:12]}: "
                    "their embeddings cannot be compared; serve that bundle"
                )
        return cls(backend, backend.model, wanted)

    @property
    def proof(self) -> str:
        """How far the engine that runs was found from PyTorch, in one line; of a server's engine the server tells."""
        if self._served_id:
            return "proven or not as its server says"
        return self._bundle.manifest.proof_in_words(self.backend.name) if self._bundle else "not proven"

    @property
    def bundle_id(self) -> str:
        """The id of the bundle that embeds, here or on a server.

        Raises:
            UserError: it was made of a backend alone.
        """
        return self._served_id or self.bundle.id

    @property
    def bundle_path(self) -> str | None:
        """Where the bundle lies on this machine; None where a server alone has it, or its path is no UTF-8, which a
        store's manifest is."""
        if self._bundle is None:
            return None
        path = os.path.abspath(self._bundle.folder)
        return path if is_utf8(path) else None

    @property
    def bundle(self) -> Bundle:
        """The bundle that it was opened from.

        Raises:
            UserError: it was made of a backend alone.
        """
        if self._bundle is None:
            raise UserError(
                "this embedder has no bundle, whose id a store records: open one with Embedder.open(bundle)"
            )
        return self._bundle

    @classmethod
    def open_reference(cls, bundle: Bundle | str | os.PathLike[str]) -> Embedder:
        """Open a bundle's PyTorch weights, to compare an engine with.

        Raises:
            UserError: no bundle there, or its files are not what was exported.
            CannotRun: PyTorch is not installed, or the bundle was exported without its weights.
        """
        try:
            return cls.open(bundle, "torch", allow_unproven=True)
        except CannotRun as error:
            raise CannotRun(f"{error}; or do without the comparison: --no-reference") from None

    def embed(
        self, images: Iterable[ImageLike] | np.ndarray, *, batch_size: int = 8, progress: Progress | None = None
    ) -> np.ndarray:
        """Embed images: unit rows, float32 `[n, dim]`, in the order of the images.

        Args:
            images: paths, PIL images or uint8 RGB arrays `[height, width, 3]` of any size; or one array
                `[n, height, width, 3]`.
            batch_size: images an engine call.
            progress: called after each batch with the images done and to do.

        Raises:
            UserError: an image cannot be read (the message names it), an array is not uint8 RGB, batch_size is below 1.
        """
        check_batch_size(batch_size)
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise UserError("embed takes a list of images: put the one in [ ]")
        sources = list(images)
        embeddings = np.empty((len(sources), self.dim), np.float32)
        done = 0
        batches = (
            np.stack(batch, out=self.backend.buffer(len(batch), self.height, self.width))
            for batch in batched(in_order(self._read, sources), batch_size)
        )
        for rows in self.backend.stream(batches):
            embeddings[done : done + len(rows)] = rows
            done += len(rows)
            if progress:
                progress("embedding", done, len(sources))
        return embeddings

    def _read(self, source: ImageLike) -> np.ndarray:
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
                raise UserError(
                    f"an image array must be uint8 RGB [height, width, 3], not {source.dtype} {list(source.shape)}"
                )
            source = Image.fromarray(source)
        elif not isinstance(source, (str, os.PathLike, Image.Image)):
            raise UserError(f"an image is a path, a PIL image or a uint8 array, not a {type(source).__name__}")
        try:
            return read_crop(source, self.height, self.width)
        except UnreadableImage as error:
            name = "an image" if isinstance(source, Image.Image) else repr(os.fspath(source))
            raise UserError(f"{name} cannot be embedded: {error}") from error


def check_batch_size(batch_size: int) -> None:
    """Raise UserError unless 1 to `MAX_BATCH` images go into an engine call."""
    if not 1 <= batch_size <= MAX_BATCH:
        raise UserError(f"batch_size must be at least 1 and at most {MAX_BATCH}, not {batch_size}")
