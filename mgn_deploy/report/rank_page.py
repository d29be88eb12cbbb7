"""The rank-list page: every query beside its best gallery crops, in one HTML file that needs nothing else.

The page holds no script and loads nothing: thumbnails are inlined, and its Content-Security-Policy forbids the rest.
What it shows and how stands in `rank_page.html.jinja`.
"""

from __future__ import annotations

import base64
import io
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mgn_deploy.errors import UnreadableImage
from mgn_deploy.files import atomic_file
from mgn_deploy.gallery.store import Store
from mgn_deploy.images.decode import load_rgb
from mgn_deploy.retrieval.rank_list import RankList, verdict

THUMBNAIL_SIDE = 192  # pixels; about twice what the page shows, for dense screens and print
JPEG_QUALITY = 85
_SPECIAL_IDENTITIES = {-1: "junk"}  # Market-1501's; its 0, a distractor, may be a person elsewhere


def write_rank_page(out: Path, lists: Sequence[RankList], *, title: str, facts: Mapping[str, str]) -> None:
    """Write `lists` as one self-contained HTML page that replaces `out` only once it is whole.

    A frame is green for the query's identity and red for another one, which junk (-1) always is. It is grey where
    either identity is unknown, and for every result of a query that is itself junk: that number names nobody. Rows are
    written one by one, so memory does not grow with the number of queries.

    Args:
        out: the page; an existing file is replaced.
        lists: one row each, in this order; every result is shown.
        title: the page's heading.
        facts: label -> value, shown first in the heading (model, backend, gallery rows, ...). The number of queries,
            the share of them whose rank-1 is right and the date are added, unless `facts` has "Queries",
            "Rank-1 right" or "Date".

    Raises:
        UserError: `out` cannot be written or the disk is full; an earlier page there is kept.
    """
    rank_1 = Counter(frame for ranked in lists for frame in _frames(ranked)[:1])
    right, wrong = rank_1["same"], rank_1["other"]
    judged = right + wrong
    computed = {
        "Queries": f"{len(lists):,}",
        "Rank-1 right": f"{right / judged:.1%} ({right:,} of {judged:,})" if judged else "unknown (no identities)",
        "Date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_spelled_out,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("rank_page.html.jinja").stream(
        title=title,
        facts={**facts, **{label: value for label, value in computed.items() if label not in facts}},
        wrong=wrong,
        lists=lists,
        frames_of=_frames,
        read_thumbnail=_read_thumbnail,
        special_identities=_SPECIAL_IDENTITIES,
    )
    with atomic_file(out) as file:
        page.dump(file, "utf-8")


def gallery_facts(gallery: Store) -> dict[str, str]:
    """What the page's heading says of the store that was searched."""
    return {
        "Bundle": gallery.manifest.bundle_id[:12],
        "Backend": gallery.manifest.backend,
        "Gallery": f"{len(gallery):,} images",
    }


def _frames(ranked: RankList) -> list[str]:
    """Each result's frame, in rank order."""
    return [verdict(ranked.query, result) for result in ranked.results]


def _read_thumbnail(path: Path) -> dict[str, Any]:
    """An image's `width`, `height` and `jpeg` (base64) as the page inlines it, or the `problem` of one that is gone."""
    try:
        thumbnail = load_rgb(path)
    except UnreadableImage as reason:
        return {"problem": str(reason)}
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    thumbnail.info.clear()  # Pillow would carry a JPEG comment over
    jpeg = io.BytesIO()
    thumbnail.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(jpeg.getvalue()).decode("ascii")
    return {"width": thumbnail.width, "height": thumbnail.height, "jpeg": data}


def _spelled_out(value: Any) -> Any:
    """Text of which every character can be seen; Jinja2 escapes it afterwards.

    What has no glyph is spelled out (a newline as \\n, a byte that is not UTF-8 as \\udcff): the page stays valid
    UTF-8, names that differ look different, and no control character turns the text around it.
    """
    if not isinstance(value, str) or hasattr(value, "__html__") or value.isprintable():
        return value
    return "".join(c if _has_glyph(c) else c.encode("unicode_escape").decode() for c in value)


def _has_glyph(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"
