"""Datasets for training and validation, each with its protocol: `open_data("market1501:DIR")`."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

from mgn_deploy.choices import DATA_KINDS
from mgn_deploy.datasets.cuhk03 import open_cuhk03
from mgn_deploy.datasets.dataset import DISTRACTOR, JUNK, Dataset, LabelledImage, Subset
from mgn_deploy.datasets.identities import open_identities
from mgn_deploy.datasets.market1501 import open_market1501
from mgn_deploy.datasets.msmt17 import open_msmt17
from mgn_deploy.datasets.published import count_notes
from mgn_deploy.errors import UserError

__all__ = ["Dataset", "LabelledImage", "Subset", "open_data"]

_log = logging.getLogger("mgn_deploy")

# Of the kinds that have no layout like Market-1501's.
_OPENERS: dict[str, Callable[[str, Collection[Subset]], Dataset]] = {
    "msmt17": open_msmt17,
    "cuhk03-labeled": partial(open_cuhk03, crops="labeled"),
    "cuhk03-detected": partial(open_cuhk03, crops="detected"),
    "identities": open_identities,
}
# What names nobody, and in which kinds. -1 is nobody's number in a folder either, but 0 may well be somebody's.
_JUNK = {"market1501": frozenset({JUNK}), "folder": frozenset({JUNK})}
_DISTRACTORS = {"market1501": frozenset({DISTRACTOR})}


def open_data(spec: str, subsets: Collection[Subset] = ("query", "gallery")) -> Dataset:
    """List the wanted subsets of the dataset of a `--data` argument, `KIND:DIR`.

    A count that is not the published one is no error but a warning, and one of the dataset's `notes`. So are images of
    junk and distractors in `train`, which are left out: they would become a class.

    Args:
        spec: one of `DATA_KINDS`, a colon, and the folder.
        subsets: of train, query, gallery and multi-query; the others are left empty and need not exist.

    Raises:
        UserError: no such kind of dataset, a folder that does not hold it, or a wanted subset that is missing, empty or
            malformed.
    """
    kind, _, folder = spec.partition(":")
    _check_kind(spec, kind, folder)
    folder = os.path.expanduser(folder)
    if "multi-query" in subsets and kind in _OPENERS:
        raise UserError(f"--data {spec}: {kind} has no multiple queries; Market-1501 has, in gt_bbox")
    data = _OPENERS.get(kind, open_market1501)(folder, subsets)
    data = replace(data, name=kind, junk=_JUNK.get(kind, frozenset()), distractors=_DISTRACTORS.get(kind, frozenset()))
    notes = count_notes(kind, data, subsets)
    people = [image for image in data.train if data.is_person(image.identity)]
    if len(people) < len(data.train):
        notes.append(f"{len(data.train) - len(people):,} training images of junk or distractors were left out")
    for note in notes:
        _log.warning(note)
    return replace(data, train=people, notes=[*data.notes, *notes])


def _check_kind(spec: str, kind: str, folder: str) -> None:
    if kind == "cuhk03":
        raise UserError(
            f"--data {spec}: give cuhk03-labeled:DIR for the hand-drawn boxes or cuhk03-detected:DIR for the detector's"
        )
    kinds = ", ".join(DATA_KINDS)
    if ":" not in spec or (kind in DATA_KINDS and not folder):
        raise UserError(f"--data {spec}: give KIND:DIR, KIND being one of {kinds}")
    if kind not in DATA_KINDS:
        (near,) = difflib.get_close_matches(kind.lower(), DATA_KINDS, n=1, cutoff=0)
        raise UserError(f"--data {spec}: no kind of dataset {kind!r}, did you mean {near!r}? There are {kinds}")
