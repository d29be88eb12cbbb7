"""A connection to Milvus: a local database (milvus-lite) or a server, and which of its failures are tried again."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mgn_deploy.errors import UserError
from mgn_deploy.packages import require

_log = logging.getLogger("mgn_deploy")
T = TypeVar("T")
CONNECT_SECONDS = 5.0
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before a call that failed is tried again: a restarted server is back


def is_milvus(target: str) -> bool:
    """Whether `-o` or `--index` names a Milvus database: `file.db` or `http://host:19530`."""
    return target.endswith(".db") or target.startswith(("http://", "https://"))


@contextmanager
def connected(target: str, *, create: bool = False) -> Iterator[Any]:
    """Connect to a database: a `pymilvus.MilvusClient`.

    Args:
        target: `file.db` or `http://host:19530`, with `#collection` where it is not the default one; a server's token
            (`user:password`, or a key) is taken from the environment's MILVUS_TOKEN.
        create: make a local database that is not there.

    Raises:
        UserError: it cannot be reached, is no database, or the URL holds a password.
        CannotRun: pymilvus is not installed.
    """
    local = not target.startswith(("http://", "https://"))
    for package in ("pymilvus", "milvus_lite") if local else ("pymilvus",):
        require(package, "milvus", f"{target} is an index in Milvus")
    from pymilvus import MilvusClient, MilvusException

    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs what it also raises, with tracebacks
    if local:
        _check_local(Path(target), create)
    token = "" if local else os.environ.get("MILVUS_TOKEN", "")
    try:
        if not local and urlsplit(target).username is not None:
            raise UserError("a Milvus URL with a password is shown wherever it is used: set MILVUS_TOKEN=USER:PASSWORD")
        client = MilvusClient(target.partition("#")[0] if not local else target, token=token, timeout=CONNECT_SECONDS)
    except (MilvusException, OSError, ValueError) as error:
        raise UserError(f"Milvus cannot be reached at {target}: {_reason(error)}") from None
    try:
        yield client
    finally:
        client.close()


def _check_local(database: Path, create: bool) -> None:
    """Raise UserError for what milvus-lite would fail on, or write into: its database is a folder with a LOCK."""
    if database.exists() and not (database / "LOCK").is_file():
        raise UserError(f"{database} exists and is no Milvus database: choose another path")
    if not database.exists() and not create:
        raise UserError(f"{database} is not there: `mgn-deploy index build STORE -o {database}` makes an index")
    if not database.parent.is_dir():
        raise UserError(f"{database} cannot be written: {database.parent} is no folder")


def retried(call: Callable[[], T], target: str) -> T:
    """Call Milvus, again after a pause where what failed may pass: every call that is made here may be repeated.

    Raises:
        UserError: it refused, or failed each time.
    """
    import grpc
    from pymilvus import MilvusException

    for pause in (*PAUSES, None):
        try:
            return call()
        except (MilvusException, grpc.RpcError) as error:
            if not _may_pass(error):
                raise UserError(f"Milvus at {target} refuses: {_reason(error)}") from None
            if pause is None:
                raise UserError(
                    f"Milvus at {target} failed {len(PAUSES) + 1} times ({_reason(error)}): run the same command "
                    "again, which goes on"
                ) from None
            _log.warning(f"Milvus at {target} failed ({_reason(error)}): trying again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _may_pass(error: Any) -> bool:
    """Whether the server calls it so, is away or overloaded, or the connection broke."""
    from grpc import StatusCode
    from pymilvus.exceptions import ErrorCode

    # An RpcError's code is a method; where pymilvus gave up trying, the code of its own exception is the RpcError's.
    code = error.code() if callable(error.code) else error.code
    passing = (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.ABORTED, StatusCode.INTERNAL)
    return getattr(error, "retriable", False) or code in (*passing, ErrorCode.RATE_LIMIT)


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "message", "") or error).split())[:300]
