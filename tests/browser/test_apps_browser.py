"""The pages in a real browser: Chromium, headless, with nothing but this machine to reach.

Each test leaves a screenshot in build/screenshots. With SIGLIP_HF_DOC_SCREENSHOTS=1 the pictures of docs/apps.md are
made again.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

import siglip_hf
from siglip_hf.apps import compare, multilingual, page
from siglip_hf.apps.scorers import load_scorer
from tiny_clip import write_tiny_clip

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
PICTURES = {Path(path).stem: Path(path) for path in page.demo_pictures()}
WAIT = 60  # seconds; a shared machine may be slow, and a page that works is seldom waited for

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not find_spec("gradio"), reason='no gradio here (pip install "siglip-hf[apps]")'),
]


class Page:
    """A page in the browser, and what a person does there."""

    def __init__(self, driver: webdriver.Chrome, address: str):
        self.driver, self.address = driver, address

    def open(self) -> None:
        self.driver.get(self.address)
        self.wait(lambda: self.all("#picture input[type=file]") or self.all("#draw canvas"), "the page")

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.wait(lambda: self.all(selector), selector)[0]

    def wait(self, condition: Callable, what: str):
        return WebDriverWait(self.driver, WAIT, ignored_exceptions=[Exception]).until(
            lambda _: condition(), f"waited for {what}; the page says: {self.text('body')[-1500:]}"
        )

    def text(self, selector: str) -> str:
        return " ".join(element.text for element in self.all(selector))

    def see(self, selector: str, *words: str) -> str:
        """Waits until an element holds all words, and returns what it says."""
        self.wait(lambda: all(word in self.text(selector) for word in words), f"{words} in {selector}")
        return self.text(selector)

    def upload(self, path: Path) -> None:
        for clear in self.all("#picture button[aria-label=Clear]"):
            self.driver.execute_script("arguments[0].click()", clear)
        self.one("#picture input[type=file]").send_keys(str(path))

    def write(self, selector: str, text: str) -> None:
        """Replaces what a text field holds, as typing does."""
        field = self.one(selector)
        self.driver.execute_script("arguments[0].value = ''", field)
        field.send_keys(text)

    def click(self, selector: str) -> None:
        self.driver.execute_script("arguments[0].click()", self.one(selector))

    def draw(self, points: list[tuple[int, int]]) -> None:
        """A stroke of the pen, through points in pixels from the middle of the board."""
        pen = ActionChains(self.driver, duration=20)
        (x, y), *rest = points
        pen.move_to_element_with_offset(self.one("#draw canvas"), x, y).click_and_hold()
        for to_x, to_y in rest:
            pen.move_by_offset(to_x - x, to_y - y)
            x, y = to_x, to_y
        pen.release().perform()

    @contextmanager
    def telephone(self) -> Iterator[None]:
        """The page is as narrow as on a telephone."""
        size = self.driver.get_window_size()
        metrics = {"width": 390, "height": 1600, "deviceScaleFactor": 1, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            self.driver.set_window_size(size["width"], size["height"])

    def narrow(self, name: str) -> None:
        """A screenshot as on a telephone; nothing may scroll sideways there."""
        with self.telephone():
            self.screenshot(name)
            width = self.driver.execute_script("return document.documentElement.scrollWidth")
            assert width <= 390, f"the page is {width} pixels wide"

    def screenshot(self, name: str, for_docs: bool = False) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.driver.save_screenshot(str(path))
        if for_docs and os.environ.get("SIGLIP_HF_DOC_SCREENSHOTS"):
            target = ROOT / "docs" / "img" / f"app-{name}.png"
            target.parent.mkdir(exist_ok=True)
            shot = Image.open(path).convert("RGB")
            shot.quantize(200, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(target, optimize=True)


@pytest.fixture(scope="module")
def embedded():
    torch.set_num_threads(1)  # a model this small only waits when its work is shared out among threads
    return load_scorer(siglip_hf.default_checkpoint())


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The first half of a picture's file."""
    path = tmp_path_factory.mktemp("broken") / "broken.png"
    content = PICTURES["cat"].read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def serve(driver: webdriver.Chrome, blocks) -> Iterator[Page]:
    yield Page(driver, page.serve(blocks, wait=False))
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def compare_page(driver, embedded) -> Iterator[Page]:
    yield from serve(driver, compare.build([embedded]))


@pytest.fixture(scope="module")
def two_models_page(driver, embedded, tmp_path_factory) -> Iterator[Page]:
    clip = load_scorer(str(write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny-clip")))
    yield from serve(driver, compare.build([embedded, clip]))


@pytest.fixture(scope="module")
def multilingual_page(driver, embedded) -> Iterator[Page]:
    yield from serve(driver, multilingual.build([embedded]))


@pytest.fixture(scope="module")
def search_page(driver, tmp_path_factory) -> Iterator[Page]:
    """Started by its command with no arguments, as by a new user: the demo's index is not there yet."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        "import sys; from siglip_hf.cli.main import main; sys.exit(main())",
        "app",
        "search",
    ]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), address
            assert list(cache.glob("siglip_hf/demo-*.idx"))
            yield Page(driver, address)
        finally:
            process.terminate()


def assert_all_from_here(shown: Page) -> None:
    """Whatever the pages asked for so far came from this machine, or was part of them."""
    requests = [
        message["params"]["request"]["url"]
        for entry in shown.driver.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.startswith(shown.address) for url in requests)
    own = ("http://127.0.0.1:", "data:", "blob:", "chrome:", "chrome-")
    assert [url for url in requests if not url.startswith(own)] == []


def assert_nothing_is_cropped(shown: Page) -> None:
    """A caption stands below its picture, and each name is there in full."""
    for item in shown.all("#gallery .thumbnail-item"):
        picture = item.find_element(By.TAG_NAME, "img").rect
        caption = item.find_element(By.CSS_SELECTOR, ".caption-label")
        assert caption.rect["y"] >= picture["y"] + picture["height"] - 1
        cut = shown.driver.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth + 1", caption)
        assert not cut, caption.text


def captions(shown: Page) -> list[str]:
    """Scores and names of the results."""
    return [element.text for element in shown.all("#gallery .caption-label")]


def test_search_by_words_and_by_a_result(search_page):
    shown = search_page
    shown.open()
    shown.see("#results", "24 entries")
    shown.write("#words textarea", "pizza")
    shown.see("#results", "12 of 24 for 'pizza'")
    shown.wait(lambda: captions(shown)[0].endswith("%) pizza.png"), "a pizza")
    shown.screenshot("search-words")
    assert_nothing_is_cropped(shown)
    shown.narrow("search-390")

    shown.write("#words textarea", " ")
    shown.see("#results", "24 entries")
    shown.write("#words textarea", "Rakete")
    shown.wait(lambda: captions(shown)[0].endswith("rocket.png"), "a rocket")
    shown.click("#gallery button.thumbnail-item")
    shown.see("#results", "'Rakete' and rocket.png")
    shown.click("#clear")
    shown.see("#results", "24 entries")
    assert captions(shown) == []


def see_the_brush(shown: Page) -> None:
    """Waits until the brush is in hand: nobody clicks on a tool first."""
    colour = "return getComputedStyle(document.querySelector('#draw button[aria-label=Brush] svg')).color"
    shown.wait(lambda: "249, 115, 22" in shown.driver.execute_script(colour), "the brush")


def test_search_by_drawing_on_a_telephone(search_page):
    shown = search_page
    with shown.telephone():
        shown.open()
        see_the_brush(shown)
        shown.draw([(-60, -60), (60, 60), (60, -60)])
        shown.see("#results", "12 of 24 for your drawing")
        shown.screenshot("search-drawing-390")
    # Turned on its side, the brush is still in hand.
    shown.draw([(-90, -20), (90, -20)])
    see_the_brush(shown)


def test_search_by_drawing_live(search_page):
    shown = search_page
    shown.open()
    see_the_brush(shown)
    ring = [(round(60 + 45 * math.cos(i / 2)), round(-60 + 45 * math.sin(i / 2))) for i in range(14)]
    shown.draw(ring)
    shown.see("#results", "12 of 24 for your drawing")
    first = shown.text("#gallery")
    shown.draw([(28, -28), (-100, 100)])
    shown.draw([(-90, 90), (-65, 115)])
    shown.draw([(-60, 60), (-35, 85)])
    shown.wait(lambda: shown.text("#gallery") != first, "other results")
    shown.wait(lambda: captions(shown)[0].endswith("key.png"), "a key")
    shown.screenshot("search", for_docs=True)


def test_search_by_upload_with_filters(search_page, broken):
    shown = search_page
    shown.open()
    shown.click("button[role=tab][aria-selected=false]")
    shown.upload(broken)
    shown.see("#results .problem", "broken.png")
    shown.screenshot("search-broken")
    shown.upload(PICTURES["whale"])
    shown.see("#results", "12 of 24 for whale.png")
    shown.wait(lambda: captions(shown)[0] == "1.000 whale.png", "the same picture")
    assert_all_from_here(shown)


def test_compare(compare_page):
    shown = compare_page
    shown.open()
    said = shown.see("#results", "siglip-hf-pictures-64", "cat", "ms")  # of the picture it starts with
    assert said.index("cat") < said.index("dog")
    assert "embedded checkpoint, which knows drawings" in shown.text("body")
    (share, fit) = (shown.text(f"#results .bar:first-of-type span:last-child {part}".strip()) for part in ("", "small"))
    all_shares = [float(bar.text.split("%")[0]) for bar in shown.all("#results .bar span:last-child")]
    assert sum(all_shares) == pytest.approx(100, abs=0.5), "the share leads"
    assert float(share.split("%")[0]) == all_shares[0]
    assert 0 < float(fit.split("%")[0]) < 100
    assert shown.all("#results img[alt='what the pooling head looks at']")
    shown.screenshot("compare", for_docs=True)
    shown.narrow("compare-390")

    shown.write("#labels textarea", "rocket, strawberry")
    shown.click("#compare")
    said = shown.see("#results", "strawberry")
    assert "dog" not in said
    assert_all_from_here(shown)


def test_compare_two_models_on_an_example(two_models_page):
    shown = two_models_page
    shown.open()
    shown.click("button:has(img[src*='rocket.png'])")
    shown.wait(lambda: shown.text("#results .card:first-child .bar").startswith("rocket"), "a rocket")
    cards = [card.text for card in shown.all("#results .card")]
    assert ["sigmoid" in card for card in cards] == [True, False]
    assert "tiny-clip" in cards[1]
    assert "softmax, 0.0 M parameters" in cards[1]
    shown.screenshot("compare-two")


def test_compare_survives_what_is_no_picture(compare_page, broken, tmp_path):
    shown = compare_page
    shown.open()
    shown.upload(broken)
    said = shown.see("#results .problem", "broken.png")
    assert "/tmp" not in said
    shown.screenshot("compare-broken")
    (tmp_path / "notes.png").write_text("no picture at all")
    shown.upload(tmp_path / "notes.png")
    shown.see("#results .problem", "notes.png")
    (tmp_path / "large.png").write_bytes(bytes(21_000_000))
    shown.upload(tmp_path / "large.png")
    shown.see("body", "exceed the maximum allowed size of 20.0 Mb")  # the browser says so, before it sends a byte
    shown.upload(PICTURES["rocket"])
    said = shown.see("#results", "siglip-hf-pictures-64")
    assert said.index("rocket") < said.index("cat")

    shown.write("#template textarea", "no place for the label")
    shown.click("#compare")
    shown.see("#results .problem", "no single '{}'")


def test_multilingual(multilingual_page, broken):
    shown = multilingual_page
    shown.open()
    shown.upload(broken)
    shown.see("#results .problem", "broken.png")
    shown.upload(PICTURES["rocket"])
    said = shown.see("#results", "languages say 'rocket'", "ракета", "로켓")
    assert "10 of 10" in said
    shown.screenshot("multilingual", for_docs=True)
    shown.narrow("multilingual-390")

    shown.write("#labels textarea", "Deutsch: Rakete, Katze\nEnglish: rocket")
    shown.click("#compare")
    shown.see("#results .problem", "'English' and 'Deutsch' have 1 and 2 labels")
    assert_all_from_here(shown)
