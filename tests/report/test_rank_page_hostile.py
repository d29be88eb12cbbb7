"""The rank-list page: what a hostile name may not do, and what a broken image or a failed write leaves."""

from __future__ import annotations

import base64
import io
import os
import re
import resource
import tracemalloc

import pytest
from pages import crop_in, written
from PIL import Image

from mgn_deploy.errors import UserError
from mgn_deploy.report.pages import THUMBNAIL_SIDE
from mgn_deploy.report.rank_page import write_rank_page
from mgn_deploy.retrieval.rank_list import RankedImage, RankList


@pytest.fixture
def crop(tmp_path):
    return crop_in(tmp_path)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "{{ title }} {% raw %} {# a comment #} $title %s {0}",
    "two\nlines\tand\0nul",
    "right-to-left \u202egpj.exe",
    os.fsdecode(b"caf\xe9 \xff.jpg"),
    "lone \ud800 surrogate",
    "&lt;already&gt; &#x3c;",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_text(tmp_path, crop, name):
    def page_naming(text):
        results = [crop(1, 2, name=text), RankedImage(tmp_path / "gone", text, 0, 1, 1)]
        return written(tmp_path / "page.html", RankList(crop(1, name=text), results), title=text, facts={text: text})

    harmless, page = page_naming("n"), page_naming(name)
    shape = [[(e[0], sorted(e[1])) for e in p.elements] for p in (page, harmless)]
    assert shape[0] == shape[1], "the name made or changed an element"
    raw = (tmp_path / "page.html").read_bytes().decode("utf-8", "strict")
    assert not re.search(r"[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", raw)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<b> & 'x'.jpg", "<b> & 'x'.jpg"),
        ("two\nlines", r"two\nlines"),
        (os.fsdecode(b"\xff.jpg"), r"\udcff.jpg"),
        ("日本\u3000語 é.jpg", "日本\u3000語 é.jpg"),
    ],
)
def test_a_name_is_shown_as_it_is_or_spelled_out(tmp_path, crop, name, shown):
    page = written(tmp_path / "page.html", RankList(crop(1, name=name), []))
    assert page.all("img")[0][1]["alt"] == f"Query: {shown}"


def test_a_file_that_is_gone_or_broken_gets_a_placeholder_and_the_rest_is_shown(tmp_path, crop):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    results = [
        RankedImage(tmp_path / "none.jpg", "none.jpg", 0.9, 1, 2),
        RankedImage(broken, "broken.jpg", 0.8, 1, 2),
        RankedImage(tmp_path / "nul\0.jpg", "nul.jpg", 0.7, 1, 2),
        crop(1, 2, 0.6),
    ]
    page = written(tmp_path / "page.html", RankList(crop(1), results))
    placeholders = [e[1]["aria-label"].split(":")[0] for e in page.all("div", "gone")]
    assert placeholders == ["Rank 1", "Rank 2", "Rank 3"]
    assert page.texts("span").count("file is gone or unreadable") == 3
    assert [e[1]["alt"] for e in page.all("img")] == ["Query: crop_1_1.png", "Rank 4: crop_1_2.png"]


def test_the_page_loads_nothing_and_runs_nothing(tmp_path, crop):
    page = written(tmp_path / "page.html", RankList(crop(1), [crop(1, 2), crop(2)]))
    for tag, attributes, _ in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    markup = re.sub(r"base64,[A-Za-z0-9+/=]+", "", (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|@import|\{[{%#]|[}%#]\}", markup)
    policy = next(e[1]["content"] for e in page.all("meta") if "http-equiv" in e[1])
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def thumbnail(page, index=0):
    data = page.all("img")[index][1]["src"].removeprefix("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


@pytest.mark.parametrize(("size", "shown"), [((512, 1024), (96, 192)), ((900, 300), (192, 64)), ((64, 128), (64, 128))])
def test_thumbnails_are_small_jpegs_that_are_never_enlarged(tmp_path, size, shown):
    Image.new("RGB", size, "teal").save(tmp_path / "a.png")
    page = written(tmp_path / "page.html", RankList(RankedImage(tmp_path / "a.png", "a", None, 1, 1), []))
    assert (thumbnail(page).format, thumbnail(page).size) == ("JPEG", shown)
    assert max(shown) <= THUMBNAIL_SIDE


def test_what_a_photo_carries_besides_pixels_is_left_behind(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "GPS-and-names"
    Image.new("RGB", (64, 128), "teal").save(tmp_path / "a.jpg", exif=exif, comment=b"a-secret-comment")
    page = written(tmp_path / "page.html", RankList(RankedImage(tmp_path / "a.jpg", "a", None, 1, 1), []))
    assert not {"exif", "comment", "icc_profile"} & set(thumbnail(page).info)


def test_a_page_that_cannot_be_placed_is_a_sentence(tmp_path, crop):
    with pytest.raises(UserError, match=r"none.page\.html cannot be written"):
        written(tmp_path / "none" / "page.html", RankList(crop(1), []))


def test_a_full_disk_leaves_the_earlier_page_and_nothing_else(tmp_path, crop):
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "page.html").write_text("earlier")
    ranked = RankList(crop(1), [crop(2)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a write beyond it fails (EFBIG)
    try:
        with pytest.raises(UserError, match="disk is full"):
            written(folder / "page.html", ranked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("page.html", "earlier")]


def test_an_interrupted_page_leaves_nothing(tmp_path, crop):
    class Interrupted(list):
        def __iter__(self):
            yield from super().__iter__()
            if self.passes.pop():
                raise KeyboardInterrupt

    lists = Interrupted([RankList(crop(1), [crop(2)])])
    lists.passes = [True, False]  # the heading's pass is let through, the rows' pass breaks off
    folder = tmp_path / "pages"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_rank_page(folder / "page.html", lists, title="t", facts={})
    assert list(folder.iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_queries(tmp_path):
    path = tmp_path / "noise.png"
    Image.effect_noise((96, 192), 90).save(path)
    image = RankedImage(path, "noise", None, 1, 1)

    def peak(queries):
        tracemalloc.start()
        try:
            write_rank_page(tmp_path / "page.html", [RankList(image, [image])] * queries, title="t", facts={})
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(5), peak(105)
    a_row = (tmp_path / "page.html").stat().st_size / 105
    assert many - few < 5 * a_row
