"""The page of a run in a browser: what is found in it, and that it keeps to itself."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from sparsespec.formats.report import ReportRow, readable_name
from tests.browser.pages import ODD_NAMES, SCORES, Visit, axe_violations, many_rows

Open = Callable[..., Visit]
PAGE = 48


def cards_drawn(visit: Visit) -> int:
    """How many of the cards have masks drawn, seen or not."""
    return int(
        visit.page.evaluate(
            """() => [...document.querySelectorAll(".card canvas")].filter(canvas => canvas.width > 1 && canvas
                .getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some(value => value)).length"""
        )
    )


# -- three images


def test_cards_show_photographs_masks_and_facts(visit: Open, three: Path) -> None:
    seen = visit(three)
    assert seen.page.title() == "sparsespec report"
    assert seen.status() == "3 images"
    assert seen.names() == ["a.jpg", "b/c.png", "d.jpg"]
    facts = seen.page.locator(".card .facts").all_inner_texts()
    assert facts[0].startswith("2 instances\nbest score\n0.91\n")
    assert facts[1].startswith("1 instance\nbest score\n0.91\n")
    assert facts[2].startswith("0 instances")
    seen.page.wait_for_function("() => [...document.querySelectorAll('.card img')].every(image => image.naturalWidth)")
    seen.page.wait_for_function(
        "() => [...document.querySelectorAll('.card canvas')].every(canvas => canvas.width > 1)"
    )
    assert cards_drawn(seen) == 2
    totals = dict(zip(*(seen.page.locator(f".tiles {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True))
    assert totals["Images done"] == "3 of 3"
    assert totals["Instances"] == "3"
    assert totals["Nothing found in"] == "1"
    assert totals["Best score, median"] == "0.91"
    seen.page.get_by_text("Parameters").click()
    assert "seed" in seen.page.locator(".parameters dl").inner_text()


def test_masks_on_cards_are_switched(visit: Open, three: Path) -> None:
    seen = visit(three)
    canvas = seen.page.locator(".card canvas").first
    assert canvas.is_visible()
    seen.page.get_by_role("button", name="Masks").click()
    assert not canvas.is_visible()
    seen.page.locator("body").press("m")
    assert canvas.is_visible()


def test_an_image_opens_large_with_its_masks(visit: Open, three: Path) -> None:
    seen = visit(three)
    seen.open("a.jpg")
    page = seen.page
    assert page.get_by_role("dialog", name="a.jpg").is_visible()
    assert page.locator("#opened .bar .muted").inner_text() == "1 of 3"
    source = page.locator(".sv-photo img").get_attribute("src")
    assert source == "../photos/a.jpg", "the photograph itself, not the small copy"
    assert page.locator(".sv-photo img").get_attribute("alt") == "a.jpg"
    assert [row.split() for row in page.locator(".sv-instances label").all_inner_texts()] == [
        ["1", "score", f"{SCORES[0]:.2f}", "9.9", "%"],
        ["2", "score", f"{SCORES[1]:.2f}", "10", "%"],
    ]
    red, _, blue, alpha = seen.drawn(90, 80)
    assert alpha > 60
    assert blue > red, "the first colour of the overlays"
    assert seen.drawn(160, 20)[3] == 0
    links = {link.inner_text(): link.get_attribute("href") for link in page.locator(".sv-links a").all()}
    assert {text: (three.parent / unquote(target or "")).is_file() for text, target in links.items()} == {
        "mask": True,
        "overlay": True,
    }


def test_masks_are_switched_one_by_one_and_together(visit: Open, three: Path) -> None:
    seen = visit(three)
    seen.open("a.jpg")
    page = seen.page
    page.mouse.click(*seen.at(90, 80))
    page.mouse.move(5, 5)
    assert seen.drawn(90, 80)[3] == 0
    assert seen.drawn(240, 165)[3] > 60
    first, second = page.locator(".sv-instances input").all()
    assert [first.is_checked(), second.is_checked()] == [False, True]
    first.check()
    assert seen.drawn(90, 80)[3] > 60
    second.uncheck()
    page.locator(".sv-surface").focus()
    assert seen.drawn(240, 165)[3] == 0
    page.get_by_role("button", name="Hide all").click()
    assert seen.drawn(90, 80)[3] == 0
    page.get_by_role("button", name="Show all").click()
    assert seen.drawn(240, 165)[3] > 60
    page.get_by_role("button", name="All masks").click()
    assert seen.drawn(240, 165)[3] == 0
    page.mouse.click(*seen.at(90, 80), button="middle")
    assert not first.is_checked()


def test_pointing_tells_score_and_box(visit: Open, three: Path) -> None:
    seen = visit(three)
    seen.open("a.jpg")
    tip = seen.page.locator(".sv-tip")
    assert not tip.is_visible()
    seen.page.mouse.move(*seen.at(90, 80))
    assert tip.inner_text().split("\n") == [
        "Instance 1",
        "score0.910",
        "boxx 40, y 40, 100 × 80",
        "area8,000 pixels, 9.9 %",
    ]
    before = seen.drawn(90, 80)[3]
    seen.page.mouse.move(*seen.at(240, 165))
    assert "x 180, y 130, 120 × 70" in tip.inner_text()
    assert seen.drawn(90, 80)[3] < before, "the others step back"
    seen.page.mouse.move(*seen.at(20, 225))
    assert not tip.is_visible()
    seen.page.locator(".sv-instances li").nth(1).hover()
    assert "Instance 2" in tip.inner_text()
    described = seen.page.locator(".sv-instances input").first.get_attribute("aria-describedby")
    about = seen.page.locator(f"[id='{described}']").text_content()
    assert about == "score 0.910, box x 40, y 40, 100 × 80, area 8,000 pixels, 9.9 %"


def test_layers_lie_over_the_photograph(visit: Open, three: Path) -> None:
    seen = visit(three)
    seen.open("a.jpg")
    page = seen.page
    choice = page.get_by_role("radiogroup", name="Layer over the photograph")
    assert choice.get_by_role("radio").count() == 3
    assert seen.drawn(20, 225)[3] == 0
    choice.get_by_role("radio", name="eigenvector 1").check()
    red, _, blue, alpha = seen.drawn(10, 8)
    assert blue > red
    assert 150 < alpha < 200
    red, _, blue, _ = seen.drawn(300, 230)
    assert red > blue
    assert page.locator(".sv-legend").inner_text().split() == ["-1.00", "1.00"]
    page.mouse.move(*seen.at(2, 2))
    assert page.locator(".sv-tip").inner_text() == "eigenvector 1-1.000"
    opacity = page.get_by_role("slider", name="Opacity").nth(1)
    opacity.fill("20")
    assert 30 < seen.drawn(10, 8)[3] < 70
    # Without smoothing a token is of one colour.
    page.get_by_role("checkbox", name="smooth").uncheck()
    width = 336 / 10.5
    assert seen.drawn(2 * width + 3, 225) == seen.drawn(3 * width - 3, 225) != seen.drawn(3 * width + 3, 225)
    page.keyboard.press("l")
    assert choice.get_by_role("radio", name="none").is_checked()
    assert seen.drawn(20, 225)[3] == 0
    assert not page.locator(".sv-legend").is_visible()


def test_times_of_the_stages_are_told(visit: Open, three: Path) -> None:
    seen = visit(three)
    seen.open("a.jpg")
    terms = seen.page.locator(".sv-seconds dt").all_inner_texts()
    assert {"features", "instances", "total"} <= set(terms)
    figures = dict(zip(terms, seen.page.locator(".sv-seconds dd").all_inner_texts(), strict=True))
    assert figures["features"] == "0.20 s"
    widths = seen.page.evaluate("[...document.querySelectorAll('.sv-seconds i')].map(bar => bar.style.width)")
    shares = {term: float(width.removesuffix("%")) for term, width in zip(terms, widths, strict=False)}
    assert max(shares.values()) == 100
    assert shares["instances"] == pytest.approx(shares["features"] / 2, rel=1e-3)


def test_everything_is_done_from_the_keyboard(visit: Open, three: Path) -> None:
    seen = visit(three)
    page, keys = seen.page, seen.page.keyboard
    keys.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    keys.press("Escape")
    page.locator(".card a").first.focus()
    keys.press("ArrowRight")
    keys.press("Enter")
    seen.wait_for_photograph()
    assert page.locator("#opened-title").inner_text() == "b/c.png"
    keys.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('.sv-photo img')?.alt === 'a.jpg'")
    assert page.locator("#opened-title").inner_text() == "a.jpg"
    keys.press("n")
    assert "Instance 1" in page.locator(".sv-tip").inner_text()
    assert page.locator(".sparsespec-viewer [role=status]").inner_text().startswith("Instance 1, score 0.910, box x 40")
    keys.press("n")
    keys.press("Enter")
    assert [box.is_checked() for box in page.locator(".sv-instances input").all()] == [True, False]
    keys.press("p")
    keys.press("o")
    assert [box.is_checked() for box in page.locator(".sv-instances input").all()] == [True, True], "all again"
    keys.press("o")
    assert [box.is_checked() for box in page.locator(".sv-instances input").all()] == [True, False]
    keys.press("o")
    keys.press("1")
    assert [box.is_checked() for box in page.locator(".sv-instances input").all()] == [False, True]
    keys.press("m")
    keys.press("m")
    assert [box.is_checked() for box in page.locator(".sv-instances input").all()] == [True, True]
    keys.press("?")
    assert page.get_by_role("group", name="Keys").is_visible()
    keys.press("Escape")
    assert not page.get_by_role("group", name="Keys").is_visible()
    keys.press("Escape")
    keys.press("f")
    keys.press("Escape")
    page.wait_for_function("() => !document.getElementById('opened').open")
    assert "image=" not in page.url
    page.wait_for_function("() => document.activeElement.closest('.card')?.textContent.includes('a.jpg')")


def test_tab_goes_through_masks_and_space_switches_them(visit: Open, three: Path) -> None:
    seen = visit(three)
    seen.open("a.jpg")
    box = seen.page.locator(".sv-instances input").first
    box.focus()
    assert "Instance 1" in seen.page.locator(".sv-tip").inner_text()
    seen.page.keyboard.press("Space")
    assert not box.is_checked()
    assert "(hidden)" in seen.page.locator(".sv-tip").inner_text()
    seen.page.keyboard.press("Enter")
    assert box.is_checked()
    seen.page.keyboard.press("Tab")
    assert "Instance 2" in seen.page.locator(".sv-tip").inner_text()


def test_zooming_and_moving(visit: Open, three: Path) -> None:
    seen = visit(three)
    seen.open("a.jpg")
    page = seen.page
    (left, top), (right, _) = seen.at(90, 80), seen.at(190, 80)
    page.mouse.move(left, top)
    page.mouse.wheel(0, -300)
    page.wait_for_function("() => document.querySelector('.sv-wide').textContent !== 'fit'")
    near, far = seen.at(90, 80), seen.at(190, 80)
    assert near == pytest.approx((left, top), abs=1.5), "what is under the pointer stays there"
    assert far[0] - near[0] > 1.5 * (right - left)
    assert seen.drawn(90, 80)[3] > 60
    page.mouse.down()
    page.mouse.move(left - 40, top - 30, steps=4)
    page.mouse.up()
    assert seen.at(90, 80) == pytest.approx((left - 40, top - 30), abs=1.5)
    assert page.locator(".sv-instances input").first.is_checked(), "moving is no click"
    page.keyboard.press("ArrowRight")
    assert page.locator("#opened-title").inner_text() == "a.jpg", "arrows move about while it is close"
    page.keyboard.press("0")
    assert seen.at(90, 80) == pytest.approx((left, top), abs=1.5)
    page.get_by_role("button", name="Closer").click()
    assert page.locator(".sv-wide").inner_text() != "fit"
    page.get_by_role("button", name="Farther").click()
    assert page.locator(".sv-wide").inner_text() == "fit"


def test_fingers(visit: Open, three: Path) -> None:
    seen = visit(three, has_touch=True, viewport={"width": 390, "height": 800})
    seen.open("a.jpg")
    box = seen.page.locator(".sv-instances input").first
    seen.page.touchscreen.tap(*seen.at(90, 80))
    assert "Instance 1" in seen.page.locator(".sv-tip").inner_text()
    assert box.is_checked()
    seen.page.touchscreen.tap(*seen.at(90, 80))
    assert not box.is_checked()


def test_the_next_image_keeps_what_was_chosen(visit: Open, three: Path) -> None:
    seen = visit(three)
    seen.open("a.jpg")
    seen.page.get_by_role("radio", name="foreground").check()
    seen.page.get_by_role("button", name="Next image").click()
    seen.page.wait_for_function("() => document.querySelector('.sv-photo img')?.alt === 'b/c.png'")
    assert seen.page.get_by_role("radio", name="foreground").is_checked()
    assert seen.drawn(20, 225)[3] > 0
    seen.page.get_by_role("button", name="Next image").click()
    seen.page.wait_for_function("() => document.querySelector('.sv-photo img')?.alt === 'd.jpg'")
    assert seen.page.get_by_text("Nothing was found in this photograph.").is_visible()
    assert seen.page.get_by_role("button", name="Next image").is_disabled()


def test_dense_screens_get_sharp_masks(visit: Open, three: Path) -> None:
    seen = visit(three, device_scale_factor=2.5, viewport={"width": 800, "height": 700})
    seen.open("a.jpg")
    assert seen.drawn(90, 80)[3] > 60
    sizes = seen.page.evaluate(
        "() => { const c = document.querySelector('.sv-surface > canvas'); return [c.width, c.clientWidth]; }"
    )
    assert sizes[0] == round(2.5 * sizes[1])


# -- the address


def test_the_address_can_be_shared(visit: Open, three: Path) -> None:
    seen = visit(three)
    page = seen.page
    page.get_by_role("searchbox").fill("a")
    page.get_by_label("Sort by").select_option("name")
    page.get_by_role("button", name="Rising; turn round").click()
    page.wait_for_function("() => location.hash.includes('q=a')")
    seen.open("a.jpg")
    address = page.url
    again = visit(three, hash=address.partition("#")[2] and "#" + address.partition("#")[2])
    again.wait_for_photograph()
    assert again.page.locator("#opened-title").inner_text() == "a.jpg"
    again.page.keyboard.press("Escape")
    assert again.page.get_by_role("searchbox").input_value() == "a"
    assert again.page.locator(".square", has_text="↓").is_visible()
    page.go_back()
    page.wait_for_function("() => !document.getElementById('opened').open")
    assert page.get_by_role("searchbox").input_value() == "a"
    page.go_forward()
    seen.wait_for_photograph()
    assert page.url == address


@pytest.mark.parametrize(
    "address",
    [
        "#image=nowhere",
        "#page=99",
        "#page=-1",
        "#sort=constructor",
        "#score=x..y",
        "#score=...",
        "#status=toString",
        "#%E0%A4",
    ],
)
def test_an_address_that_means_nothing_shows_all(visit: Open, three: Path, address: str) -> None:
    seen = visit(three, hash=address)
    assert seen.status() == "3 images"
    assert seen.names() == ["a.jpg", "b/c.png", "d.jpg"]
    assert not seen.page.locator("#opened").is_visible()


# -- odd names, failures, missing files


def test_odd_names_are_only_names(visit: Open, odd: Path) -> None:
    seen = visit(odd)
    assert seen.status() == f"{len(ODD_NAMES) + 2} images"
    assert sorted(seen.names()) == sorted(readable_name(name) for name in (*ODD_NAMES, "no image.jpg", "empty <i>.png"))
    assert seen.page.locator(".card b, .card i, .card script").count() == 0
    for name in ODD_NAMES:
        seen.open(readable_name(name))
        assert seen.page.locator("#opened-title").text_content() == readable_name(name)
        source = seen.page.evaluate("document.querySelector('.sv-photo img').src")
        assert source.startswith((odd.parent.parent / "photos").as_uri())
        assert seen.page.locator(".sv-instances input").count() == 1 + ODD_NAMES.index(name) % 3
        for link in seen.page.locator(".sv-links a").all():
            assert (odd.parent / unquote(link.get_attribute("href") or "")).is_file()
        seen.page.keyboard.press("Escape")
        seen.page.wait_for_function("() => !document.getElementById('opened').open")


def test_images_without_a_result_say_why(visit: Open, odd: Path) -> None:
    seen = visit(odd, hash="#status=failed")
    assert seen.status() == f"2 of {len(ODD_NAMES) + 2} images"
    card = seen.page.locator(".card", has_text="no image.jpg")
    why = card.locator(".why").inner_text()
    assert len(why) > 10
    card.locator("a").click()
    assert why in seen.page.get_by_role("dialog", name="no image.jpg").inner_text()
    seen.page.keyboard.press("ArrowLeft")
    seen.page.get_by_role("dialog", name="empty <i>.png").wait_for()
    seen.page.keyboard.press("Escape")


def test_without_the_photographs_there_are_small_copies(visit: Open, three: Path, tmp_path: Path) -> None:
    shutil.copytree(three.parent, tmp_path / "moved" / "out")
    seen = visit(tmp_path / "moved" / "out" / "report.html", missing=True)
    seen.open("a.jpg")
    assert seen.page.locator(".sv-photo img").get_attribute("src") == "report/images/a.jpg"
    assert seen.drawn(90, 80)[3] > 60


def test_without_any_photograph_there_are_masks(visit: Open, three: Path, tmp_path: Path) -> None:
    shutil.copytree(three.parent, tmp_path / "bare" / "out", ignore=shutil.ignore_patterns("a.jpg", "*.png"))
    seen = visit(tmp_path / "bare" / "out" / "report.html", missing=True)
    seen.page.locator(".card a").first.click()
    seen.page.locator(".sv-photo.sv-missing").wait_for()
    assert seen.drawn(90, 80)[3] > 60


def test_without_times_and_masks_the_page_works(visit: Open, three: Path, tmp_path: Path) -> None:
    shutil.copytree(three.parent, tmp_path / "bare" / "out", ignore=shutil.ignore_patterns("run.js", "a.js"))
    seen = visit(tmp_path / "bare" / "out" / "report.html", missing=True)
    assert seen.names() == ["a.jpg", "b/c.png", "d.jpg"]
    assert seen.page.locator(".chart").count() == 2
    assert "time" not in seen.page.get_by_label("Sort by").inner_text()
    seen.open("b/c.png")
    assert seen.drawn(90, 80)[3] > 60
    assert not seen.page.get_by_role("heading", name="Time").is_visible()
    seen.page.keyboard.press("ArrowLeft")
    seen.page.wait_for_function("() => document.querySelector('.sv-photo img')?.alt === 'a.jpg'")
    assert seen.page.get_by_text("Its masks are missing: there is no file report/images/a.js").is_visible()


@pytest.fixture
def served(three: Path) -> Iterator[str]:
    """Address of the report of three images on a server of this machine."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Silent, directory=str(three.parent.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/out/report.html"
        server.shutdown()
        thread.join()


def test_it_works_from_a_server(visit: Open, served: str) -> None:
    seen = visit(served, within=served.removesuffix("out/report.html"), missing=True)
    seen.open("a.jpg")
    assert seen.drawn(90, 80)[3] > 60
    assert [line for line in seen.said if "favicon" not in line and "404" not in line] == []


# -- 5,000 images


def expected(keep: Callable[[ReportRow], bool]) -> str:
    found = sum(map(keep, many_rows(5000)))
    return f"{found:,} of 5,000 images"


@pytest.mark.slow
def test_many_images_come_in_pages(visit: Open, many: Path) -> None:
    seen = visit(many)
    page = seen.page
    assert seen.status() == "5,000 images"
    assert page.locator(".card").count() == PAGE
    assert page.locator(".page").first.inner_text() == "Page 1 of 105"
    assert page.get_by_role("button", name="Previous page").first.is_disabled()
    page.get_by_role("button", name="Next page").last.click()
    assert seen.names()[0] == "0 of them/photo 00048.jpg"
    page.keyboard.press("]")
    assert seen.names()[0] == "0 of them/photo 00096.jpg"
    page.keyboard.press("[")
    page.go_back()
    page.wait_for_function("() => document.querySelector('.page').textContent === 'Page 3 of 105'")
    page.evaluate("location.hash = '#page=105'")
    page.wait_for_function("() => document.querySelector('.page').textContent === 'Page 105 of 105'")
    assert page.locator(".card").count() == 5000 - 104 * PAGE
    assert page.get_by_role("button", name="Next page").first.is_disabled()


@pytest.mark.slow
def test_the_document_stays_small(visit: Open, many: Path) -> None:
    seen = visit(many)
    page = seen.page
    sizes = []
    for _ in range(6):
        seen.settle()
        sizes.append(page.evaluate("document.getElementsByTagName('*').length"))
        page.keyboard.press("]")
    seen.open(seen.names()[1])
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        seen.settle()
    seen.wait_for_photograph()
    sizes.append(page.evaluate("document.getElementsByTagName('*').length"))
    assert max(sizes) < 1500


@pytest.mark.slow
def test_photographs_far_down_are_not_loaded(visit: Open, many: Path) -> None:
    seen = visit(many)
    seen.page.wait_for_function("() => document.querySelector('.card canvas').width > 1")
    scripts = [url for url in seen.requests if url.endswith(".js") and "images" in url]
    assert 0 < len(scripts) <= PAGE
    assert len(seen.requests) <= 2 * PAGE + 2


@pytest.mark.slow
def test_searching_many(visit: Open, many: Path) -> None:
    seen = visit(many)
    search = seen.page.get_by_role("searchbox")
    search.fill("00123")
    assert seen.status() == expected(lambda row: "00123" in row.path)
    search.fill("THEM 0123")
    assert seen.status() == expected(lambda row: "them" in row.path and "0123" in row.path)
    search.fill("nothing like that")
    assert seen.status() == "0 of 5,000 images"
    seen.page.get_by_role("button", name="Show all images").click()
    assert seen.status() == "5,000 images"


FILTERS: dict[str, tuple[dict[str, str], Callable[[ReportRow], bool]]] = {
    "score": (
        {"Best score, at least": "0.25", "Best score, at most": "0.75"},
        lambda row: row.score is not None and 0.25 <= round(row.score, 4) <= 0.75,
    ),
    "count": (
        {"Instances, at least": "3", "Instances, at most": "4"},
        lambda row: row.status == "done" and 3 <= row.instances <= 4,
    ),
    "area": ({"Area in %, at least": "50"}, lambda row: row.area is not None and row.area >= 0.5),
    "time": ({"Time in s, at most": "0.211"}, lambda row: row.seconds["total"] <= 0.2110001),
    "none found": ({"Instances, at most": "0"}, lambda row: row.status == "done" and row.instances == 0),
}


@pytest.mark.slow
def test_filtering_many(visit: Open, many: Path) -> None:
    seen = visit(many)
    page = seen.page
    page.get_by_role("button", name="Filters").click()
    for name, (fields, keep) in FILTERS.items():
        for label, value in fields.items():
            page.get_by_label(label).fill(value)
        assert seen.status() == expected(keep), name
        assert page.get_by_role("button", name="Filters (1)").is_visible()
        page.locator(".chip").click()
        assert seen.status() == "5,000 images"


@pytest.mark.slow
def test_filtering_by_status(visit: Open, many: Path) -> None:
    seen = visit(many)
    seen.page.get_by_role("button", name="Filters").click()
    box = seen.page.get_by_role("checkbox", name="failed 50")
    box.check()
    assert seen.status() == expected(lambda row: row.status == "failed")
    assert set(seen.page.locator(".card .why").all_inner_texts()) == {"not an image"}
    seen.page.get_by_role("checkbox", name="done 4,950").check()
    assert seen.status() == "5,000 images"


@pytest.mark.slow
def test_filters_work_together(visit: Open, many: Path) -> None:
    seen = visit(many, hash="#q=photo+01&score=0.5..&count=..3&sort=-area")
    assert seen.status() == expected(
        lambda row: "01" in row.path and row.score is not None and round(row.score, 4) >= 0.5 and row.instances <= 3
    )
    assert len(seen.page.locator(".chip").all()) == 4
    seen.page.get_by_role("button", name="Clear all").click()
    assert seen.status() == "5,000 images"


ORDERS: dict[str, Callable[[ReportRow], Any]] = {
    "name": lambda row: row.path,
    "score": lambda row: row.score,
    "count": lambda row: row.instances if row.status == "done" else None,
    "area": lambda row: row.area,
    "time": lambda row: row.seconds["total"],
}


@pytest.mark.slow
def test_sorting_many(visit: Open, many: Path) -> None:
    seen = visit(many)
    page = seen.page
    for key, value in ORDERS.items():
        page.get_by_label("Sort by").select_option(key)
        known = [row for row in many_rows(5000) if value(row) is not None]
        # Figures are first read from the largest; of equals, the first comes first.
        falling = sorted(known, key=value, reverse=key != "name")
        assert seen.names() == [row.path for row in falling[:PAGE]], key
        page.locator(".controls .square").click()
        rising = sorted(known, key=value, reverse=key == "name")
        assert seen.names() == [row.path for row in rising[:PAGE]], key
        page.wait_for_function(
            "end => location.hash.endsWith(end)", arg="sort=-name" if key == "name" else f"sort={key}"
        )
        page.evaluate("location.hash = location.hash + '&page=105'")
        page.wait_for_function("() => document.querySelector('.page').textContent === 'Page 105 of 105'")
        last = [row for row in many_rows(5000) if value(row) is None] or rising
        assert seen.names()[-1] == last[-1].path, "what is not known comes last, in both directions"


@pytest.mark.slow
def test_bars_choose(visit: Open, many: Path) -> None:
    seen = visit(many)
    counts = seen.page.get_by_role("group", name="Instances per image: choose a range")
    bar = counts.get_by_role("button", name="2 instances: ")
    assert bar.get_attribute("aria-label") == f"2 instances: {sum(r.instances == 2 for r in many_rows(5000)):,} images"
    bar.click()
    assert bar.get_attribute("aria-pressed") == "true"
    assert seen.status() == expected(lambda row: row.instances == 2)
    bar.press("ArrowRight")
    assert seen.active().startswith("3 instances")
    seen.page.keyboard.press("Enter")
    assert seen.status() == expected(lambda row: row.instances == 3)
    seen.page.keyboard.press("Enter")
    assert seen.status() == "5,000 images"
    scores = seen.page.get_by_role("group", name="Best score of an image: choose a range")
    box = scores.bounding_box()
    assert box is not None
    seen.page.mouse.move(box["x"] + 0.51 * box["width"], box["y"] + 20)
    seen.page.mouse.down()
    seen.page.mouse.move(box["x"] + 0.99 * box["width"], box["y"] + 20, steps=5)
    seen.page.mouse.up()
    assert seen.status() == expected(lambda row: row.score is not None and row.score >= 0.5)
    assert seen.page.get_by_role("group", name="Time per image: choose a range").is_visible()


@pytest.mark.slow
def test_opened_images_are_those_found(visit: Open, many: Path) -> None:
    seen = visit(many, hash="#count=6..6&page=2")
    page = seen.page
    page.locator(".card a").first.click()
    seen.wait_for_photograph()
    found = [row.path for row in many_rows(5000) if row.status == "done" and row.instances == 6]
    assert page.locator("#opened-title").inner_text() == found[PAGE]
    page.keyboard.press("ArrowLeft")
    page.get_by_role("dialog", name=found[PAGE - 1]).wait_for()
    assert page.locator("#opened .bar .muted").inner_text() == f"{PAGE} of {len(found)}"
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelector('.page').textContent.startsWith('Page 1 ')")
    page.wait_for_function(
        "name => document.activeElement.textContent.includes(name)", arg=found[PAGE - 1].split("/")[1]
    )


# -- every screen and everybody


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 360])
def test_phones(visit: Open, many: Path, width: int) -> None:
    seen = visit(many, viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    seen.page.get_by_role("button", name="Filters").click()
    widths = (
        "[document.documentElement.scrollWidth, document.getElementById('opened').scrollWidth, visualViewport.width]"
    )
    assert seen.page.evaluate(widths) == [width, 0, width]
    seen.open(seen.names()[3])
    assert seen.page.evaluate(widths) == [width, width, width]
    stage = seen.page.locator(".sv-stage").bounding_box()
    assert stage is not None
    assert stage["width"] == width
    assert stage["height"] > 200
    assert seen.drawn(90, 80)[3] > 60


def test_dark_and_light(visit: Open, three: Path) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        seen = visit(three, color_scheme=scheme)
        backgrounds.append(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = ([int(part) for part in text[4:-1].split(",")] for text in backgrounds)
    assert min(light) > 200
    assert max(dark) < 60


@pytest.mark.slow
@pytest.mark.needs("axe_core_python")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("place", ["gallery", "image", "failures"])
def test_there_are_no_barriers(visit: Open, many: Path, odd: Path, scheme: str, place: str) -> None:
    seen = visit(odd if place == "failures" else many, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True)
    if place == "gallery":
        seen.page.get_by_role("button", name="Filters").click()
        seen.page.get_by_label("Best score, at least").fill("0.2")
        seen.page.get_by_text("Parameters").click()
    elif place == "image":
        seen.open(seen.names()[3])
        seen.page.keyboard.press("l")
        seen.page.keyboard.press("n")
        seen.page.keyboard.press("?")
    assert axe_violations(seen) == []
    if place == "failures":
        seen.page.locator(".card.failed a").first.click()
        assert axe_violations(seen) == []


@pytest.mark.slow
def test_what_nobody_scrolled_to_is_printed_too(visit: Open, many: Path) -> None:
    seen = visit(many)
    unseen = "[...document.querySelectorAll('.card canvas')].filter(canvas => canvas.width === 1).length"
    assert seen.page.evaluate(unseen) > 0
    seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    seen.page.wait_for_function(f"() => {unseen} === 0")
    seen.page.wait_for_function("() => [...document.querySelectorAll('.card img')].every(image => image.naturalWidth)")


def test_on_paper_there_are_no_controls(visit: Open, three: Path) -> None:
    seen = visit(three)
    seen.page.emulate_media(media="print")
    assert not seen.page.get_by_role("searchbox").is_visible()
    assert seen.page.locator(".card").first.is_visible()
