"""The rank-list page: every query beside its best gallery crops, in one HTML file that needs nothing else.

The page holds no script and loads nothing: thumbnails are inlined, and its Content-Security-Policy forbids
the rest. Layout and colours are in `rank_page.html`; here is what goes into it.
"""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from mgn_deploy.errors import UnreadableImage
from mgn_deploy.files import atomic_file
from mgn_deploy.images.decode import load_rgb
from mgn_deploy.retrieval.rank_list import RankedImage, RankList, verdict

THUMBNAIL_SIDE = 192  # pixels; about twice what the page shows, for dense screens and print
JPEG_QUALITY = 85

# CSS class of a frame, which is also the id of its mark in the template -> what a screen reader says.
_MEANING = {"same": "same identity", "other": "another identity", "unknown": "identity unknown"}
# The classes of a row, from its rank-1 frame.
_RANK_1 = {"same": "right", "other": "wrong", "unknown": "unjudged"}
_SPECIAL_IDENTITY = {0: "distractor", -1: "junk"}  # Market-1501's convention


def write_rank_page(out: Path, lists: Sequence[RankList], *, title: str, facts: Mapping[str, str]) -> None:
    """Write `lists` as one self-contained HTML page that replaces `out` only once it is whole.

    A frame is green for the query's identity and red for another one, which distractors (0) and junk (-1)
    always are. It is grey where either identity is unknown, and for every result of a query that is itself a
    distractor or junk: those numbers name nobody.
    Rows are written one by one, so memory does not grow with the number of queries.

    Args:
        out: the page; an existing file is replaced.
        lists: one row each, in this order; every result is shown.
        title: the page's heading.
        facts: label -> value, shown first in the heading (model, backend, gallery rows, ...). The number of
            queries, the share of them whose rank-1 is right and the date are added, unless `facts` has
            "Queries", "Rank-1 right" or "Date".

    Raises:
        UserError: `out` cannot be written or the disk is full; an earlier page there is kept.
    """
    rank_1 = [_rank_1(ranked) for ranked in lists]
    head, tail = _head_and_tail(title, facts, rank_1)
    with atomic_file(out) as page:
        page.write(head.encode())
        for number, ranked in enumerate(lists, start=1):
            page.write(_row(number, ranked).encode())
        page.write(tail.encode())


def _head_and_tail(title: str, facts: Mapping[str, str], rank_1: list[str]) -> tuple[str, str]:
    """What stands before and after the rows."""
    right, wrong = rank_1.count("same"), rank_1.count("other")
    judged = right + wrong
    share = f"{right / judged:.1%} ({right:,} of {judged:,})" if judged else "unknown (no identities)"
    computed = {
        "Queries": f"{len(rank_1):,}",
        "Rank-1 right": share,
        "Date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }
    shown = {**facts, **{label: value for label, value in computed.items() if label not in facts}}
    entries = (f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for label, value in shown.items())
    samples = {f"{frame}_sample": f'<span class="frame">{_mark(frame)}</span>' for frame in _MEANING}
    template = (resources.files("mgn_deploy.report") / "rank_page.html").read_text(encoding="utf-8")
    before, after = template.split("$rows\n")
    head = Template(before).substitute(title=_text(title), facts="\n".join(entries), filter=_filter(wrong), **samples)
    return head, after


def _filter(wrong: int) -> str:
    """A box that hides the other rows by CSS alone, where there is something to find."""
    if not wrong:
        return ""
    whose = "query" if wrong == 1 else f"{wrong:,} queries"
    return (
        '<input class="filter" type="checkbox" id="only-wrong" autocomplete="off">'
        f'<label class="filter" for="only-wrong">only the {whose} whose rank-1 is wrong</label>'
    )


def _row(number: int, ranked: RankList) -> str:
    query = ranked.query
    results = "\n".join(_result(rank, query, result) for rank, result in enumerate(ranked.results, start=1))
    return f"""<section class="row {_RANK_1[_rank_1(ranked)]}" aria-labelledby="q{number}">
<h2 id="q{number}">Query {number} <bdi>{_text(query.name)}</bdi>
<span class="outcome">{_outcome(ranked)}</span></h2>
<div class="strip" tabindex="0" role="group" aria-label="Query {number} and its ranks">
<figure class="query"><div class="frame">{_pixels(query, "Query")}</div>
<figcaption><span class="top"><b>Query</b></span>{_who(query)}</figcaption></figure>
{f"<ol>{results}</ol>" if results else '<p class="none">no gallery crop</p>'}
</div>
</section>
"""


def _result(rank: int, query: RankedImage, result: RankedImage) -> str:
    frame = verdict(query, result)
    similarity = "" if result.similarity is None else f"{result.similarity:.3f}"
    name = _text(result.name)
    return f"""<li><figure class="{frame}">
<div class="frame">{_pixels(result, f"Rank {rank}")}{_mark(frame)}</div>
<figcaption><span class="top"><b>{rank}</b><span>{similarity}</span></span>{_who(result)}
<bdi title="{name}">{name}</bdi></figcaption></figure></li>"""


def _rank_1(ranked: RankList) -> str:
    return verdict(ranked.query, ranked.results[0]) if ranked.results else "unknown"


def _outcome(ranked: RankList) -> str:
    """The row in words, so that it also reads without its colours."""
    verdicts = [verdict(ranked.query, result) for result in ranked.results]
    if not verdicts or verdicts[0] == "unknown":
        return ""
    if verdicts[0] == "same":
        return "rank-1 right"
    if "same" in verdicts:
        return f"rank-1 wrong, right at rank {verdicts.index('same') + 1}"
    return f"rank-1 wrong, none right in the first {len(verdicts)}"


def _mark(frame: str) -> str:
    return f'<svg class="mark" role="img" aria-label="{_MEANING[frame]}"><use href="#{frame}"/></svg>'


def _who(image: RankedImage) -> str:
    words = []
    if image.identity is not None:
        words.append(_SPECIAL_IDENTITY.get(image.identity, f"id {image.identity}"))
    if image.camera is not None:
        words.append(f"cam {image.camera}")
    return '<span class="who">' + " ".join(f"<span>{word}</span>" for word in words) + "</span>"


def _pixels(image: RankedImage, role: str) -> str:
    label = f"{role}: {_text(image.name)}"
    try:
        thumbnail = load_rgb(image.path)
    except UnreadableImage as reason:
        return (
            f'<div class="pixels gone" role="img" aria-label="{label}, the file is gone or unreadable" '
            f'title="{_text(str(reason))}"><svg aria-hidden="true"><use href="#gone"/></svg>'
            "<span>file is gone or unreadable</span></div>"
        )
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    thumbnail.info.clear()  # Pillow would carry a JPEG comment over
    jpeg = io.BytesIO()
    thumbnail.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(jpeg.getvalue()).decode("ascii")
    return (
        f'<img class="pixels" alt="{label}" width="{thumbnail.width}" height="{thumbnail.height}" '
        f'decoding="async" src="data:image/jpeg;base64,{data}">'
    )


def _text(text: str) -> str:
    """`text` for HTML, also inside double quotes.

    What has no glyph is spelled out (a newline as \\n, a byte that is not UTF-8 as \\udcff): the page stays
    valid UTF-8, names that differ look different, and no control character turns the text around it.
    """
    return escape("".join(c if _has_glyph(c) else c.encode("unicode_escape").decode() for c in text))


def _has_glyph(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"
