"""What `embed` is asked to embed: a folder, files, patterns, URLs, a list or boxes, as one source."""

from __future__ import annotations

import codecs
import glob
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mgn_deploy.datasets.labels import table_labels
from mgn_deploy.datasets.tables import PARQUET_MAGIC, TableRow, columns_of, decode_text, parse_table, read_content
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.archives import is_archive
from mgn_deploy.gallery.boxed import boxed_source
from mgn_deploy.gallery.boxes import PERSON, read_boxes
from mgn_deploy.gallery.manifest import folder_uri
from mgn_deploy.gallery.remote import is_remote, remote_source
from mgn_deploy.gallery.shards import SHARD_ROWS
from mgn_deploy.gallery.sources import Source, common_folder, files_source, name_below
from mgn_deploy.gallery.video import video_source
from mgn_deploy.images.formats import skipped_sentence, why_not_listed
from mgn_deploy.images.listing import image_paths, list_images

LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv", ".parquet")
STDIN = "-"
_VIDEOS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
_GLOB = frozenset("*?[")
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}", re.ASCII)
MOST_NUMBERED = 100_000
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
FOLDER = "folder of a pattern (give it by its name)"

_log = logging.getLogger("mgn_deploy")


def open_inputs(
    places: Sequence[str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] | None = None,
    boxes: str | os.PathLike[str] | None = None,
    classes: Sequence[str] = (PERSON,),
    min_score: float = 0.0,
    video: str | os.PathLike[str] | None = None,
    part: str | None = None,
) -> Source:
    """The images, or boxes in images, that are to be embedded.

    Args:
        places, root: as of `open_source`.
        boxes: a detector's or tracker's file, or a YOLO folder, as `read_boxes` takes it: a row for each box.
        classes, min_score: which boxes are taken, as of `read_boxes`.
        video: one whose boxes are embedded, in place of images.
        part: like 3/16, as of `part_of`.

    Raises:
        UserError: what these functions refuse, or nothing is given.
    """
    taken = None if boxes is None else read_boxes(boxes, classes=classes, min_score=min_score)
    if video is not None:
        if places:
            raise UserError(f"--video {video} is given beside images: embed one after the other into the same store")
        if taken is None:
            raise UserError(f"--video {video}: give a tracker's or detector's boxes in it by --boxes")
        source = video_source(video, taken, root)
    elif places:
        source = open_source(*places, root=root)
        source = source if taken is None else boxed_source(source, taken)
    else:
        raise UserError("no image is given: name a folder, images, a list, or --video and --boxes")
    return source if part is None else part_of(source, part)


def open_source(*places: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Source:
    """The images of a folder (searched recursively), of files and patterns (`cam1/*.jpg`) together, or of a list.

    Args:
        places: one folder; or files, tar archives, folders and patterns; or a list, as `list_source` takes it; or
            URLs, as `remote.remote_source` takes them. `x-{000..009}.tar` stands for ten names.
        root: what the names of several places are below; by default the folder that all are in. Of a list what its
            relative paths are below.

    Raises:
        UserError: one of them is missing or no image, or lies outside `root`.
    """
    paths = [path for place in places for path in _numbered(os.fspath(place))]
    remote = [path for path in paths if is_remote(path)]
    if remote:
        if len(remote) < len(paths):
            raise UserError(
                f"{remote[0]!r} is given beside paths of this machine: embed them into a store of their own"
            )
        return remote_source(remote, None if root is None else os.fspath(root))
    if root is not None and is_remote(os.fspath(root)):
        raise UserError(f"--root {root} is a URL, and {paths[0]!r} is of this machine: give URLs to `embed` themselves")
    lists = [path for path in paths if is_list(path)]
    if lists and len(paths) > 1:
        raise UserError(f"{lists[0]!r} is a list of images and is given among others: give it alone")
    if lists:
        return list_source(lists[0], root)
    if len(paths) == 1 and root is None and os.path.isdir(paths[0]):
        folder = Path(paths[0])
        listing = list_images(folder)
        return Source(folder_uri(folder), repr(str(folder)), listing.files, listing.skipped)
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    for path in paths:
        found.extend(_files_of(path, skipped))
    return files_source(found, root, skipped)


def part_of(source: Source, part: str) -> Source:
    """One part of a source, for many machines: `3/16` is every sixteenth block of a whole shard's images.

    Blocks, so that the joined parts have the shards that one run over the source writes.

    Raises:
        UserError: the part is not like 3/16.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", part)
    if not match or int(match[1]) > int(match[2]):
        raise UserError(f"--shard {part}: give the part's number and their count, as in 3/16")
    number, count = int(match[1]) - 1, int(match[2])
    files = [file for index, file in enumerate(source.files) if index // SHARD_ROWS % count == number]
    whole = [file.name for file in source.files]
    if whole and not files:
        _log.warning(
            f"part {part} of {source.title} has no image: parts are of whole shards of {SHARD_ROWS:,}, and there are "
            f"{len(whole):,} images"
        )
    return replace(source, files=files, title=f"part {part} of {source.title}", whole=whole, complete=False)


def is_list(place: str) -> bool:
    """Whether `embed` takes a path as a list of images: stdin, or a file that is named as one."""
    return place == STDIN or (place.lower().endswith(LIST_SUFFIXES) and not os.path.isdir(place))


def list_source(place: str, root: str | os.PathLike[str] | None = None) -> Source:
    """The images that a list names; one that is missing has its `problem`, and one that is named twice counts once.

    Args:
        place: a text file with a path a line, or with NULs between the paths, as of `find -print0`; a CSV, TSV or
            Parquet table with a column path, and perhaps identity and camera, which become the source's labels; `-`:
            one of these from stdin.
        root: what relative paths are below; by default the list's folder, of stdin the current one. Names are below it,
            or, without it and with absolute paths elsewhere, below the folder that holds all images.

    Raises:
        UserError: the list cannot be read, is no UTF-8, lacks a column or names nothing, or a path is outside `root`.
    """
    title = "stdin" if place == STDIN else place
    content = sys.stdin.buffer.read() if place == STDIN else read_content(place)
    table: list[TableRow] = []
    is_table = content.startswith(PARQUET_MAGIC) or place.lower().endswith((".csv", ".tsv", ".parquet"))
    if b"\0" in content and not is_table and not content.startswith(_UTF_16):
        names = [os.fsdecode(name) for name in content.split(b"\0") if name.strip()]  # whatever bytes a name has
    elif is_table or "path" in columns_of(decode_text(content, title).partition("\n")[0]):
        table = parse_table(content, title)
        names = [row.path for row in table]
    else:
        names = [line.removesuffix("\r") for line in decode_text(content, title).split("\n") if line.strip()]
    _check(names, title)
    base = os.path.abspath(root if root else os.path.curdir if place == STDIN else os.path.dirname(place))
    paths = [os.path.abspath(os.path.join(base, name)) for name in names]
    if not root and any(name_below(path, base) is None for path in paths):
        base = common_folder(paths)
    skipped = Counter[str]()
    twice = len(paths) - len(set(paths))
    if twice:
        _log.warning(f"{title} names {twice} images again that it named before: each counts once")
        skipped["named twice"] = twice
    source = replace(files_source(paths, base, skipped), title=f"list {title!r}")
    if table and "identity" in table[0].cells:
        named = [
            row._replace(cells={**row.cells, "path": name_below(path, base) or ""})
            for row, path in zip(table, paths, strict=True)
        ]
        source.labels = table_labels(title, named)
        _log.info(f"{title} gives the labels, of its column identity (`embed --labels` takes others)")
    return source


def _numbered(place: str) -> list[str]:
    """The names that `shard-{000..009}.tar` stands for, as WebDataset writes it; another name alone."""
    match = _NUMBERS.search(place)
    if not match or os.path.lexists(place):
        return [place]
    first, last = sorted(match.groups(), key=int)
    if int(last) - int(first) >= MOST_NUMBERED:
        raise UserError(f"{place!r} stands for more than {MOST_NUMBERED:,} names")
    names = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [path for name in names for path in _numbered(place[: match.start()] + name + place[match.end() :])]


def _files_of(path: str, skipped: Counter[str]) -> Iterator[Path]:
    if os.path.isdir(path):
        yield from image_paths([path], skipped)
    elif os.path.lexists(path):
        if path.lower().endswith(_VIDEOS):
            raise UserError(f"{path!r} is a video: give it by --video, with a tracker's or detector's boxes by --boxes")
        yield Path(path)
    elif _GLOB & set(path):
        matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
        if not matches:
            raise UserError(f"no file matches {path!r}: check the pattern and the folder that it starts from")
        files = [match for match in matches if not os.path.isdir(match)]
        # `**` names folders besides what is in them; those of another pattern would be left out without a word.
        holding = {Path(folder) for folder in set(map(os.path.dirname, files))}
        holding |= {above for folder in holding for above in folder.parents}
        left_out = Counter([FOLDER] * len(set(map(Path, matches)) - set(map(Path, files)) - holding))
        for match in files:
            reason = None if is_archive(match) else why_not_listed(match, os.path.basename(match))
            if reason is None:
                yield Path(match)
            else:
                left_out[reason] += 1
        if left_out:
            _log.warning(f"{path}: {skipped_sentence(left_out)}")
        skipped.update(left_out)
    else:
        raise UserError(
            f"{path!r} does not exist: give a folder of images, image files, or a pattern such as 'a/*.jpg'"
        )


def _check(names: Sequence[str], title: str) -> None:
    if not names:
        raise UserError(f"{title} names no image: write a path a line, or a table with a column path")
    remote = next((name for name in names if "://" in name), None)
    if remote:
        raise UserError(
            f"{title} names {remote!r}: a list holds paths of this machine; give URLs themselves to `embed`"
        )
    nul = next((name for name in names if "\0" in name), None)
    if nul:
        raise UserError(f"{title}: {nul!r} has a NUL character, which no path has")
