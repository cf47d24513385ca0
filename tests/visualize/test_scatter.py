"""Maps of images as pictures and as pages."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from passl.visualize.colours import DISTINCT, colour_of, marker_of
from passl.visualize.scatter import scatter_picture
from passl.visualize.scatter_page import scatter_fragment, scatter_html
from tests.browser import needs_browser, page_dom, screenshot

HOSTILE = [
    "</script><script>document.body.innerHTML='owned'</script>",
    "<!-- <script>",
    '"><img src=x onerror=alert(1)>',
]


def points_of(count):
    return np.random.default_rng(0).normal(size=(count, 2))


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def pixels(picture, colour):
    return int((np.asarray(picture) == rgb(colour)).all(axis=2).sum())


# --- the picture ---


@pytest.mark.smoke
def test_points_have_the_colours_of_their_classes():
    labels = [0, 1, 1, -1] * 5
    picture = scatter_picture(points_of(20), labels, ["cat", "dog", "none of it"], title="A map")
    assert all(pixels(picture, colour_of(label)) > 50 for label in (0, 1, -1))
    assert not pixels(picture, colour_of(2))
    assert picture.width > scatter_picture(points_of(20), None, []).width  # a legend


def test_thumbnails_are_thinned_and_framed():
    reds = [Image.new("RGB", (9, 5), (200, 0, 0))] * 300
    picture = scatter_picture(np.zeros((300, 2)), [0] * 300, ["cat"], reds)
    one = scatter_picture(np.zeros((1, 2)), [0], ["cat"], reds[:1])
    assert 0 < pixels(picture, "#c80000") <= 62**2
    assert 0 < pixels(one, "#c80000") <= 120**2
    # None is dotted only.
    assert not pixels(scatter_picture(points_of(2), None, [], [None, None]), "#c80000")


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_points(count):
    images = [Image.new("L", (3, 7))] * count
    for points in (points_of(count), np.zeros((count, 2))):
        for thumbnails in (None, images):
            assert scatter_picture(points, [0] * count, ["a"], thumbnails).width >= 1200
        assert "passl-map" in scatter_html(points, [0] * count, ["a"], ["n"] * count, images)


def test_names_that_no_font_or_formula_reader_likes():
    scatter_picture(points_of(3), [0, 1, 2], ["$\\frac$", "_hidden\n", "名\udcff" * 60], title="$" * 500)


def test_a_hundred_classes_differ():
    looks = {(colour_of(label), marker_of(label)) for label in range(DISTINCT)}
    assert len(looks) == DISTINCT
    assert len({colour_of(label) for label in range(20)}) == 20
    names = [f"class {label}" for label in range(150)]
    scatter_picture(points_of(150), range(150), names)


@pytest.mark.smoke
def test_errors():
    with pytest.raises(ValueError, match="points must be finite numbers"):
        scatter_picture(np.array([[0, np.nan]]), None, [])
    with pytest.raises(ValueError, match="2 points and 1 labels"):
        scatter_picture(points_of(2), [0], ["a"])
    with pytest.raises(ValueError, match="labels must be from -1 to 0"):
        scatter_html(points_of(2), [0, 1], ["a"], ["x", "y"], None)
    with pytest.raises(ValueError, match="2 points and 1 names: one each"):
        scatter_html(points_of(2), None, [], ["x"], None)


# --- the page ---


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs


def data_of(page):
    (text,) = re.findall('<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@pytest.mark.smoke
def test_names_are_data_and_nothing_else():
    page = scatter_html(points_of(3), [0, 1, 2], HOSTILE, HOSTILE, None)
    harmless = scatter_html(points_of(3), [0, 1, 2], ["a", "b", "c"], ["a", "b", "c"], None)
    assert Tags(page).found == Tags(harmless).found
    data = data_of(page)
    assert data["names"] == HOSTILE == [one["name"] for one in data["classes"]]
    assert data_of(scatter_html(points_of(1), None, [], ["a\udcff"], None))["names"] == ["a?"]


def test_the_page_needs_nothing_else():
    images = [Image.new("RGB", (30, 20), "red"), None]
    page = scatter_html(points_of(2), None, [], ["a", "b"], images)
    assert not {"src", "href", "id"} & {name for name, _ in Tags(page).attributes}
    assert "http" not in page
    data = data_of(page)
    assert data["thumbnails"] == [0, -1]
    assert [sheet[:23] for sheet in data["sheets"]] == ["data:image/jpeg;base64,"]


def test_ten_thousand_points_and_two_thousand_thumbnails_have_a_bounded_size():
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    images = [Image.fromarray(noise).resize((64, 64))] * 2000 + [None] * 8000
    page = scatter_html(points_of(10000), [i % 10 for i in range(10000)], list("abcdefghij"), ["name"] * 10000, images)
    assert len(page) < 8e6
    assert len(data_of(page)["sheets"]) == 2


@needs_browser
def test_a_browser_draws_the_points(tmp_path):
    page = tmp_path / "map.html"
    points = np.concatenate([points_of(9998), [[50, 50], [-50, -50]]])
    names = [*HOSTILE, *(f"image {i}" for i in range(9997))]
    page.write_text(scatter_html(points, [i % 3 for i in range(10000)], HOSTILE, names, None), encoding="utf-8")
    dom = page_dom(page)
    assert 'data-drawn="10000"' in dom
    assert dom.count('aria-pressed="true"') == 3
    assert "10000 images" in dom
    assert Tags(dom).found.count("img") == 0
    assert html.escape(HOSTILE[1], quote=False) in dom
    screenshot(page, tmp_path / "map.png", 900, 600)
    with Image.open(tmp_path / "map.png") as shot:
        assert len(shot.convert("RGB").getcolors(900 * 600)) > 10
        assert all(pixels(shot.convert("RGB"), colour_of(label)) > 20 for label in range(3))


@needs_browser
def test_two_maps_on_one_page(tmp_path):
    page = tmp_path / "two.html"
    red = [Image.new("RGB", (64, 64), (250, 0, 0))] * 5
    first = scatter_fragment(points_of(4), [0] * 4, ["first"], list("abcd"), None)
    second = scatter_fragment(points_of(5), [0] * 5, ["other"], list("abcde"), red)
    # What a hand does: hide the class of the first map; search in the second.
    hands = """<script>
    const [one, two] = document.querySelectorAll(".passl-map");
    one.querySelector(".legend button").click();
    const search = two.querySelector("input[type=search]");
    search.value = "C";
    search.dispatchEvent(new Event("input"));
    </script>"""
    page.write_text(f"<!DOCTYPE html><body>{first}<p>between</p>{second}{hands}</body>", encoding="utf-8")
    dom = page_dom(page)
    assert re.findall('class="passl-map" data-drawn="([0-9]+)"', dom) == ["0", "1"]
    assert dom.count('aria-pressed="false"') == 1
    assert "0 of 4 images" in dom
    assert "1 found of 5 images" in dom


@needs_browser
def test_pointing_at_an_image_shows_it(tmp_path):
    page = tmp_path / "map.html"
    images = [Image.new("RGB", (64, 64), (250, 0, 0))]
    text = scatter_html(np.zeros((1, 2)), [0], ["cat"], ["photos/<b>.png"], images)
    hands = """<script>
    setTimeout(() => {
      const canvas = document.querySelector(".plot canvas"), box = canvas.getBoundingClientRect();
      canvas.dispatchEvent(new PointerEvent("pointermove",
        {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2}));
    }, 500);
    </script></body>"""
    page.write_text(text.replace("</body>", hands), encoding="utf-8")
    assert '<div class="path">photos/&lt;b&gt;.png</div><b class="class">cat</b>' in page_dom(page)
    screenshot(page, tmp_path / "map.png", 800, 600)
    with Image.open(tmp_path / "map.png") as shot:
        red = np.asarray(shot.convert("RGB")).astype(int)
    assert ((red[..., 0] > 240) & (red[..., 1:].max(axis=2) < 12)).sum() > 100 * 100
