"""The page in a real browser; skipped where neither Chromium nor its driver is installed."""

import shutil

import pytest

from gmsop_jax.analysis.report import build_report

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                     "disable-background-networking", "disable-component-update",
                     f"user-data-dir={tmp_path_factory.mktemp('profile')}"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(trained_run, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(build_report([trained_run], max_images=100), "utf-8")
    return file.as_uri()


def _open(browser, address, width=1280, scheme="light", scripts=True):
    from selenium.webdriver.support.wait import WebDriverWait

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)
    if scripts:
        drawn = (
            "return document.querySelectorAll('.vega-embed svg').length == document.querySelectorAll('.chart').length"
        )
        WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(drawn))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_and_has_no_console_message(browser, address, width, scheme):
    _open(browser, address, width, scheme)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth && innerWidth") == width
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 27)")


def test_tables_sort(browser, address):
    _open(browser, address)
    column = (
        "return [...document.querySelectorAll('.candidates tbody tr')].map(r => parseFloat(r.cells[2].textContent))"
    )
    before = browser.execute_script(column)
    browser.execute_script("document.querySelectorAll('.candidates thead th')[2].click()")
    assert browser.execute_script(column) == sorted(before, reverse=True)
    browser.execute_script("document.querySelectorAll('.candidates thead th')[2].click()")
    assert browser.execute_script(column) == sorted(before)


def test_images_filter(browser, address):
    from selenium.webdriver.support.select import Select

    _open(browser, address)
    choice = Select(browser.find_element("css selector", "select[data-key=class]"))
    wanted = choice.options[1].text
    choice.select_by_index(1)
    shown = "return [...document.querySelectorAll('.card:not([hidden])')].map(c => c.dataset.class)"
    assert set(browser.execute_script(shown)) == {wanted}


def test_page_can_be_read_without_scripts(browser, address):
    _open(browser, address, scripts=False)
    charts = browser.find_elements("css selector", ".chart svg")
    assert len(charts) >= 8
    assert all(chart.size["width"] > 300 for chart in charts)
    assert browser.find_elements("css selector", ".filter") == []
    assert browser.find_element("css selector", ".facts").text.startswith("network")
