"""The rank-list page: what a reader sees, of labelled and of unlabelled people."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pages import Page, crop_in, written

from mgn_deploy.identity.ranked import Judged
from mgn_deploy.report.rank_page import write_rank_page
from mgn_deploy.retrieval.rank_list import RankList


@pytest.fixture
def crop(tmp_path):
    return crop_in(tmp_path)


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


def test_a_query_without_results_says_so(tmp_path, crop):
    assert written(tmp_path / "page.html", RankList(crop(1), [])).texts("p", "none") == ["no gallery crop"]


def test_no_queries_make_a_page_with_a_heading_only(tmp_path):
    page = written(tmp_path / "page.html", title="Empty")
    assert (page.texts("h1"), page.facts()["Queries"], page.all("section")) == (["Empty"], "0", [])


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
