"""Models that a server runs: `mgn-deploy serve` over HTTP, or Triton over gRPC. They are no engines of this machine.

Crops are decoded and resized here and sent as pixels, so a served model gets what a local one gets.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from mgn_deploy.backends.base import Backend
from mgn_deploy.choices import API_KEY
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.images.prefetch import in_order
from mgn_deploy.machine import Hardware
from mgn_deploy.packages import require

AHEAD = 3  # calls begun before their result is asked for: the server's queue is never empty
PATIENCE_SECONDS = 300.0  # how long a server may be away or full before a run gives up
TIMEOUT_SECONDS = 120.0  # of one call
NPY = "application/x-npy"
_ANOTHER = "has begun to serve another bundle: start again with a new store"
_HINTS = {
    "StatusCode.INTERNAL": "Triton's log says more",
    "StatusCode.INVALID_ARGUMENT": "Triton's log says more",
    "StatusCode.RESOURCE_EXHAUSTED": "give a smaller --batch, or let the server take larger messages",
}


class ServedModel(NamedTuple):
    """What a server says of its model.

    Attributes:
        bundle_id: of the bundle that it runs.
        preprocessing: the pixel path that its bundle was proven with.
        height, width: of its crops, in pixels.
        dim: of an embedding.
        batch: most crops a call.
    """

    bundle_id: str
    preprocessing: str
    height: int
    width: int
    dim: int
    batch: int


class RemoteBackend(Backend):
    """A served model. Several calls are on their way at once.

    Attributes:
        model: what it is.
        name: the server's engine, as a store records it.
    """

    model: ServedModel

    @classmethod
    def missing(cls) -> str | None:
        return None

    @classmethod
    def open_graph(cls, graph: bytes, config: ModelConfig, *, fused_heads: bool = False) -> Backend:
        raise CannotRun("a server runs the graph that it was started with")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        parts = [
            self._call(images[start : start + self.model.batch]) for start in range(0, len(images), self.model.batch)
        ]
        return np.concatenate(parts)

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        return in_order(self, batches, ahead=AHEAD)

    @property
    def device(self) -> str:
        return self.hardware.cpu

    @abstractmethod
    def _call(self, images: np.ndarray) -> np.ndarray:
        """Embed at most `model.batch` crops; threads call it at once."""

    def _checked(self, rows: np.ndarray, images: np.ndarray) -> np.ndarray:
        if rows.shape != (len(images), self.model.dim) or rows.dtype != np.float32 or not np.isfinite(rows).all():
            raise UserError(f"the server answered {len(images)} crops with {rows.dtype} {list(rows.shape)}")
        return rows


class HttpBackend(RemoteBackend):
    """`mgn-deploy serve` at `http://HOST:PORT`. The API key is that of MGN_DEPLOY_API_KEY.

    A server that is full or away is asked again until `patience` seconds have gone.

    Raises:
        UserError: nobody answers there, or something else than this service.
    """

    def __init__(self, url: str, *, patience: float = PATIENCE_SECONDS) -> None:
        self._url, self._address = url, urlsplit(url)
        self._connections = threading.local()
        self._patience = patience
        try:
            about = json.loads(self._ask("GET", "/about", patience=0)[0])
            self.model = ServedModel(
                about["bundle_id"], about["preprocessing"], about["height"], about["width"], about["dim"],
                min(about["max_images"], max(1, about["max_body_bytes"] // (about["height"] * about["width"] * 3) - 1)),
            )  # fmt: skip
            self.name = about["backend"]  # type: ignore[misc]  # known once it is connected
            self.version = about["backend_version"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{url} is no service of mgn-deploy: `mgn-deploy serve` starts one") from None
        self.hardware = Hardware(
            cpu=f"{about['device']} of {self._address.netloc}", architecture="", instruction_sets=()
        )

    def _call(self, images: np.ndarray) -> np.ndarray:
        content, headers = self._ask("POST", "/embed", npy(images), patience=self._patience)
        if headers.get("mgn-bundle-id") != self.model.bundle_id:
            raise UserError(f"{self._url} {_ANOTHER}")
        return self._checked(np.load(io.BytesIO(content), allow_pickle=False), images)

    def _ask(self, method: str, path: str, body: bytes | None = None, *, patience: float) -> tuple[bytes, Any]:
        give_up = time.monotonic() + patience
        while True:
            try:
                status, content, headers = self._once(method, path, body)
                problem, wait = f"{self._url} is full", float(headers.get("retry-after") or 1)
            except (OSError, http.client.HTTPException) as error:
                self._connections.open = None
                status, problem, wait = 503, f"{self._url} does not answer ({error})", 1.0
            if status == 200:
                return content, headers
            if status != 503:
                raise UserError(f"{self._url} refuses ({status}): {_sentence(content)}")
            if time.monotonic() + wait > give_up:
                raise UserError(f"{problem}: start `mgn-deploy serve` there, or wait and run the same command again")
            time.sleep(wait)

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes, Any]:
        connection = getattr(self._connections, "open", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
            connection = self._connections.open = kind(self._address.netloc, timeout=TIMEOUT_SECONDS)
        headers = {"content-type": NPY} if body is not None else {}
        if os.environ.get(API_KEY):
            headers["authorization"] = f"Bearer {os.environ[API_KEY]}"
        connection.request(method, self._address.path.rstrip("/") + path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers


class TritonBackend(RemoteBackend):
    """Triton Inference Server at `grpc://HOST:PORT` or `grpc://HOST:PORT/MODEL`, with a model that
    `export --triton` wrote.

    Raises:
        CannotRun: Triton's client is not installed.
        UserError: nobody answers there, it has no such model, or not one that names its bundle.
    """

    def __init__(self, url: str) -> None:
        require("tritonclient.grpc", "triton", "embedding by Triton needs its client")
        import tritonclient.grpc as triton

        self._triton, self._url, address = triton, url, urlsplit(url)
        self._model = address.path.strip("/") or "mgn"
        self._client = triton.InferenceServerClient(address.netloc)
        try:
            config = self._config()
            self.version = self._client.get_server_metadata(client_timeout=TIMEOUT_SECONDS).version
        except triton.InferenceServerException as error:
            raise UserError(
                f"{url}: {error.message()}: start Triton there with a repository of `export --triton`"
            ) from None
        parameters = {name: value.string_value for name, value in config.parameters.items()}
        try:
            height, width, _ = config.input[0].dims
            (dim,) = config.output[0].dims
            self.model = ServedModel(
                parameters["bundle_id"], parameters["preprocessing"], height, width, dim, max(1, config.max_batch_size)
            )
        except (KeyError, IndexError, ValueError):
            raise UserError(
                f"{url}: the model {self._model!r} does not say which bundle it is: write it again by `export --triton`"
            ) from None
        if (config.input[0].name, config.output[0].name) != ("images", "embeddings"):
            raise UserError(
                f"{url}: the model {self._model!r} takes {config.input[0].name!r} and gives {config.output[0].name!r}, "
                "not 'images' and 'embeddings': write it again by `export --triton`"
            )
        self.name = f"triton-{config.backend}"  # type: ignore[misc]
        self.hardware = Hardware(cpu=f"Triton at {address.netloc}", architecture="", instruction_sets=())

    def _config(self) -> Any:
        return self._client.get_model_config(self._model, client_timeout=TIMEOUT_SECONDS).config

    def _call(self, images: np.ndarray) -> np.ndarray:
        given = self._triton.InferInput("images", list(images.shape), "UINT8")
        given.set_data_from_numpy(np.ascontiguousarray(images))
        try:
            answer = self._client.infer(self._model, [given], client_timeout=TIMEOUT_SECONDS)
            bundle_id = self._config().parameters["bundle_id"].string_value  # an answer does not say who made it
        except self._triton.InferenceServerException as error:
            # What the model itself raised comes again; a server that went away may come back.
            hint = _HINTS.get(error.status(), "run the same command again once it answers")
            raise UserError(f"{self._url}: {error.message()}: {hint}") from None
        if bundle_id != self.model.bundle_id:
            raise UserError(f"{self._url} {_ANOTHER}")
        return self._checked(answer.as_numpy("embeddings"), images)


def open_server(url: str) -> RemoteBackend:
    """The model of a server: `http://`, `https://` (`mgn-deploy serve`) or `grpc://` (Triton).

    Raises:
        UserError: another kind of address, nobody answers there, or its pixels are made in another way than here.
        CannotRun: Triton's client is not installed.
    """
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    if scheme not in ("http", "https", "grpc") or not host:
        raise UserError(f"{url!r} is no server: give http://HOST:PORT (mgn-deploy serve) or grpc://HOST:PORT (Triton)")
    backend = TritonBackend(url) if scheme == "grpc" else HttpBackend(url)
    if backend.model.preprocessing != PREPROCESSING:
        raise UserError(
            f"{url} runs a release that makes pixels by {backend.model.preprocessing}, and this one makes them by "
            f"{PREPROCESSING}: use one release on both sides"
        )
    return backend


def npy(array: np.ndarray) -> bytes:
    """The bytes of a `.npy` file, as requests and answers of type `NPY` have them."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _sentence(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode("utf-8", "replace")
