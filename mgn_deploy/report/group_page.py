"""The page of groups: what `cluster` found, group by group, in one HTML file that needs nothing else and runs nothing.

What it shows and how stands in `group_page.html.jinja`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mgn_deploy.gallery.crops import row_crop
from mgn_deploy.identity.clusters import NOBODY, Clusters, appearances
from mgn_deploy.report.pages import read_thumbnail, today, write_page

SHOWN_IMAGES = 60  # of a group: a page of thousands of one group helps nobody
MAX_GROUPS = 500


def write_group_page(out: Path, clusters: Clusters, *, title: str) -> None:
    """Write the `MAX_GROUPS` largest groups, then the images in none, as one self-contained HTML page.

    Args:
        out: the page; an existing file is replaced once the new one is whole.
        clusters: of `cluster_store`.
        title: the page's heading.

    Raises:
        UserError: `out` cannot be written or the disk is full; an earlier page there is kept.
    """
    made = clusters.to_dict()
    facts = {
        "Images": f"{made['images']:,}",
        "Groups": f"{made['clusters']:,}",
        "In no group": f"{made['in_none']:,}",
        "Distance": f"{clusters.distance}, {clusters.eps:g}",
        "Bundle": clusters.store.manifest.bundle_id[:12],
        "Date": today(),
    }
    if clusters.agreement:
        facts |= {
            "Adjusted Rand index": f"{clusters.agreement.ari:.3f}",
            "NMI": f"{clusters.agreement.nmi:.3f}",
            "Pairwise F": f"{clusters.agreement.f1:.3f}",
        }
    write_page(
        out,
        "group_page.html.jinja",
        title=title,
        facts=facts,
        groups=_groups(clusters),
        left_out=max(0, len(clusters) - MAX_GROUPS),
        thumbnail_of=lambda row: read_thumbnail(partial(row_crop, clusters.store, row)),
    )


def _groups(clusters: Clusters) -> Iterator[dict[str, Any]]:
    store = clusters.store
    for cluster in [*range(min(len(clusters), MAX_GROUPS)), NOBODY]:
        members = clusters.members(cluster)
        if not members:
            continue
        people = Counter(store.rows[row].identity for row in members if store.rows[row].identity is not None)
        yield {
            "name": "In no group" if cluster == NOBODY else f"Group {cluster + 1}",
            "size": len(members),
            "cameras": appearances(clusters, cluster),
            "people": ", ".join(f"id {identity}: {count}" for identity, count in people.most_common(5))
            + (" ..." if len(people) > 5 else ""),
            "hidden": max(0, len(members) - SHOWN_IMAGES),
            "images": [(row, store.rows[row]) for row in members[:SHOWN_IMAGES]],
        }
