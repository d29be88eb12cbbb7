"""The rank-list page: every query beside its best gallery crops, in one HTML file that needs nothing else.

The page holds no script and loads nothing: thumbnails are inlined, and its Content-Security-Policy forbids the rest.
What it shows and how stands in `rank_page.html.jinja`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from mgn_deploy.gallery.store import Store
from mgn_deploy.identity.ranked import Judged
from mgn_deploy.images.decode import load_rgb
from mgn_deploy.report.pages import read_thumbnail, today, write_page
from mgn_deploy.retrieval.rank_list import RankList, verdict

_SPECIAL_IDENTITIES = {-1: "junk"}  # Market-1501's; its 0, a distractor, may be a person elsewhere


def write_rank_page(
    out: Path, lists: Sequence[RankList], *, title: str, facts: Mapping[str, str], judged: Judged | None = None
) -> None:
    """Write `lists` as one self-contained HTML page that replaces `out` only once it is whole.

    A frame is green for the query's identity and red for another one, which junk (-1) always is. It is grey where
    either identity is unknown, and for every result of a query that is itself junk: that number names nobody; blue,
    where the similarity reaches a calibration's threshold. Rows are written one by one, so memory does not grow with
    the number of queries.

    Args:
        out: the page; an existing file is replaced.
        lists: one row each, in this order; every result is shown.
        title: the page's heading.
        facts: label -> value, shown first in the heading (model, backend, gallery rows, ...). The number of queries,
            the share of them whose rank-1 is right and the date are added, unless `facts` has "Queries",
            "Rank-1 right" or "Date".
        judged: what the lists' probabilities and threshold are by, of `identity.ranked.judge`; None: they have none.

    Raises:
        UserError: `out` cannot be written or the disk is full; an earlier page there is kept.
    """
    rank_1 = Counter(frame for ranked in lists for frame in _frames(ranked)[:1])
    right, wrong = rank_1["same"], rank_1["other"]
    known = right + wrong
    computed = {
        "Queries": f"{len(lists):,}",
        "Rank-1 right": f"{right / known:.1%} ({right:,} of {known:,})" if known else "unknown (no identities)",
        "Date": today(),
    }
    cameras = {result.camera for ranked in lists for result in ranked.results if result.camera is not None}
    names = {camera: str(camera).replace("-", "m") for camera in sorted(cameras)}
    write_page(
        out,
        "rank_page.html.jinja",
        title=title,
        facts={**facts, **computed, **facts},
        wrong=wrong,
        lists=lists,
        frames_of=_frames,
        lines=[_line(ranked) for ranked in lists],
        judged=judged,
        cameras=list(names.values()),
        names_of_cameras=names,
        thumbnail_of=lambda image: read_thumbnail(image.load or partial(load_rgb, image.path)),
        special_identities=_SPECIAL_IDENTITIES,
    )


def gallery_facts(gallery: Store) -> dict[str, str]:
    """What the page's heading says of the store that was searched."""
    return {
        "Bundle": gallery.manifest.bundle_id[:12],
        "Backend": gallery.manifest.backend,
        "Gallery": f"{len(gallery):,} images",
    }


def _frames(ranked: RankList) -> list[str]:
    """Each result's frame, in rank order."""
    frames = [verdict(ranked.query, result) for result in ranked.results]
    return [
        "likely" if frame == "unknown" and result.same else frame
        for frame, result in zip(frames, ranked.results, strict=True)
    ]


def _line(ranked: RankList) -> int:
    """The rank, from 0 on, before which the threshold's line stands; -1 where it is not one line through the ranks."""
    same = [result.same for result in ranked.results]
    if None in same or not same:
        return -1
    above = same.count(True)
    return above if all(same[:above]) and 0 < above < len(same) else -1
