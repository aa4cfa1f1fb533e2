"""The documentation in a real browser, as wide as a laptop and as a telephone: no page scrolls sideways."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs_site import build

pytestmark = pytest.mark.browser

# Width of the page, that of its contents, and the pictures that did not load.
LOOK = """
const pictures = [...document.images].filter(picture => picture.loading != "lazy" && !picture.naturalWidth);
return [innerWidth, document.documentElement.scrollWidth, pictures.map(picture => picture.src)];
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("width", [1366, 390])
def test_no_page_scrolls_sideways(driver, site, width):
    pages = sorted(site.rglob("index.html"))
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 1000}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        wrong = []
        for page in pages:
            driver.get(page.as_uri())
            seen, needed, broken = driver.execute_script(LOOK)
            if seen != width or needed > width or broken:
                wrong.append((str(page.parent.relative_to(site)), seen, needed, broken))
        assert wrong == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert len(pages) > 60
