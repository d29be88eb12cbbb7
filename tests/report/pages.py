"""A rank-list page, written of lists and read back."""

from __future__ import annotations

from html.parser import HTMLParser

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.report.rank_page import write_rank_page
from mgn_deploy.retrieval.rank_list import RankedImage

VOID = {"meta", "link", "img", "input", "path", "use"}


class Page(HTMLParser):
    """A page as a flat list of (tag, attributes, text until the next tag); fails on tags that do not nest."""

    def __init__(self, path):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(path.read_bytes().decode("utf-8", "strict"))
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self.elements:
            self.elements[-1][2] += data

    def all(self, tag, cls=None):
        has = lambda e: cls is None or cls in e[1].get("class", "").split()  # noqa: E731
        return [e for e in self.elements if e[0] == tag and has(e)]

    def texts(self, tag, cls=None):
        return [" ".join(e[2].split()) for e in self.all(tag, cls)]

    def facts(self):
        return dict(zip(self.texts("dt"), self.texts("dd"), strict=True))

    def frames(self):
        """The classes of the results' frames, in rank order over all rows."""
        return [e[1]["class"] for e in self.all("figure") if e[1]["class"] != "query"]


def written(out, *lists, title="Ranks", facts=None):
    write_rank_page(out, lists, title=title, facts=facts or {})
    return Page(out)


def crop_in(folder):
    """Draws a crop to the folder and gives it as the page takes it."""

    def make(identity, camera=1, similarity=None, name=None):
        path = folder / f"crop_{identity}_{camera}.png"
        if not path.exists():
            draw_crop(identity if identity and identity > 0 else 90, camera or 1, 1).save(path)
        return RankedImage(path, path.name if name is None else name, similarity, identity, camera)

    return make
