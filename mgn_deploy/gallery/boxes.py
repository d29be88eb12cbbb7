"""A detector's or tracker's boxes, by the formats that tools write; which one a file has is told by its content.

- MOTChallenge, det.txt or gt.txt (https://motchallenge.net/instructions): a line `frame, id, left, top, width, height,
  conf, ...`. Frames, ids and pixels are counted from 1 there, so that 1 is taken from left and top. A conf of 0 marks a
  box that is not to be considered. Where nine values are given, as in MOT16's gt.txt
  (https://arxiv.org/abs/1603.00831), the eighth is the class: 1, 2 and 7 are people.
- YOLO: a folder with a .txt for each photo, a line `class x y width height [score [track]]`, the centre and size of a
  box as fractions of the photo; class 0 is a person, unless a classes.txt beside them lists the names.
- COCO (https://cocodataset.org/#format-data): JSON with images and annotations, or a list of results, whose image_id is
  the photo's name without extension and whose category 1 is a person.
- CSV, TSV or Parquet with the columns path (of a video: frame), left, top, width and height, in pixels from 0; class,
  score and track may be there, too.

In all of them a negative track, as MOTChallenge's -1, is nobody's.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mgn_deploy.datasets.tables import PARQUET_MAGIC, columns_of, decode_text, parse_table, read_content
from mgn_deploy.errors import UserError

PERSON = "person"
ALL_CLASSES = "all"
_MOT_PEOPLE = ("1", "2", "7")  # pedestrian, person on vehicle, static person
_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True, slots=True)
class Box:
    """A box as its file has it.

    Attributes:
        photo: what the file calls its photo: a path, or one without extension; None where `frame` tells it.
        frame: the number of its frame, from 1.
        edges: left, top, width and height: pixels from 0, or fractions where `Boxes.relative`.
        track: the tracker's number of the person.
        kind: its class, as a name or a number.
        score: the detector's.
        number: which box of its photo or frame it is, from 1, whatever classes and scores are asked for.
    """

    photo: str | None
    frame: int | None
    edges: tuple[float, float, float, float]
    track: int | None = None
    kind: str | None = None
    score: float | None = None
    number: int = 0


@dataclass
class Boxes:
    """What a file of boxes holds.

    Attributes:
        title: the file.
        format: the format's name.
        boxes: those that are taken, in the file's order.
        skipped: those that are not, counted by reason.
        relative: whether edges are fractions of the photo's width and height.
    """

    title: str
    format: str
    boxes: list[Box]
    skipped: Counter[str] = field(default_factory=Counter)
    relative: bool = False


def read_boxes(path: str | os.PathLike[str], *, classes: Sequence[str] = (PERSON,), min_score: float = 0.0) -> Boxes:
    """The boxes of a file, or of a YOLO folder, in any of the formats above.

    Args:
        path: what a tool wrote.
        classes: names or numbers of what is taken, where the file tells classes; `all` for each.
        min_score: of boxes that have a score; 0: any, as some detectors' scores are negative.

    Raises:
        UserError: it cannot be read, has no such format, a line or entry of it is broken, or nothing is left of it.
    """
    path = Path(path)
    found = _yolo(path, classes) if path.is_dir() else _by_content(path, read_content(path), classes)
    numbers = Counter[tuple[str | None, int | None]]()
    every, wanted = found.boxes, {name.lower() for name in classes}
    found.boxes = []
    for box in every:
        numbers[box.photo, box.frame] += 1
        if box.kind is not None and ALL_CLASSES not in wanted and box.kind.lower() not in wanted:
            found.skipped["boxes of another class"] += 1
        elif min_score and box.score is not None and box.score < min_score:
            found.skipped[f"boxes with a score below {min_score:g}"] += 1
        else:
            track = box.track if box.track is not None and box.track >= 0 else None
            found.boxes.append(replace(box, number=numbers[box.photo, box.frame], track=track))
    left_out = "".join(f", {count:,} {why} left out" for why, count in sorted(found.skipped.items()))
    if not found.boxes:
        raise UserError(f"{path} holds no box that is taken{left_out}: --box-class names the classes, or `all`")
    _log.info(f"{path}: {len(found.boxes):,} boxes in {found.format}{left_out}")
    return found


def _by_content(path: Path, content: bytes, classes: Sequence[str]) -> Boxes:
    title = str(path)
    if content.startswith(PARQUET_MAGIC):
        return _table(content, title)
    text = decode_text(content, title).lstrip()
    if text[:1] in ("{", "["):
        return _coco(text, title, classes)
    first = text.partition("\n")[0]
    try:
        values = [float(value) for value in first.replace(",", " ").split()]
    except ValueError:
        values = []
    if values:
        if 5 <= len(values) <= 7 and "," not in first and all(abs(value) <= 1 for value in values[1:5]):
            raise UserError(f"{title} is YOLO's boxes of one photo: give the folder that holds the .txt of every photo")
        return _mot(text, title)
    if "left" in columns_of(first):
        return _table(content, title)
    raise UserError(
        f"{title} has no boxes in a format that is known: give MOTChallenge's text, a folder of YOLO's .txt, COCO's "
        "JSON, or a table with the columns path, left, top, width and height"
    )


def _mot(text: str, title: str) -> Boxes:
    boxes = Boxes(title, "MOTChallenge's format, pixels counted from 1", [])
    taken: set[tuple[int, int]] = set()
    for line, values in _lines(text):
        where = f"{title}, line {line}"
        if not 6 <= len(values) <= 10:
            raise UserError(
                f"{where}: {len(values)} values; MOTChallenge has frame, id, left, top, width, height, conf"
            )
        frame, track = _integer(values[0], where), _integer(values[1], where)
        left, top, width, height, *rest = (_number(value, where) for value in values[2:])
        if frame < 1:
            raise UserError(f"{where}: frame {frame}; MOTChallenge counts frames from 1")
        if rest and rest[0] == 0:
            boxes.skipped["boxes with flag 0"] += 1
            continue
        if track >= 0 and (frame, track) in taken:
            boxes.skipped["boxes of a track that has one in the frame"] += 1
            continue
        taken.add((frame, track))
        kind = values[7] if len(values) == 9 else None
        boxes.boxes.append(
            Box(
                photo=None,
                frame=frame,
                edges=(left - 1, top - 1, width, height),
                track=track,
                kind=PERSON if kind in _MOT_PEOPLE else kind,
                score=rest[0] if rest and len(values) != 9 and rest[0] != -1 else None,  # of nine it is the flag
            )
        )
    return boxes


def _yolo(folder: Path, classes: Sequence[str]) -> Boxes:
    names = {"0": PERSON}
    listed = folder / "classes.txt"
    if listed.is_file():
        text = decode_text(read_content(listed), str(listed))
        names = {str(number): name.strip() for number, name in enumerate(text.splitlines())}
    boxes = Boxes(str(folder), "YOLO's format, fractions of a photo", [], relative=True)
    files = sorted((path for path in folder.rglob("*.txt") if path != listed), key=os.fsencode)
    for path in files:
        photo = path.relative_to(folder).with_suffix("").as_posix()
        for line, values in _lines(decode_text(read_content(path), str(path))):
            where = f"{path}, line {line}"
            if not 5 <= len(values) <= 7:
                raise UserError(f"{where}: {len(values)} values; YOLO has class, x, y, width, height of a box")
            x, y, width, height, *rest = (_number(value, where) for value in values[1:])
            boxes.boxes.append(
                Box(
                    photo=photo,
                    frame=None,
                    edges=(x - width / 2, y - height / 2, width, height),
                    track=_integer(values[6], where) if len(values) == 7 else None,
                    kind=values[0] if values[0] in classes else names.get(values[0], values[0]),
                    score=rest[0] if rest else None,
                )
            )
    if not files:
        raise UserError(f"{folder} holds no .txt: YOLO writes one for each photo")
    return boxes


def _coco(text: str, title: str, classes: Sequence[str]) -> Boxes:
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            photos = {photo["id"]: str(photo["file_name"]).replace("\\", "/") for photo in content["images"]}
            names = {kind["id"]: str(kind["name"]) for kind in content.get("categories", ())}
            entries, form = content["annotations"], "COCO's format"
        else:
            photos, names, entries, form = {}, {1: PERSON}, content, "COCO's format of results"
        boxes = Boxes(title, form, [])
        for number, entry in enumerate(entries):
            where = f"{title}, annotation {number}"
            if entry.get("iscrowd"):
                boxes.skipped["boxes of crowds"] += 1
                continue
            left, top, width, height = (_number(value, where) for value in entry["bbox"])
            kind = entry["category_id"]
            score = entry.get("score")
            boxes.boxes.append(
                Box(
                    photo=photos[entry["image_id"]] if photos else str(entry["image_id"]),
                    frame=None,
                    edges=(left, top, width, height),
                    track=_integer(entry["track_id"], where) if isinstance(entry.get("track_id"), int) else None,
                    kind=str(kind) if str(kind) in classes else names.get(kind, str(kind)),
                    score=None if score is None else _number(score, where),
                )
            )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{title} is no JSON in COCO's format, of images and annotations ({what})") from None
    return boxes


def _table(content: bytes, title: str) -> Boxes:
    rows = parse_table(content, title, ("left", "top", "width", "height"))
    if rows and not {"path", "frame"} & rows[0].cells.keys():
        raise UserError(f"{title} lacks a column path, or frame for a video's boxes")
    boxes = Boxes(title, "a table, pixels counted from 0", [])
    for row in rows:
        cells, where = row.cells, f"{title}, line {row.line}"
        left, top, width, height = (_number(cells[name], where) for name in ("left", "top", "width", "height"))
        if "path" in cells and not row.path:
            raise UserError(f"{where}: the path is empty")
        boxes.boxes.append(
            Box(
                photo=row.path if "path" in cells else None,
                frame=None if "path" in cells else _integer(cells["frame"], where),
                edges=(left, top, width, height),
                track=_integer(cells["track"], where) if cells.get("track") else None,
                kind=cells.get("class") or None,
                score=_number(cells["score"], where) if cells.get("score") else None,
            )
        )
    return boxes


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not blank, by number, and their values, divided by commas or blanks."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, [value.strip() for value in (line.split(",") if "," in line else line.split())]


def _number(text: Any, where: str) -> float:
    try:
        value = float(text)
        if abs(value) < 2**53:  # NaN is not; a store's float32 takes these by any photo's size
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{where}: {text!r} is no number, or too large")


def _integer(text: Any, where: str) -> int:
    value = _number(text, where)
    if value != int(value):
        raise UserError(f"{where}: {text!r} is no whole number")
    return int(value)
