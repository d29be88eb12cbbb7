"""Images in an object store or on a web server, listed and read by fsspec; nothing is kept on this machine."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.gallery.archives import images_of, is_archive
from mgn_deploy.gallery.sources import MOST_FILE_BYTES, Source, file_bytes
from mgn_deploy.images.formats import skipped_sentence, why_no_image
from mgn_deploy.images.listing import ImageFile
from mgn_deploy.images.prefetch import in_order
from mgn_deploy.packages import require

# What fsspec needs besides for a URL that begins so.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "memory": "fsspec"}
TRIES = 3
FIRST_WAIT_SECONDS = 0.5  # before the second try; twice as long before each further one
TIMEOUT_SECONDS = 120.0  # of one object on a web server
OPEN_ARCHIVES = 4
BLOCKS, BLOCK_BYTES = 4, 4 * 2**20  # that are kept of each of them
_NO_PARTS = "the server gives no parts of a file (Range), by which an archive is read: download it"
_GONE = "no such object"
T = TypeVar("T")
_TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
_log = logging.getLogger("mgn_deploy")


def is_remote(place: str) -> bool:
    """Whether what `embed` is given is a URL."""
    return re.match(r"[a-z][a-z0-9+.-]*://", place, re.IGNORECASE) is not None


def scheme_of(place: str) -> str:
    """The scheme of a URL that a store may keep, in lower case; of a path "".

    Raises:
        UserError: it is broken, or has a password or a query.
    """
    shown = repr(place.partition("?")[0].rpartition("@")[2])
    try:
        parts = urlsplit(place)
        if "\0" in place or "%00" in place:
            raise ValueError("it has a NUL character")
    except ValueError as error:
        raise UserError(f"{shown} is no URL: {error}") from None
    if "@" in parts.netloc or (parts.scheme[:4] == "http" and "?" in place):
        raise UserError(
            f"{shown}: a URL with a password or a query would be kept in the store; give a plain one and credentials "
            "as fsspec takes them, by its configuration or the environment"
        )
    return parts.scheme


def remote_source(places: Sequence[str], root: str | None = None) -> Source:
    """The images below URLs: folders, searched recursively; single objects; patterns (`s3://bucket/cam1/*.jpg`); tar
    shards (`s3://bucket/{000..009}.tar`), whose headers are read here and whose members when they are embedded.

    Listed objects are images by their extension alone; a single one is taken as it is. Size and time of change are
    what the server tells: where it tells neither, only `--verify-content` sees a change. A web server's folder is what
    its index page links to. Of several URLs one that names no object is a file with its `problem`.

    Args:
        places: s3://, gs://, http://, https:// or memory:// URLs, all of one scheme.
        root: the URL that names begin at; by default the folder, or the one that all objects are in.

    Raises:
        UserError: fsspec or what it needs for the scheme is missing, a URL holds a secret or names nothing, or the
            server cannot be asked.
    """
    system = _file_system(places)
    objects: dict[str, Mapping[str, Any]] = {}
    skipped = Counter[str]()
    for place in places:
        objects.update(_listed(system, place, skipped, len(places) > 1))
    sentence = skipped_sentence(skipped)
    if not objects:
        raise UserError(f"{places[0]!r} holds no image" + (f": {sentence}" if sentence else ""))
    if sentence:
        _log.warning(f"{places[0]}: {sentence}")
    places = [_url(system, place) for place in places]
    base = _url(system, root) if root else places[0] if len(places) == 1 else ""
    if not root and (not base or any(not url.startswith(base + "/") for url in objects)):
        base = _common(objects)
    outside = next((url for url in objects if not url.startswith(base + "/")), None)
    if outside:
        raise UserError(f"{outside!r} is not below {base!r}: give --root, the URL that all images are below")
    urls = sorted(objects, key=str.encode)
    files = []
    for some, others in in_order(lambda url: _files(system, url, url[len(base) + 1 :], objects[url]), urls):
        files.extend(some)
        skipped.update(others)
    return Source(base, f"{len(files)} images below {base!r}", files, skipped, complete=base in places)


def object_bytes(base: str, name: str) -> bytes:
    """The content of an image of an earlier `remote_source`, by its name below the source's URL.

    Raises:
        UnreadableImage: it is gone or cannot be read.
        UserError: the server's packages are missing, or the name leads out of the source.
    """
    if ".." in name.split("/"):
        raise UserError(f"{name!r} leads out of {base}: it is not opened")
    system = _file_system([base])
    parts = name.split("/")
    cut = next((number for number, part in enumerate(parts, 1) if is_archive(part) and number < len(parts)), None)
    if cut is None:
        return _read(system, f"{base}/{name}")
    archive = "/".join(parts[:cut])
    url = f"{base}/{archive}"
    member = _members(system, url, archive, *_known(system, url, {})).get(name)
    if member is None:
        raise UnreadableImage("no such member of the archive")
    return file_bytes(member)


@lru_cache(maxsize=16)
def _members(system: Any, url: str, name: str, *known: Any) -> dict[str, ImageFile]:
    """An archive's images by their names, until its size or time changes: finding one reads all headers."""
    return {file.name: file for file in _archive_files(system, url, name, known, Counter())}


def _file_system(places: Sequence[str]) -> Any:
    scheme, *others = map(scheme_of, places)
    if any(other != scheme for other in others):
        raise UserError("the URLs that are given differ in their scheme: embed each by itself, into a store of its own")
    if scheme not in PACKAGES:
        raise UserError(f"{scheme}:// is not read: give {', '.join(f'{name}://' for name in PACKAGES)}, or paths")
    require("fsspec", "remote", f"{scheme}:// is read by fsspec")
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it also raises, with tracebacks
    try:
        options = {}
        if PACKAGES[scheme] == "aiohttp":
            import aiohttp

            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)}}
        system = fsspec.filesystem(scheme, **options)
    except ImportError:
        package = PACKAGES[scheme]
        raise UserError(
            f"fsspec reads {scheme}:// with {package}, which is not installed (pip install {package})"
        ) from None
    system.invalidate_cache()
    return system


def _listed(system: Any, place: str, skipped: Counter[str], several: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The images that a URL names, each by its own URL, with what the server tells of it."""
    # A web server's `?` begins a query, which `scheme_of` refuses.
    pattern = any(sign in place for sign in "*?[")
    try:
        if pattern:
            found = system.glob(place, detail=True)
        else:
            info = {} if place.endswith("/") else system.info(place)
            # A web server calls a folder's index page a file.
            if info and info.get("type") != "directory" and info.get("mimetype") != "text/html":
                yield _url(system, place), info
                return
            found = system.find(place, detail=True)
            if not found:
                system.info(place)  # raises where there is no such folder or no such server
    except Exception as error:  # each of fsspec's file systems raises its own kinds
        missing = _is_gone(error)
        if missing and several:
            yield _url(system, place), {"problem": _GONE}
            return
        what = _GONE if missing else _sentence(error)
        raise UserError(f"{place!r} cannot be listed: {what}") from None
    for name, info in found.items():
        url = _url(system, name)
        if info.get("type") == "directory":
            continue
        if "?" in url or "/../" in url:  # a web server's index page has links that sort it, and one to its parent
            skipped["links of the index page"] += 1
            continue
        archive = pattern and is_archive(url)  # as of a folder's archives on this machine: they are asked for
        reason = None if archive else why_no_image(url.rpartition("/")[2], bytes)
        if reason is None:
            yield url, info
        else:
            skipped[reason] += 1


def _files(system: Any, url: str, name: str, info: Mapping[str, Any]) -> tuple[list[ImageFile], Counter[str]]:
    """An object as an image, or the images of an archive and what it has besides."""
    skipped = Counter[str]()
    known = size, mtime, problem = _known(system, url, info)
    if problem is None and is_archive(url):
        return _archive_files(system, url, name, known, skipped), skipped
    return [ImageFile(None, name, size, mtime, problem, partial(_read, system, url))], skipped


def _archive_files(system: Any, url: str, name: str, known: Any, skipped: Counter[str]) -> list[ImageFile]:
    def listed() -> list[ImageFile]:
        file, lock = _opened(system, url, known)
        skipped.clear()  # of a try that failed
        try:
            with lock:
                return images_of(file, url, name, partial(_read_range, system, url, known), skipped)
        except ValueError:  # fsspec's, where the server sends the whole file when it is asked for a part
            raise UnreadableImage(_NO_PARTS) from None

    try:
        return _tried(listed)
    except UnreadableImage as problem:
        return [ImageFile(None, name, problem=str(problem))]


@lru_cache(maxsize=OPEN_ARCHIVES)
def _opened(system: Any, url: str, known: Any) -> tuple[Any, threading.Lock]:
    """An archive whose blocks that were read last are kept, as members follow each other, and a lock to seek in it."""
    # `known`, its size and time of change, opens it anew when it has changed.
    options = {"cache_type": "blockcache", "cache_options": {"maxblocks": BLOCKS}, "block_size": BLOCK_BYTES}
    file = system.open(url, "rb", **options)
    if not file.seekable():
        raise UnreadableImage(_NO_PARTS)
    return file, threading.Lock()


def _read_range(system: Any, url: str, known: Any, offset: int, size: int) -> bytes:
    """A member of an archive."""

    def content() -> bytes:
        file, lock = _opened(system, url, known)
        with lock:
            file.seek(offset)
            return file.read(size)

    found = _tried(content)
    if len(found) < size:
        raise UnreadableImage("the archive ends within it")
    return found


def _known(system: Any, url: str, info: Mapping[str, Any]) -> tuple[int | None, int | None, str | None]:
    """The size and time of change in ns of an object, as far as the server tells, and why it is none."""
    if info.get("problem"):
        return None, None, info["problem"]
    if info.get("size") is None:  # a web server's index page tells names alone
        try:
            info = system.info(url)
        except Exception as error:  # unless it is gone, reading it is tried again, and says what is wrong
            return None, None, _GONE if _is_gone(error) else None
    size = info.get("size")
    large = size is not None and size > MOST_FILE_BYTES and not is_archive(url)
    problem = f"larger than {MOST_FILE_BYTES >> 20} MiB, which no image of 64 megapixels is" if large else None
    return size, next((_nanoseconds(info[key]) for key in _TIMES if info.get(key)), None), problem


def _nanoseconds(time: Any) -> int | None:
    """A time as one of fsspec's file systems gives it, in ns since 1970, to a microsecond."""
    try:
        if isinstance(time, str):
            iso = re.match(r"\d{4}-", time)
            time = datetime.fromisoformat(time.replace("Z", "+00:00")) if iso else parsedate_to_datetime(time)
        seconds = time.timestamp() if isinstance(time, datetime) else float(time)
        return round(seconds * 1e6) * 1000
    except (TypeError, ValueError, OverflowError):
        return None


def _read(system: Any, url: str) -> bytes:
    return _tried(partial(system.cat_file, url))


def _tried(function: Callable[[], T]) -> T:
    """What a function that asks a server gives, within `TRIES`; raises UnreadableImage."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            return function()
        except (UnreadableImage, UserError):
            raise
        except PermissionError:
            raise UnreadableImage("Permission denied") from None
        except Exception as error:  # each of fsspec's file systems raises its own kinds
            if _is_gone(error):
                raise UnreadableImage(_GONE) from None
            reason = _sentence(error)
    raise UnreadableImage(f"not read in {TRIES} tries: {reason}")


def _url(system: Any, name: str) -> str:
    """The one way to write an object's URL, of what its file system or a user calls it."""
    if isinstance(system.protocol, tuple) and "http" in system.protocol:
        return name.rstrip("/")
    protocol = system.protocol if isinstance(system.protocol, str) else system.protocol[0]
    return f"{protocol}://{system._strip_protocol(name).strip('/')}"


def _common(urls: Mapping[str, Any]) -> str:
    """The deepest folder that all URLs are below; at least the bucket or the server."""
    from fsspec.utils import common_prefix

    folder: str = common_prefix(url.rpartition("/")[0] for url in urls)
    if folder.count("/") < 2:
        raise UserError("the URLs that are given are of different buckets or servers: embed each by itself")
    return folder


def _is_gone(error: Exception) -> bool:
    """Whether an object is not there, and not merely its server."""
    cause = _of_web(error)
    return isinstance(error, FileNotFoundError) and (cause is error or getattr(cause, "status", None) in (404, 410))


def _of_web(error: BaseException) -> BaseException:
    """What went wrong: of web servers fsspec always says that a file is not found, and keeps the cause."""
    cause = error.__cause__
    return cause if cause is not None and type(cause).__module__.startswith("aiohttp") else error


def _sentence(error: Exception) -> str:
    cause = _of_web(error)
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
