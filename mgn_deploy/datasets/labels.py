"""Who is on an image, by a rule that the user names: its file's name, its folder, or a table.

No image is labelled unless a rule is asked for: `20240315_c1_999999.jpg` reads as person 20240315 and camera 1 by
Market-1501's rule, and is a date to whoever named it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mgn_deploy.datasets.market1501 import parse_name
from mgn_deploy.datasets.tables import TableRow, read_table
from mgn_deploy.errors import UserError

_log = logging.getLogger("mgn_deploy")

KINDS = ("none", "market1501", "folder")
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
LARGEST = 2**31 - 1  # a store keeps identity and camera as int32
SMALLEST = -1  # Market-1501's junk; a store has -2 for unknown


class Label(NamedTuple):
    """A person's number, and a camera's where the rule gives one."""

    identity: int
    camera: int | None


@dataclass(frozen=True)
class Labels:
    """A rule, called with an image's name (its path below the listed folder, with slashes); None: it says nothing.

    Attributes:
        kind: none, market1501, folder or the table's path.
        people: the number that each person's text was given; empty where names or table give numbers.
        cameras: the same of cameras.
    """

    kind: str
    people: Mapping[str, int] = field(default_factory=dict)
    cameras: Mapping[str, int] = field(default_factory=dict)
    rule: Callable[[str], Label | None] = field(default=lambda name: None, repr=False)

    def __call__(self, name: str) -> Label | None:
        return self.rule(name)

    def unlabelled(self, names: Iterable[str]) -> list[str]:
        """The names of which the rule says nothing, with a warning that counts them, unless the rule is none."""
        names = list(names)
        missing = [name for name in names if self(name) is None]
        if missing and self.kind != "none":
            _log.warning(
                f"--labels {self.kind} says nothing of {len(missing):,} of {len(names):,} images, {missing[0]!r} the "
                "first: they have no identity"
            )
        return missing


def read_labels(
    kind: str | os.PathLike[str], names: Iterable[str] = (), *, people: Mapping[str, int] | None = None
) -> Labels:
    """Make the rule of `--labels`.

    Args:
        kind: `none`; `market1501` (`0002_c1s1_000451_03.jpg` is person 2 of camera 1); `folder` (`anna/7.jpg` is
            person `anna`: the first folder of the path, no camera); or a table, .csv, .tsv or .txt in UTF-8 or
            .parquet, with the columns path, identity and, if need be, camera, in any order, among others; text is
            divided by commas, semicolons or tabs. A path is an image's name.
        names: all images, for `folder`, which numbers the people 1, 2, ... by the bytes of their names.
        people: numbers that an earlier call gave; they are kept, and people who are new are numbered after them. For
            `folder`, and a table whose identities are no integers.

    Raises:
        UserError: no such rule; a table that cannot be read, lacks a column or says two things of one image.
    """
    kind = os.fspath(kind)
    if kind == "none":
        return Labels(kind)
    if kind == "market1501":
        return Labels(kind, rule=_by_name)
    if kind == "folder":
        return _by_folder(names, people or {})
    if kind.lower().endswith(TABLE_SUFFIXES):
        return table_labels(kind, read_table(kind, ("path", "identity")), people)
    raise UserError(
        f"--labels {kind}: choose {', '.join(KINDS)} or a table ({', '.join(TABLE_SUFFIXES)}) with the columns path, "
        "identity and, if need be, camera"
    )


def number(texts: Iterable[str], known: Mapping[str, int] | None = None) -> dict[str, int]:
    """Number texts 1, 2, ... by their bytes, those that have a number already left alone."""
    numbers = dict(known or {})
    after = max(numbers.values(), default=0)
    new = sorted(set(texts) - numbers.keys(), key=os.fsencode)
    return {**numbers, **{text: index for index, text in enumerate(new, after + 1)}}


def _by_name(name: str) -> Label | None:
    label = parse_name(name.rpartition("/")[2])
    return Label(*label) if label else None


def _by_folder(names: Iterable[str], known: Mapping[str, int]) -> Labels:
    people = number((name.partition("/")[0] for name in names if "/" in name), known)

    def rule(name: str) -> Label | None:
        person, inside, _ = name.partition("/")
        return Label(people[person], None) if inside and person in people else None

    return Labels("folder", people, rule=rule)


def table_labels(title: str, rows: Sequence[TableRow], known: Mapping[str, int] | None = None) -> Labels:
    """The labels that a table's columns path, identity and, if it is there, camera give.

    Args:
        title: of the table, in messages and as the rule's `kind`.
        rows: as `read_table` reads them; one without an identity says nothing.
        known: as `people` of `read_labels`.

    Raises:
        UserError: two rows say two things of one image, or a number is out of range.
    """
    people, identity_of = _numbering(title, "identity", [row.cells["identity"] for row in rows], known or {})
    cameras, camera_of = _numbering(title, "camera", [row.cells.get("camera", "") for row in rows], {})
    labels: dict[str, Label] = {}
    for row in rows:
        if not row.cells["identity"]:
            continue  # known to nobody
        camera = row.cells.get("camera")
        label = Label(identity_of(row.cells["identity"]), camera_of(camera) if camera else None)
        if labels.setdefault(row.path, label) != label:
            raise UserError(f"{title}, line {row.line}: {row.path!r} has another label than in an earlier line")

    return Labels(title, people, cameras, labels.get)


def _numbering(
    title: str, column: str, texts: list[str], known: Mapping[str, int]
) -> tuple[Mapping[str, int], Callable[[str], int]]:
    """The numbers of a column's texts, empty where they are integers themselves; and what gives each its number."""
    texts = [text for text in texts if text]
    if not known and all(_is_integer(text) for text in texts):
        wrong = next((text for text in texts if not SMALLEST <= int(text) <= LARGEST), None)
        if wrong is not None:
            raise UserError(f"{title}: {column} {wrong} is not from {SMALLEST} to {LARGEST}")
        return {}, int
    numbers = number(texts, known)
    return numbers, numbers.__getitem__


def _is_integer(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit()
