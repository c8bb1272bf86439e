"""The page in a real browser: what a reader sees, reaches by keyboard, and is read aloud."""

import re

import pytest

from moesaic.serve import Settings, running
from tests.serve.browser import chromium
from tests.serve.conftest import HOSTILE, make

NOW = "#now-text > span"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def page(browser, url):
    browser.get(url)
    wait(browser, lambda: all_of(browser, "#layers input"))
    yield Page(browser)
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def wait(browser, condition, timeout_s=20):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, timeout_s, poll_frequency=0.05).until(lambda _: condition())


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


class Page:
    def __init__(self, browser):
        self.browser = browser

    def one(self, selector):
        return self.browser.find_element("css selector", selector)

    def text(self, selector):
        return self.one(selector).text

    def run(self, script):
        return self.browser.execute_script(f"return {script}")

    def fill(self, selector, value):
        element = self.one(selector)
        element.clear()
        element.send_keys(str(value))

    def write(self, prompt, tokens=10):
        """Ask for an answer, and wait until it is there."""
        self.run(f"void (document.getElementById('prompt').value = {prompt!r})")
        self.fill("#max-tokens", tokens)
        self.one("#write").click()
        self.ready()

    def ready(self):
        wait(self.browser, lambda: self.one("#write").is_enabled() and "Answer ready" in self.said())

    def said(self):
        return self.run("document.getElementById('said').textContent")

    def tokens(self, selector=NOW):
        """Text, class and spoken label of each token."""
        script = "[...document.querySelectorAll(%r)].map(e => [e.textContent, e.className, e.ariaLabel])"
        return self.run(script % selector)

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()


def test_an_answer_streams_and_each_token_has_the_colour_of_its_first_expert(page):
    page.write("It is a truth", 12)
    tokens = page.tokens()
    # A token that begins the text, 13 letters and 12 new tokens.
    assert len(tokens) == 26
    assert "".join(text for text, _, _ in tokens[1:14]) == "It is a truth"
    experts = [re.search(r"\be(\d+)\b", name)[1] for _, name, _ in tokens]
    assert [re.search(r"expert (\d+) \(weight 0\.\d\d\)", label)[1] for _, _, label in tokens] == experts
    colours = page.run(f"[...document.querySelectorAll('{NOW}')].map(e => getComputedStyle(e).backgroundColor)")
    assert {len({c for c, e in zip(colours, experts, strict=True) if e == one}) for one in set(experts)} == {1}
    assert len(set(colours)) == len(set(experts)) > 1
    assert "12 tokens, its limit." in page.text("#now-note")


def test_another_layer_gives_other_colours_and_is_picked_by_keyboard(page):
    from selenium.webdriver import Keys

    page.write("It is a truth")
    last = page.tokens()
    layers = all_of(page.browser, "#layers input")
    assert [layer.is_selected() for layer in layers] == [False, True]
    layers[1].send_keys(Keys.ARROW_LEFT)
    assert [layer.is_selected() for layer in layers] == [True, False]
    first = page.tokens()
    assert [text for text, _, _ in first] == [text for text, _, _ in last]
    assert [name for _, name, _ in first] != [name for _, name, _ in last]


def test_tokens_are_walked_through_by_keyboard_and_tell_their_experts(page):
    from selenium.webdriver import Keys

    page.write("It is")
    page.run("document.querySelector('#now-text [tabindex=\"0\"]').focus()")
    page.press(Keys.ARROW_RIGHT)
    assert page.run("document.activeElement.textContent") == "I"
    assert re.fullmatch(
        r"“I” · layer 1: expert \d \(weight 0\.\d\d\), expert \d \(weight 0\.\d\d\)", page.text("#reading")
    )
    assert page.run("document.activeElement.ariaSelected") == "true"
    page.press(Keys.END)
    assert page.run("document.activeElement === document.querySelector('#now-text').lastElementChild")
    page.press(Keys.HOME)
    assert page.run("document.activeElement === document.querySelector('#now-text').firstElementChild")
    assert len(all_of(page.browser, '#now-text [tabindex="0"]')) == 1


def test_pointing_at_a_token_tells_its_experts(page):
    from selenium.webdriver import ActionChains

    page.write("It is")
    ActionChains(page.browser).move_to_element(all_of(page.browser, NOW)[1]).perform()
    assert page.text("#reading").startswith("“I” · layer 1: expert ")


def test_an_expert_tells_its_tokens_is_switched_off_and_the_text_changes_beside_the_former(page):
    page.write("aaaa bbbb aaaa bbbb cccc aaaa bbbb cccc", 16)
    before = page.tokens()
    busiest = max(range(4), key=lambda expert: sum(f"expert {expert} " in label for _, _, label in before))
    button = all_of(page.browser, "#experts button")[busiest]
    assert "% of choices" in button.text
    button.click()
    wait(page.browser, lambda: page.one("#about").is_displayed())
    assert page.text("#about-title") == f"Expert {busiest} of layer 1"
    assert "of this layer's choices since the service began; an even share is 25 %" in page.text("#about-load")
    assert re.search(
        r"Told of [\d,]+ choices in this layer, all of them seen while serving\.", page.text("#about-note")
    )
    page.run("void (document.getElementById('said').textContent = '')")
    page.one("#switch").click()
    wait(page.browser, lambda: "Without" in page.text("#now-note"))
    page.ready()
    after = page.tokens()
    assert [text for text, _, _ in page.tokens("#former-text > span")] == [text for text, _, _ in before]
    assert not any(f"expert {busiest} " in label for _, _, label in after)
    assert [text for text, _, _ in after] != [text for text, _, _ in before]
    assert f"Without expert {busiest} of layer 1." in page.text("#now-note")
    assert re.search(r"The first \d+ tokens are those of the answer before; there it parts\.", page.text("#now-note"))
    assert [len(all_of(page.browser, f"#{side}-text .parts")) for side in ("now", "former")] == [1, 1]
    assert "switched off" in all_of(page.browser, "#experts button")[busiest].text
    assert page.text("#off-note") == f"Switched off: expert {busiest} of layer 1."
    # And on again: the first text comes back.
    page.run("void (document.getElementById('said').textContent = '')")
    page.one("#switch").click()
    wait(page.browser, lambda: "Without" not in page.text("#now-note"))
    page.ready()
    assert [text for text, _, _ in page.tokens()] == [text for text, _, _ in before]


def test_an_expert_shows_its_favourite_tokens(page):
    page.write("ab" * 60, 4)
    shown = []
    for expert in range(4):
        all_of(page.browser, "#experts button")[expert].click()
        wait(page.browser, lambda expert=expert: page.text("#about-title").startswith(f"Expert {expert} "))
        shown += [one.text for one in all_of(page.browser, "#favourites .token")]
    assert any(re.fullmatch(r"[ab]\s+× \d+\.\d · n \d+", one) for one in shown), shown


def test_more_experts_off_than_can_be_is_told_in_a_sentence(page):
    page.write("It is", 4)
    for expert in (0, 1, 2):
        page.run("void (document.getElementById('said').textContent = '')")
        all_of(page.browser, "#experts button")[expert].click()
        wait(page.browser, lambda expert=expert: page.text("#about-title").startswith(f"Expert {expert} "))
        page.one("#switch").click()
        wait(page.browser, lambda: page.text("#fault") or "Answer ready" in page.said())
    wait(page.browser, lambda: page.text("#fault"))
    assert page.text("#fault").endswith(".")
    assert page.one("#fault").get_attribute("role") == "alert"
    # The browser itself notes that the service answered with 400.
    page.browser.get_log("browser")


def test_markup_in_a_text_or_a_token_is_shown_and_never_run(page):
    page.write("".join(HOSTILE), 10)
    assert page.run("typeof window.hacked") == "undefined"
    shown = [text for text, _, _ in page.tokens()]
    assert HOSTILE[0] in shown
    assert HOSTILE[1] in shown
    assert r"\u{202e}gnp.exe" in shown
    assert all_of(page.browser, "#now img") == all_of(page.browser, "#now script") == []
    page.run("document.querySelectorAll('#experts button')[0].click()")
    wait(page.browser, lambda: page.one("#about").is_displayed())
    assert page.run("typeof window.hacked") == "undefined"


def test_a_hostile_name_of_a_model_is_text(browser):
    hostile = make()
    object.__setattr__(hostile, "name", "</title><script>window.hacked=1</script>")
    with running(hostile, Settings(port=0)) as address:
        browser.get(address)
        wait(browser, lambda: all_of(browser, "#layers input"))
        assert browser.execute_script("return typeof window.hacked") == "undefined"
        assert "<script>" in browser.find_element("css selector", "#kicker").text
        assert browser.title.startswith("</title><script>")


def test_everything_that_can_be_used_has_a_name_that_is_read_aloud(page):
    page.write("It is", 4)
    unnamed = page.run(
        """[...document.querySelectorAll('input, textarea, button, [role=option], [role=listbox], fieldset, section')]
        .filter(e => e.offsetParent && !(
            e.ariaLabel || e.labels?.length || e.textContent.trim() && e.matches('button') ||
            document.getElementById(e.getAttribute('aria-labelledby') ?? '')?.textContent ||
            e.querySelector(':scope > legend')?.textContent
        )).map(e => e.outerHTML)"""
    )
    assert unnamed == []
    assert page.run("document.documentElement.lang") == "en"
    assert page.one("#said").get_attribute("aria-live") == "polite"
    assert re.search(r"Answer ready: 4 tokens, its limit\.", page.said())


def test_the_whole_page_is_worked_by_keyboard_alone(page):
    from selenium.webdriver import ActionChains, Keys

    page.run("document.getElementById('prompt').focus()")
    ActionChains(page.browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.ready()
    reached = []
    for _ in range(40):
        page.press(Keys.TAB)
        reached.append(page.run("document.activeElement.id || document.activeElement.closest('[id]')?.id"))
    for place in ("max-tokens", "temperature", "seed", "write", "layers", "now-text", "experts"):
        assert place in reached, place


def test_an_answer_can_be_stopped(page):
    page.fill("#max-tokens", 200)
    page.one("#write").click()
    wait(page.browser, lambda: len(all_of(page.browser, NOW)) > 20)
    page.one("#stop").click()
    wait(page.browser, lambda: page.one("#write").is_enabled())
    assert "stopped by you" in page.text("#now-note")


def test_as_a_chat_the_text_goes_through_the_template(page):
    page.one("#chat").click()
    page.write("Hello", 3)
    assert "".join(text for text, name, _ in page.tokens() if "given" in name) == "user: Hello⏎\nassistant:"


def test_numbers_beside_the_tokens_stand_in_for_colours(page):
    page.write("It is", 3)
    page.one("#numbers").click()
    found = page.run(
        f"[...document.querySelectorAll('{NOW}')].map(e => [e.dataset.e, getComputedStyle(e, '::after').content])"
    )
    assert all(content not in ("none", "normal") for _, content in found)
    assert all(number.isdigit() for number, _ in found)


def test_a_service_with_a_key_asks_for_it(browser):
    with running(make(), Settings(port=0, api_key="open sesame")) as address:
        browser.get(address)
        page = Page(browser)
        wait(browser, lambda: page.one("#key").is_displayed())
        wait(browser, lambda: "needs its API key" in page.text("#fault"))
        page.one("#key").send_keys("open sesame")
        page.write("It is", 3)
        assert len(page.tokens()) == 9
        assert page.text("#fault") == ""
        browser.get_log("browser")


@pytest.mark.parametrize(("size", "dark"), [((390, 844), False), ((390, 844), True), ((1200, 900), True)], ids=str)
def test_it_fits_a_phone_and_follows_the_readers_light(url, tmp_path, size, dark):
    with chromium(tmp_path / "profile", size=size, dark=dark) as opened:
        opened.get(url)
        wait(opened, lambda: all_of(opened, "#layers input"))
        page = Page(opened)
        page.write("It is a truth universally acknowledged", 20)
        assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        paper = page.run("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(22, 25, 29)" if dark else "rgb(255, 255, 254)")
