"""The map of a store's embeddings: points on a canvas, thumbnails on hover, in one HTML file that loads nothing.

The one script is `map_page.js`, as it is; the page's Content-Security-Policy allows that text by its SHA-256 and no
other. What the page shows and how stands in `map_page.html.jinja`.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from mgn_deploy.identity.embedding_map import EmbeddingMap
from mgn_deploy.report.pages import row_thumbnails, spelled_out, today, write_page

MAX_IMAGES = 5000
LEGEND_GROUPS = 12
_SIDE, _QUALITY = 128, 75
_SCRIPT = Path(__file__).with_suffix(".js")


def write_map_page(
    out: Path,
    made: EmbeddingMap,
    *,
    title: str,
    groups: np.ndarray | None = None,
    limit: int = MAX_IMAGES,
    seed: int = 0,
) -> int:
    """Write the map as one self-contained HTML page that replaces `out` only once it is whole.

    Args:
        out: the page; an existing file is replaced.
        made: of `map_store`.
        title: the page's heading.
        groups: int `[len(store)]`, as `Clusters.labels`, that colour the points; None: the store's identities do.
        limit: most images shown; of more, as many are drawn at random.
        seed: of that draw.

    Returns:
        How many images are shown.

    Raises:
        UserError: `out` cannot be written or the disk is full; an earlier page there is kept.
    """
    store = made.store
    rows = np.arange(len(store))
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))
    keys, what = _keys(made, groups)
    counted = Counter(keys[row] for row in rows if keys[row] is not None)
    order = [key for key, _ in counted.most_common()]
    facts = {
        "Images": f"{len(rows):,}" + ("" if len(rows) == len(store) else f" of {len(store):,}, drawn at random"),
        "Projection": made.projection.upper()
        + ("" if made.explained is None else f", {made.explained:.0%} of the variance"),
        "Colours": what,
        "Bundle": store.manifest.bundle_id[:12],
        "Date": today(),
    }
    script = _SCRIPT.read_text("utf-8")
    write_page(
        out,
        "map_page.html.jinja",
        title=title,
        facts=facts,
        points=_points(made, rows, keys, {key: number for number, key in enumerate(order)}),
        groups=[{"name": f"{what} {key}", "count": counted[key]} for key in order[:LEGEND_GROUPS]],
        more_groups=max(0, len(order) - LEGEND_GROUPS),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return len(rows)


def _keys(made: EmbeddingMap, groups: np.ndarray | None) -> tuple[list[int | None], str]:
    """What colours each row, None for grey, and what that is called."""
    if groups is not None:
        return [None if group < 0 else int(group) + 1 for group in groups], "group"
    if any(row.identity is not None for row in made.store):
        return [row.identity for row in made.store], "id"
    return [row.camera for row in made.store], "camera"


def _points(
    made: EmbeddingMap, rows: np.ndarray, keys: list[int | None], numbers: dict[int | None, int]
) -> Iterator[dict[str, Any]]:
    low, high = made.points[rows].min(axis=0), made.points[rows].max(axis=0)
    scale = float(max(*(high - low), 1e-9))
    shown = [made.store.rows[row] for row in rows]
    thumbnails = row_thumbnails(made.store, shown, _SIDE, _QUALITY)
    for row, about, thumbnail in zip(rows.tolist(), shown, thumbnails, strict=True):
        x, y = ((made.points[row] - (low + high) / 2) / scale).tolist()
        yield {
            "x": round(x, 5),
            "y": round(-y, 5),  # a canvas counts downwards
            "group": numbers.get(keys[row], -1),
            "name": spelled_out(about.name),
            "about": ", ".join(
                f"{word} {value}"
                for word, value in (("id", about.identity), ("camera", about.camera))
                if value is not None
            ),
            "jpeg": thumbnail.get("jpeg"),
        }
