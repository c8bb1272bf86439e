"""The page in a real browser: nothing hostile runs, and tables, passages and the film do what they say."""

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesaic.lens import drawing, page, report
from tests.lens.conftest import random_trace, write_run

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip
# Each would set a flag if anything of it ran.
PAYLOADS = (
    "<script>window.pwned=1</script>",
    "</script><img src=x onerror=window.pwned=2>",
    "</title><script>window.pwned=3</script>",
    '"\' onmouseover=window.pwned=4 onfocus=window.pwned=4 autofocus x="',
    "\u2028window.pwned=5//",
    "</style><svg onload=window.pwned=6>",
    "--><script>window.pwned=7</script><!--",
    "javascript:window.pwned=8",
    "';window.pwned=9;'",
    "${window.pwned=10}",
    "&lt;img src=x onerror=window.pwned=11&gt;",
    "</caption></table><script>window.pwned=12</script>",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is tried in a browser by selenium")
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip(f"the page is tried in a browser, and {CHROMIUM} or {DRIVER} is not there")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def trace():
    return random_trace(lean=2.0, num_sequences=30)


@pytest.fixture(scope="module")
def plain(trace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    runs = {"moe": write_run(folder / "moe", trace), "dense": write_run(folder / "dense", trace, dense=True)}
    return without_png(trace, folder / "page.html", runs=runs)


def without_png(trace, out, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "_png", lambda *_: b"no picture")
        return report(trace, out, **options)


@pytest.fixture(scope="module")
def hostile(trace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    texts = list(trace.metadata.token_text)
    for token, text in zip(np.unique(trace.token_id), PAYLOADS * 10, strict=False):
        texts[token] = text
    names = (f"{PAYLOADS[0]}.a", f"{PAYLOADS[3]}.b")
    metadata = replace(
        trace.metadata,
        token_text=tuple(texts),
        domains=PAYLOADS[1:4],
        layer_names=names,
        model=PAYLOADS[1],
        recipe=PAYLOADS[5],
    )
    bad = replace(trace, metadata=metadata)
    other = replace(bad, metadata=replace(metadata, model=PAYLOADS[11]))
    runs = {
        label: write_run(folder / f"run{at}", bad, names=names, domains=PAYLOADS[1:4])
        for at, label in enumerate(PAYLOADS[:3])
    }
    return without_png(
        bad,
        folder / "</script><img src=x onerror=window.pwned=13>.html".replace("/", "∕"),
        runs=runs,
        compare=other,
        title=" ".join(PAYLOADS),
    )


def opened(browser, path, *, width=1280, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(path.as_uri())
    return browser


def run(browser, script, *arguments):
    return browser.execute_script(script, *arguments)


def cells(browser, table, column):
    return run(
        browser,
        "return [...document.querySelectorAll(`.table table`)].find((it) => it.caption.textContent === arguments[0])"
        ".tBodies[0].querySelectorAll(`tr:not([hidden]) > :nth-child(${arguments[1]})`).values()"
        ".map((cell) => cell.textContent).toArray()",
        table,
        column,
    )


def test_nothing_hostile_runs_though_everything_is_used(browser, hostile):
    opened(browser, hostile)
    assert run(browser, "return document.querySelectorAll('.passage span').length") > 50
    # Everything that writes text: point at every token, press every button, choose every option.
    run(
        browser,
        """
        document.querySelectorAll('.passage span, .token').forEach((it) => {
          for (const kind of ['pointerover', 'mouseover', 'click', 'focusin', 'mousemove'])
            it.dispatchEvent(new MouseEvent(kind, { bubbles: true }));
        });
        document.querySelectorAll('button').forEach((it) => it.click());
        document.querySelectorAll('select').forEach((select) =>
          [...select.options].forEach((option) => {
            select.value = option.value;
            select.dispatchEvent(new Event('change', { bubbles: true }));
          }));
        document.querySelectorAll('details').forEach((it) => (it.open = true));
        """,
    )
    # An image that is not there takes a moment to say so.
    time.sleep(0.3)
    assert run(browser, "return window.pwned") is None
    assert run(browser, "return document.querySelectorAll('script').length") == 2
    assert run(browser, "return document.querySelectorAll('img, iframe, object, embed, link, base, form').length") == 0
    names = run(browser, "return [...document.querySelectorAll('*')].flatMap((it) => it.getAttributeNames())")
    assert [name for name in names if name.startswith("on")] == []
    assert run(browser, "return document.title").startswith("<script>window.pwned=1</script>")
    complaints = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert complaints == []


def test_the_flag_would_be_set_if_a_payload_ran_so_the_test_above_can_fail(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(f"<!DOCTYPE html><title>x</title>{PAYLOADS[1]}<script></script>")
    opened(browser, bad)
    time.sleep(0.3)
    assert run(browser, "return window.pwned") == 2


def test_the_policy_stops_a_script_that_is_not_the_pages_own(browser, plain):
    opened(browser, plain)
    run(
        browser,
        "const it = document.createElement('script'); it.textContent = 'window.pwned = 20'; document.body.append(it);"
        "const image = document.createElement('div'); image.innerHTML = '<img src=x onerror=\"window.pwned = 21\">';"
        "document.body.append(image);",
    )
    time.sleep(0.3)
    assert run(browser, "return window.pwned") is None
    assert any("Content Security Policy" in line["message"] for line in browser.get_log("browser"))
    assert "script-src" in page._asset("page.html")


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_never_scrolls_sideways(browser, plain, hostile, width):
    for path in (plain, hostile):
        opened(browser, path, width=width)
        run(browser, "document.querySelectorAll('details').forEach((it) => (it.open = true))")
        assert run(browser, "return document.documentElement.scrollWidth") <= width


def test_a_heading_sorts_its_table_up_and_down(browser, plain):
    opened(browser, plain)
    title = "Which expert takes a token first"
    head = "return [...document.querySelectorAll('#lookup thead th')][arguments[0]]"
    run(browser, f"{head.replace('return ', 'const it = ')}; it.querySelector('button').click()", 2)
    count = [int(cell.replace(",", "")) for cell in cells(browser, title, 3)]
    assert count == sorted(count, reverse=True)
    assert len(set(count)) > 3
    assert run(browser, f"{head}.getAttribute('aria-sort')", 2) == "descending"
    run(browser, f"{head.replace('return ', 'const it = ')}; it.querySelector('button').click()", 2)
    assert [int(cell.replace(",", "")) for cell in cells(browser, title, 3)] == sorted(count)
    run(browser, f"{head.replace('return ', 'const it = ')}; it.querySelector('button').click()", 0)
    assert run(browser, f"{head}.getAttribute('aria-sort')", 0) == "ascending"
    assert run(browser, f"{head}.getAttribute('aria-sort')", 2) is None


def test_a_filter_and_a_choice_of_layer_leave_the_rows_that_fit(browser, plain):
    opened(browser, plain)
    title = "Which expert takes a token first"
    before = len(cells(browser, title, 1))
    run(
        browser,
        "const it = document.querySelector('#lookup select'); it.value = '1'; it.dispatchEvent(new Event('change'))",
    )
    assert set(cells(browser, title, 2)) == {"layer 1"}
    assert 0 < len(cells(browser, title, 1)) < before
    run(
        browser,
        "const it = document.querySelector('#lookup input'); it.value = '␣'; it.dispatchEvent(new Event('input'))",
    )
    assert cells(browser, title, 1) == ["␣"]
    assert run(browser, "return document.querySelector('#lookup output').textContent") == f"1 of {before}"


def test_a_layer_recolours_the_passages_with_what_the_trace_says(browser, plain, trace):
    opened(browser, plain)
    for layer in (0, 1):
        run(browser, "document.querySelectorAll('.picker button')[arguments[0]].click()", layer)
        colours = run(
            browser, "return [...document.querySelectorAll('.passage')[0].children].map((it) => it.className)"
        )
        first = trace.where((trace.layer == layer) & (trace.choice == 0) & (trace.sequence == 0))
        assert colours == [f"e{expert}" for expert in first.expert[np.argsort(first.position)]]
        assert run(browser, "return document.querySelectorAll('.picker [aria-pressed=true]').length") == 1
        assert run(browser, "return document.querySelector('.layer').textContent") == f"layer {layer}"


def test_one_expert_is_singled_out_by_any_of_a_tokens_choices(browser, plain, trace):
    opened(browser, plain)
    run(browser, "document.querySelectorAll('.legend button')[2].click()")
    colours = run(browser, "return [...document.querySelectorAll('.passage')[0].children].map((it) => it.className)")
    rows = trace.where((trace.layer == 1) & (trace.sequence == 0))
    taken = set(rows.position[rows.expert == 2].tolist())
    assert colours == ["e2" if position in taken else "" for position in range(len(colours))]
    run(browser, "document.querySelectorAll('.legend button')[2].click()")
    assert "" not in run(browser, "return [...document.querySelectorAll('.passage span')].map((it) => it.className)")


def test_the_keyboard_steps_from_token_to_token_and_hears_their_experts(browser, plain):
    from selenium.webdriver.common.keys import Keys

    opened(browser, plain)
    assert run(browser, "return document.querySelectorAll('.passage [tabindex=\"0\"]').length") == 3
    first = browser.find_element("css selector", ".passage span")
    run(browser, "arguments[0].focus()", first)
    for _ in range(3):
        browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    fourth = browser.find_elements("css selector", ".passage span")[3]
    assert browser.switch_to.active_element == fourth
    told = browser.find_element("css selector", ".reading")
    assert re.fullmatch(r"“.+” · layer 1: expert \d \(weight 0\.50\), expert \d \(weight 0\.50\)", told.text)
    assert told.get_attribute("aria-live") == "polite"
    assert run(browser, "return getComputedStyle(arguments[0]).outlineStyle", fourth) == "solid"
    browser.switch_to.active_element.send_keys(Keys.HOME)
    assert browser.switch_to.active_element == first


def test_the_film_shows_the_loads_of_the_step_that_it_is_pulled_to(browser, plain):
    opened(browser, plain)
    assert run(browser, "return document.querySelector('.film').hidden") is False
    run(browser, "const it = document.querySelector('.when'); it.value = 0; it.dispatchEvent(new Event('input'))")
    assert run(browser, "return document.querySelector('.now').textContent").startswith("step 1 · loss ")
    heights = run(browser, "return [...document.querySelectorAll('.stage i')].map((it) => it.style.height)")
    # Even loads, and the frame is twice as high as even.
    assert heights == ["50%"] * 8
    assert run(browser, "return document.querySelector('.stage').getAttribute('aria-label')").startswith("layer 0 · ")
    run(browser, "document.querySelector('.play').click()")
    assert run(browser, "return document.querySelector('.play').textContent") == "Pause"
    run(browser, "document.querySelector('.play').click()")
    assert run(browser, "return document.querySelector('.play').textContent") == "Play"


def test_dark_and_light_differ_in_paper_and_ink(browser, plain):
    seen = {}
    for scheme in ("light", "dark"):
        opened(browser, plain, scheme=scheme)
        style = "const it = getComputedStyle(document.body); return [it.backgroundColor, it.color]"
        seen[scheme] = run(browser, style)
    assert seen["light"][0] == "rgb(255, 255, 254)"
    assert seen["dark"][0] == "rgb(22, 25, 29)"
    assert seen["light"][1] != seen["dark"][1]


def test_the_page_works_without_its_script(browser, plain):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(browser, plain)
        assert "layer 1: expert" in browser.find_element("css selector", ".passage span").get_attribute("title")
        assert not browser.find_element("css selector", ".film").is_displayed()
        assert browser.find_element("css selector", "#lookup table").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
