"""The rank-list page: what a reader sees, what a hostile name may not do, what a failed write leaves."""

import base64
import io
import os
import re
import resource
import shutil
import subprocess
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.identity.ranked import Judged
from mgn_deploy.report.pages import THUMBNAIL_SIDE
from mgn_deploy.report.rank_page import write_rank_page
from mgn_deploy.retrieval.rank_list import RankedImage, RankList

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


@pytest.fixture
def crop(tmp_path):
    """Draws a crop to disk and gives it as the page takes it."""

    def make(identity, camera=1, similarity=None, name=None):
        path = tmp_path / f"crop_{identity}_{camera}.png"
        if not path.exists():
            draw_crop(identity if identity and identity > 0 else 90, camera or 1, 1).save(path)
        return RankedImage(path, path.name if name is None else name, similarity, identity, camera)

    return make


def written(out, *lists, title="Ranks", facts=None):
    write_rank_page(out, lists, title=title, facts=facts or {})
    return Page(out)


@pytest.mark.parametrize(
    ("query", "result", "frame"),
    [
        (7, 7, "same"),
        (7, 8, "other"),
        (7, 0, "other"),
        (7, -1, "other"),
        (7, None, "unknown"),
        (None, 7, "unknown"),
        (None, None, "unknown"),
        (0, 0, "same"),
        (-1, -1, "unknown"),
        (0, 7, "other"),
    ],
)
def test_a_frame_says_whether_the_identity_is_the_querys(tmp_path, crop, query, result, frame):
    page = written(tmp_path / "page.html", RankList(crop(query), [crop(result, 2)]))
    assert page.frames() == [frame]


def test_every_frame_has_a_mark_of_its_own_kind_with_words(tmp_path, crop):
    page = written(tmp_path / "page.html", RankList(crop(1), [crop(1, 2), crop(2), crop(None)]))
    figures = [i for i, e in enumerate(page.elements) if e[0] == "figure" and e[1]["class"] != "query"]
    marks = {}
    for i in figures:
        mark = next(j for j in range(i, len(page.elements)) if page.elements[j][1].get("class") == "mark")
        marks[page.elements[mark][1]["aria-label"]] = page.elements[mark + 1][1]["href"]
    assert marks == {"same identity": "#same", "another identity": "#other", "identity unknown": "#unknown"}
    assert {e[1]["id"] for e in page.all("symbol")} >= {"same", "other", "unknown"}


def test_results_stand_in_rank_order_with_rank_similarity_identity_and_camera(tmp_path, crop):
    results = [crop(3, 4, 0.91254), crop(0, 5, 0.5), crop(-1, 6, -0.25), crop(None, None, None)]
    page = written(tmp_path / "page.html", RankList(crop(3, 2), results))
    spoken = [" ".join(e[2].split()) for e in page.elements if e[0] in ("b", "span") and e[2].strip()]
    expected = "Query,id 3,cam 2,1,0.913,id 3,cam 4,2,0.500,id 0,cam 5,3,-0.250,junk,cam 6,4"
    assert spoken[spoken.index("Query") :] == expected.split(",")


def test_every_image_has_an_alternative_text(tmp_path, crop):
    page = written(tmp_path / "page.html", RankList(crop(1), [crop(2), crop(3)]))
    alternatives = [e[1]["alt"] for e in page.all("img")]
    assert alternatives == ["Query: crop_1_1.png", "Rank 1: crop_2_1.png", "Rank 2: crop_3_1.png"]


def test_the_heading_counts_rank_1_only_where_identities_are_known(tmp_path, crop):
    page = written(
        tmp_path / "page.html",
        RankList(crop(1), [crop(1, 2), crop(2)]),
        RankList(crop(2), [crop(2, 2)]),
        RankList(crop(3), [crop(4), crop(3, 2)]),
        RankList(crop(4), [crop(None), crop(4, 2)]),
        RankList(crop(None), [crop(1)]),
        RankList(crop(-1), [crop(1)]),
        RankList(crop(5), []),
        facts={"Backend": "openvino", "Gallery rows": "19,732"},
    )
    facts = page.facts()
    assert list(facts) == ["Backend", "Gallery rows", "Queries", "Rank-1 right", "Date"]
    assert (facts["Queries"], facts["Rank-1 right"]) == ("7", "66.7% (2 of 3)")


def test_without_identities_the_heading_claims_no_share(tmp_path, crop):
    page = written(tmp_path / "page.html", RankList(crop(None), [crop(None, 2)]))
    assert page.facts()["Rank-1 right"] == "unknown (no identities)"


def test_a_given_fact_wins_over_the_computed_one(tmp_path, crop):
    page = written(tmp_path / "page.html", RankList(crop(1), []), facts={"Date": "2024-02-29"})
    assert page.facts()["Date"] == "2024-02-29"


def test_each_row_says_its_outcome_in_words(tmp_path, crop):
    page = written(
        tmp_path / "page.html",
        RankList(crop(1), [crop(1, 2)]),
        RankList(crop(1), [crop(2), crop(3), crop(1, 2), crop(1, 3)]),
        RankList(crop(1), [crop(2), crop(3)]),
        RankList(crop(None), [crop(2)]),
    )
    assert page.texts("span", "outcome") == [
        "rank-1 right",
        "rank-1 wrong, right at rank 3",
        "rank-1 wrong, none right in the first 2",
        "",
    ]
    rows = [e[1]["class"] for e in page.all("section")]
    assert rows == ["row right", "row wrong", "row wrong", "row unjudged"]


def test_the_box_for_wrong_queries_is_offered_only_where_there_are_some(tmp_path, crop):
    good, bad = RankList(crop(1), [crop(1, 2)]), RankList(crop(1), [crop(2)])
    assert not written(tmp_path / "page.html", good).all("input")
    page = written(tmp_path / "page.html", good, bad, bad)
    assert page.texts("label")[0] == "only the 2 queries whose rank-1 is wrong"


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


def test_a_query_without_results_says_so(tmp_path, crop):
    assert written(tmp_path / "page.html", RankList(crop(1), [])).texts("p", "none") == ["no gallery crop"]


def test_no_queries_make_a_page_with_a_heading_only(tmp_path):
    page = written(tmp_path / "page.html", title="Empty")
    assert (page.texts("h1"), page.facts()["Queries"], page.all("section")) == (["Empty"], "0", [])


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


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_in_both_colour_schemes(tmp_path, scheme):
    written(tmp_path / "page.html")
    blocks = re.findall(r":root \{([^}]*--page[^}]*--glyph[^}]*)\}", (tmp_path / "page.html").read_text())
    colour = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[scheme == "dark"]))
    pairs = [(text, ground) for text in ("text", "muted") for ground in ("page", "surface", "well")]
    pairs += [("text", "notice")]
    pairs += [(frame, ground) for frame in ("same", "other", "unknown") for ground in ("surface", "glyph")]
    low = {pair: ratio for pair in pairs if (ratio := contrast(*(colour[c] for c in pair))) < 4.5}
    assert not low


PROBE = """<iframe id="f" src="page.html" style="width:360px;height:900px;border:0"></iframe>
<pre id="o"></pre>
<script>
f.onload = () => {
  const d = f.contentDocument, strip = d.querySelector(".strip"), query = d.querySelector("figure.query");
  const root = d.documentElement, name = d.querySelector("h2");
  const left = () => query.getBoundingClientRect().left;
  const before = left();
  strip.scrollLeft = 200;
  const rows = () => [...d.querySelectorAll(".row")].filter(r => r.getClientRects().length).length;
  const all = rows();
  d.querySelector("#only-wrong").click();
  o.textContent = `page wider by ${root.scrollWidth - root.clientWidth}, `
    + `name cut by ${name.scrollWidth - name.clientWidth}, `
    + `row scrolled by ${strip.scrollLeft}, `
    + `query moved by ${left() - before}, rows ${all}, of them wrong ${rows()}`;
};
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH")
def test_on_a_phone_only_the_row_scrolls_and_the_query_stays(tmp_path, crop):
    results = [crop(i, 2, 0.5, name="a-very-long-name-without-a-break" * 4) for i in range(2, 12)]
    right, wrong = RankList(crop(1), [crop(1, 2)]), RankList(crop(1, name="x" * 200), results)
    write_rank_page(tmp_path / "page.html", [wrong, right], title="y" * 100, facts={"Model": "z" * 100})
    (tmp_path / "probe.html").write_text(PROBE)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --allow-file-access-from-files --dump-dom"
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", *flags.split(), profile, (tmp_path / "probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    shown = re.search(r"page wider by.*(?=</pre>)", dom)
    assert shown
    assert shown[0] == (
        "page wider by 0, name cut by 0, row scrolled by 200, query moved by 0, rows 2, of them wrong 1"
    )


JUDGED = Judged(0.01, 0.6, 0.02, None)


def judged_list(crop, *similarities, **options):
    results = [
        replace(crop(None, 1 + number % 3, one), probability=one, same=one >= JUDGED.threshold)
        for number, one in enumerate(similarities)
    ]
    return RankList(crop(None, 2), results, **options)


def test_an_unlabelled_result_has_a_bar_of_its_probability_instead_of_a_question_mark(tmp_path, crop):
    write_rank_page(tmp_path / "p.html", [judged_list(crop, 0.9, 0.3)], title="t", facts={}, judged=JUDGED)
    page = Page(tmp_path / "p.html")
    assert page.frames() == ["likely", "unknown"]
    assert [e[1]["style"] for e in page.all("i")] == ["width: 90.0%", "width: 30.0%"]
    assert page.texts("span", "chance") == ["", ""]  # the text follows the bar
    assert [e[1]["class"] for e in page.all("span", "chance")] == ["chance", "chance below"]
    assert len(page.all("svg", "mark")) == 2  # those of the legend for labels
    text = (tmp_path / "p.html").read_text()
    assert "where 2% of pairs are" in text
    assert "Threshold 0.6000: of pairs of two people the share 0.01 reaches it." in text


def test_the_thresholds_line_stands_between_what_is_above_and_what_is_below(tmp_path, crop):
    for similarities, lines in (((0.9, 0.7, 0.3), 1), ((0.9, 0.7), 0), ((0.3, 0.2), 0), ((0.3, 0.9), 0)):
        write_rank_page(tmp_path / "p.html", [judged_list(crop, *similarities)], title="t", facts={}, judged=JUDGED)
        assert len(Page(tmp_path / "p.html").all("li", "line")) == lines, similarities


def test_a_label_counts_more_than_a_probability(tmp_path, crop):
    results = [
        replace(crop(2, 2, 0.9), probability=0.99, same=True),
        replace(crop(1, 2, 0.8), probability=0.9, same=True),
    ]
    write_rank_page(tmp_path / "p.html", [RankList(crop(1), results)], title="t", facts={}, judged=JUDGED)
    assert Page(tmp_path / "p.html").frames() == ["other", "same"]


def test_cameras_can_be_chosen_where_there_are_several(tmp_path, crop):
    page = written(tmp_path / "p.html", RankList(crop(1), [crop(1, 2), crop(1, 3), crop(1, None), crop(2, 2)]))
    assert page.texts("label") == ["by rank", "by camera", "2", "3"]
    assert [e[1].get("class") for e in page.all("li") if "style" in e[1]] == ["camera-2", "camera-3", None, "camera-2"]
    assert not written(tmp_path / "p.html", RankList(crop(1), [crop(1, 2), crop(1, 2)])).all("label")
