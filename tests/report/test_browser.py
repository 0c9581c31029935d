"""The report page in a real browser: headless Chromium, driven by Selenium. Skipped where Chromium is not installed."""

from typing import Any

import pytest

from lorabench.store.layout import Layout

from ..handmade import make_eval, make_sweep
from .conftest import EVALUATION, at_twice_the_margins, hostile_report

pytestmark = pytest.mark.slow

WIDE, PHONE, A4 = 1280, 390, 794


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Make runs of two datasets and two experiments, with LoRA and full fine-tuning; a few of them diverged."""
    rows = [row for rank in (None, 1, 16) for row in make_sweep(rank)]
    for rank in (None, 16):
        rows += make_sweep(rank, dataset="worked", experiments=["batch_size", "rank"])
    return rows


@pytest.fixture
def page(browser, report, rows):
    """Return a function that opens the page of these runs."""
    report(rows, [make_eval("base", 0.2), make_eval(16, 0.5)], evaluation=EVALUATION)
    return lambda **how: show(browser, **how)


def show(browser, width: int = WIDE, fragment: str = "", media: str = "screen", opened: bool = True) -> None:
    """Open the page, and all that is closed on it."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
    browser.get("about:blank")
    browser.get(Layout.of("mine.yaml").report.absolute().as_uri() + fragment)
    if opened:
        browser.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")


def visible(browser: Any) -> list[str]:
    """Return the ids of the runs that the table shows, in its order."""
    script = "return [...document.querySelectorAll('#all-runs tr:not([hidden])')].map((row) => row.dataset.run)"
    return browser.execute_script(script)


def choose(browser: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("name", name)).select_by_visible_text(value)


def curves(browser: Any) -> int:
    return len(browser.find_elements("css selector", "#chart .curve"))


@pytest.mark.parametrize(("width", "media"), [(PHONE, "screen"), (A4, "print")])
def test_the_page_does_not_scroll_sideways_and_there_is_nothing_to_complain_about(browser, page, width, media):
    page(width=width, media=media)
    across, shown = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert shown == width
    assert across <= width
    assert browser.get_log("browser") == []
    images = browser.execute_script("return [...document.images].map((e) => e.complete && e.naturalWidth > 0)")
    assert images
    assert all(images)


def test_text_from_tables_runs_nothing(browser, report):
    hostile_report(report)
    show(browser)
    choose(browser, "experiments", "rank")
    browser.find_element("css selector", ".claim button").click()
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('x-evil').length") == 0
    assert browser.get_log("browser") == []
    assert curves(browser) > 0


def test_tables_sort_by_value_with_what_is_missing_last_and_are_filtered_by_each_field(browser, page, rows):
    page()
    browser.find_element("id", "clear").click()
    header = browser.find_element("xpath", "//section[@aria-labelledby='runs']//th[contains(., 'Test NLL')]")
    by_id = {row["run_id"]: row["final_test_nll"] for row in rows}
    for direction in ("ascending", "descending"):
        header.find_element("tag name", "button").click()
        assert header.get_attribute("aria-sort") == direction
        losses = [by_id[run] for run in visible(browser)]
        done = [round(loss, 4) for loss in losses if loss is not None]
        assert done == sorted(done, reverse=direction == "descending")
        assert all(loss is None for loss in losses[len(done) :])
        assert len(done) < len(losses) == len(rows)
    assert "can't be compared" in browser.find_element("id", "matching").text
    left = rows
    experiments = ["batch_size", "rank"]
    for name, shown, value in (("experiments", "batch_size", experiments), ("rank", "16", 16), ("lr", "3e-2", 0.03)):
        choose(browser, name, shown)
        left = [row for row in left if row[name] == value]
        assert sorted(visible(browser)) == sorted(row["run_id"] for row in left)
    assert len(left) == 1


def test_a_claim_and_a_link_lead_to_their_runs(browser, page, rows):
    page()
    hidden = rows[25]["run_id"]
    assert hidden not in visible(browser)
    claim = browser.find_element("id", "claim-A7")
    links = "return [...arguments[0].querySelectorAll('a[href^=\"#run-\"]')].map((e) => e.hash)"
    behind = browser.execute_script(links, claim)
    claim.find_element("tag name", "button").click()
    assert {f"#run-{run}" for run in visible(browser)} == set(behind)
    assert curves(browser) == len(behind) > 5
    page(fragment=f"#run-{hidden}", opened=False)
    assert hidden in visible(browser)
    assert browser.find_element("id", f"run-{hidden}").is_displayed()
    criterion = browser.find_element("css selector", "#claim-A7 dl")
    assert not criterion.is_displayed()
    browser.execute_script("location.hash = '#claim-A7'")
    assert criterion.is_displayed()
    # Paper has all that is closed.
    page(media="print", opened=False)
    parts = "document.querySelectorAll('#claim-A7 dl, #cost ~ *, details table')"
    assert browser.execute_script(f"return [...{parts}].filter((e) => !e.offsetHeight)") == []


def test_the_margin_is_moved(browser, report, rows):
    report(rows, by_margin=at_twice_the_margins)
    show(browser, width=PHONE)
    said = browser.find_element("id", "at-margin")
    assert said.text.startswith("1 ")
    move = "margin.value = 1; margin.dispatchEvent(new Event('input'))"
    browser.execute_script(f"const margin = document.querySelector('#margin input'); {move}")
    claims = browser.find_elements("css selector", "[data-claim]")
    turned = ", ".join(claim.get_attribute("data-claim") for claim in claims)
    assert said.text.startswith("2 ")
    assert said.text.endswith(f": {turned} would be confirmed")
    assert browser.execute_script("return document.documentElement.scrollWidth") == PHONE
    assert browser.get_log("browser") == []
