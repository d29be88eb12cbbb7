"""The pages in Chromium, at a desk's width and a phone's: nothing is loaded or fails, nothing runs off the side."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from made_up_people import embeddings_of
from made_up_store import made_up_store

from mgn_deploy.identity.clusters import cluster_store
from mgn_deploy.identity.embedding_map import map_store
from mgn_deploy.identity.ranked import Judged
from mgn_deploy.report.group_page import write_group_page
from mgn_deploy.report.map_page import write_map_page
from mgn_deploy.report.rank_page import write_rank_page
from mgn_deploy.retrieval.rank_list import RankedImage, RankList

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (the extra `identity`)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
WIDTHS = {"desk": (1400, 900), "phone": (390, 844)}

ROWS, OWNERS, CAMERAS = embeddings_of(5, 6, noise=0.2)
HOSTILE = '</script><img src=x onerror="document.title=1">.jpg'.replace("/", "\u2044")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    names = [f"{number}.jpg" for number in range(len(ROWS))]
    names[3] = HOSTILE
    folder = tmp_path_factory.mktemp("people")
    made = made_up_store(folder, ROWS, OWNERS.tolist(), (CAMERAS + 1).tolist(), names=names, drawn=True)
    (folder / "images" / names[7]).unlink()
    return made


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=WIDTHS)
def view(request, browser):
    """Opens a page, and checks at the end that it was quiet."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=request.param == "phone")
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))

    def open_page(path):
        page.goto(path.as_uri())
        return page

    yield open_page
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_groups_are_shown_and_an_image_is_enlarged_by_a_click_and_closed_by_escape(store, view, tmp_path):
    write_group_page(tmp_path / "groups.html", cluster_store(store, distance="cosine", eps=0.2), title="Groups <b>")
    page = view(tmp_path / "groups.html")
    assert page.title() == "Groups <b>"
    assert page.locator(".group").count() == 5
    assert page.locator(".group img").count() == 29
    assert page.locator(".group .gone").count() == 1
    image = page.locator(".group img").first
    small = image.bounding_box()
    page.locator(".zoom").first.click()
    assert image.bounding_box()["height"] > 2 * small["height"]
    page.keyboard.press("Escape")
    assert image.bounding_box() == small


def test_the_map_shows_an_image_where_the_pointer_is_and_one_group_alone(store, view, tmp_path):
    shown = write_map_page(tmp_path / "map.html", map_store(store), title="Map", groups=OWNERS)
    assert shown == len(ROWS)
    page = view(tmp_path / "map.html")
    card = page.locator("#card")
    assert not card.is_visible()
    points = page.evaluate("JSON.parse(document.getElementById('points').textContent)")
    assert len(points) == len(ROWS)
    box = page.locator("#map").bounding_box()
    side = min(box["width"], box["height"]) * 0.92

    def point_at(index):
        x = box["x"] + box["width"] / 2 + points[index]["x"] * side
        page.mouse.move(x, box["y"] + box["height"] / 2 + points[index]["y"] * side)

    for index in (0, 3, 12):
        point_at(index)
        assert card.is_visible()
        assert card.locator("bdi").text_content() in [one["name"] for one in points]
    spread = [np.ptp([one[axis] for one in points]) for axis in ("x", "y")]
    assert max(spread) == pytest.approx(1, abs=1e-3)
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    assert not card.is_visible()
    button = page.locator(".groups button").nth(1)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    page.locator("#closer").click()
    page.locator("#all").click()
    assert page.title() == "Map"


def test_rank_lists_are_ordered_and_filtered_by_camera_and_enlarged(store, view, tmp_path):
    paths = [store.path(row) for row in store]
    images = [
        RankedImage(path, row.name, 0.9 - number / 10, None, row.camera, None, 0.9 - number / 10, number < 3)
        for number, (path, row) in enumerate(zip(paths[:6], store.rows[:6], strict=True))
    ]
    query = RankedImage(paths[6], "query.jpg", None, None, 1)
    judged = Judged(0.01, 0.65, 0.1, None)
    write_rank_page(tmp_path / "page.html", [RankList(query, images)], title="Ranks", facts={}, judged=judged)
    page = view(tmp_path / "page.html")
    results = page.locator(".strip li:not(.line)")

    def order():
        places = {one: results.nth(one).bounding_box() for one in range(6)}
        return sorted((one for one in places if places[one]), key=lambda one: places[one]["x"])

    assert order() == [0, 1, 2, 3, 4, 5]
    assert page.locator(".line").is_visible()
    page.locator("#by-camera").check()
    assert order() == [0, 2, 4, 1, 3, 5]
    assert not page.locator(".line").is_visible()
    page.locator("#camera-1").uncheck()
    assert order() == [1, 3, 5]
    small = page.locator("#z1").bounding_box()
    page.locator(".query .zoom").click()
    assert page.locator("#z1").bounding_box()["height"] > 2 * small["height"]


def test_a_hostile_name_is_text_on_every_page(store, view, tmp_path):
    write_map_page(tmp_path / "map.html", map_store(store), title="Map")
    write_group_page(tmp_path / "groups.html", cluster_store(store, distance="cosine", eps=0.2), title="Groups")
    assert "<img src=x" not in (tmp_path / "map.html").read_text()
    assert "<img src=x" not in (tmp_path / "groups.html").read_text()
    page = view(tmp_path / "groups.html")
    assert page.locator('bdi[title*="onerror"]').text_content() == HOSTILE
    assert page.title() == "Groups"
