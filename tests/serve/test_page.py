"""The page in Chromium: by mouse and by keyboard, on a phone, dark and light."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import open_service, running, with_calibration

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.serve.guard import API_KEY
from mgn_deploy.serve.server import HttpServer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra `dev` brings it")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed: Debian's package chromium has one", allow_module_level=True)

KEY = "a key of some characters"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(bundle_folder: Path, gallery_store: Path, tmp_path_factory) -> Iterator[HttpServer]:
    folder = tmp_path_factory.mktemp("page")
    bundle = with_calibration(bundle_folder, gallery_store, folder / "bundle")
    with running(open_service(bundle, gallery_store, folder / "people")) as server:
        yield server


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    contexts = []

    def open_page(server: HttpServer, **options: Any) -> Any:
        """The page, where nothing has failed to load and no script has failed."""
        context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.problems = []
        page.requested = []
        page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(server.address)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page: Any, server: HttpServer) -> Iterator[Any]:
    page = open_page(server)
    page.wait_for_selector("[data-ready]")
    yield page
    assert page.problems == []
    assert all(url.startswith((server.address, "blob:")) for url in page.requested)


@pytest.fixture
def photo(crops: Path) -> Path:
    return crops / "camera 1" / "0003_c1s1_000000_00.jpg"


def choose(page: Any, photo: Path) -> None:
    page.set_input_files("#file", photo)
    page.wait_for_selector(".result")
    page.wait_for_selector("body:not(.busy)")


def wait_until(page: Any, condition: str) -> None:
    """`page.wait_for_function`, which the page's Content-Security-Policy forbids."""
    end = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def names(page: Any) -> list[str]:
    return page.eval_on_selector_all(".result .file", "all => all.map((one) => one.textContent)")


def test_a_photo_is_answered_with_ranked_crops_probabilities_and_the_threshold(page: Any, photo: Path) -> None:
    choose(page, photo)
    assert names(page)[0] == f"camera 1/{photo.name}"
    assert len(names(page)) == 20
    assert page.inner_text(".result .score").endswith("%")
    assert page.locator(".result.same").count() >= 1
    assert "above the threshold" in page.inner_text("#status")
    wait_until(page, "document.querySelector('.result img').naturalWidth > 0")


def test_the_line_stands_between_what_is_above_the_threshold_and_what_is_below(page: Any, photo: Path) -> None:
    page.select_option("#k", "50")
    choose(page, photo)
    classes = page.eval_on_selector_all("#results > li", "all => all.map((one) => one.className)")
    line = classes.index("line")
    assert set(classes[:line]) == {"result same"}
    assert set(classes[line + 1 :]) == {"result"}


def test_cameras_filter_the_results(page: Any, photo: Path) -> None:
    choose(page, photo)
    page.check("#cameras input[value='2']", force=True)
    wait_until(page, "[...document.querySelectorAll('.result .who')].every((one) => one.textContent.includes('cam 2'))")
    assert len(names(page)) == 20


def test_a_box_drawn_on_the_photo_is_what_is_looked_for(page: Any, crops: Path, tmp_path: Path) -> None:
    group = Image.new("RGB", (600, 300), "grey")
    for number, left in ((1, 40), (5, 300)):
        group.paste(Image.open(crops / "camera 2" / f"{number:04d}_c2s1_000001_00.jpg"), (left, 60))
    group.save(tmp_path / "group.png")
    choose(page, tmp_path / "group.png")
    assert page.is_visible("#hint")
    width, height = Image.open(crops / "camera 2" / "0005_c2s1_000001_00.jpg").size
    area = page.locator("#stage").bounding_box()
    scale = area["width"] / 600
    page.mouse.move(area["x"] + 300 * scale, area["y"] + 60 * scale)
    page.mouse.down()
    page.mouse.move(area["x"] + (300 + width) * scale, area["y"] + (60 + height) * scale, steps=5)
    with page.expect_response("**/search?*") as searched:
        page.mouse.up()
    results = searched.value.json()["crops"][0]["results"]
    assert results[0]["name"] == "camera 2/0005_c2s1_000001_00.jpg"
    assert page.is_hidden("#hint")
    page.click("#whole")
    assert page.is_hidden("#box")


def test_all_of_it_goes_by_keyboard(page: Any, photo: Path) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    choose(page, photo)
    assert page.evaluate("document.activeElement.id") == "stage"
    with page.expect_response("**/search?*"):
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Shift+ArrowDown")
    assert page.is_visible("#box")
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert {"whole", "other", "1", "2", "k", "name", "enrol"} <= reached


def test_everything_that_can_be_used_has_a_name(page: Any, photo: Path) -> None:
    choose(page, photo)
    nameless = page.evaluate(
        """[...document.querySelectorAll("input, select, button, img, [tabindex='0']")].filter((one) => {
            const labels = [...(one.labels ?? [])].map((label) => label.textContent).join("");
            return one.offsetParent && !(one.alt || one.ariaLabel || labels.trim() || one.textContent.trim());
        }).map((one) => one.outerHTML)"""
    )
    assert nameless == []


def test_a_person_is_enrolled_recognised_and_forgotten(page: Any, photo: Path) -> None:
    choose(page, photo)
    page.fill("#name", "Zoë <b>")
    page.keyboard.press("Enter")
    wait_until(page, "document.getElementById('status').textContent.includes('enrolled with 1 image')")
    page.select_option("#k", "10")  # which asks again
    page.wait_for_selector("#identity:visible")
    assert page.inner_text("#verdict") == "Zoë <b>"
    assert "known" in page.get_attribute("#verdict", "class")
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#enrolled summary")
    page.click("#people button")
    wait_until(page, "document.getElementById('people-count').textContent === '0'")
    wait_until(page, "document.activeElement.tagName === 'SUMMARY'")


def test_somebody_who_is_likely_and_below_the_threshold_is_not_called_nobody(page: Any, photo: Path) -> None:
    who = {"known": False, "name": None, "probability": 0.02, "note": None}
    likely = {"name": "Zoë", "similarity": 0.8, "probability": 0.98, "pairs": 1}
    answer = {"answers": [{**who, "candidates": [likely]}]}
    page.route("**/identify", lambda route: route.fulfill(json=answer))
    choose(page, photo)
    assert page.inner_text("#verdict") == "Not sure enough to name one"
    assert page.inner_text("#candidates") == "Zoë\n98%"


def test_a_file_that_is_no_image_is_said(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    page.set_input_files("#file", tmp_path / "broken.jpg")
    page.wait_for_selector("#status.bad")
    assert "cannot be read" in page.inner_text("#status")
    page.problems = [one for one in page.problems if "422" not in one]  # Chromium logs what the page has said


def test_a_pasted_photo_is_taken(page: Any, photo: Path) -> None:
    page.evaluate(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "pasted.jpg", { type: "image/jpeg" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }""",
        list(photo.read_bytes()),
    )
    page.wait_for_selector(".result")
    assert names(page)[0] == f"camera 1/{photo.name}"


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_its_screen_and_follows_the_colour_scheme(
    open_page: Any, server: HttpServer, photo: Path, width: int, scheme: str
) -> None:
    page = open_page(server, viewport={"width": width, "height": 844}, color_scheme=scheme)
    choose(page, photo)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    overflowing = page.evaluate(
        """[...document.querySelectorAll("#ask *, .answers *")].filter((one) => one.offsetParent &&
            one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML)"""
    )
    assert overflowing == []
    red = int(page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
    assert red < 40 if scheme == "dark" else red > 215


def test_a_gallery_that_grows_is_watched(open_page: Any, bundle_folder: Path, crops: Path, tmp_path: Path) -> None:
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.gallery.embed import embed_folder

    photos, store = tmp_path / "photos", tmp_path / "store"
    shutil.copytree(crops / "camera 1", photos)
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    embed_folder(photos, store, embedder)
    for number in range(20):
        draw_crop(50 + number, 3, 0).save(photos / f"{number}.png")
    with running(open_service(bundle_folder, store)) as server:
        page = open_page(server)
        page.wait_for_selector("#store-progress:visible")
        assert page.inner_text("#store-count") == "20 of 40 images embedded"
        embed_folder(photos, store, embedder)
        wait_until(page, "document.getElementById('store-count').textContent === '40 images embedded'")
        assert page.is_hidden("#store-progress")


def test_a_service_with_a_key_asks_for_it_once(
    open_page: Any, bundle_folder: Path, gallery_store: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, KEY)
    with running(open_service(bundle_folder, gallery_store)) as server:
        page = open_page(server)
        page.fill("#key", "a wrong key of some length")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-problem:visible")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("[data-ready]")
        choose(page, photo)
        wait_until(page, "document.querySelector('.result img').naturalWidth > 0")
        page.reload()
        page.wait_for_selector("[data-ready]")
        assert page.is_hidden("#key-dialog")
        assert page.context.cookies() == []
