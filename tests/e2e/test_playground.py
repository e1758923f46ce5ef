"""The playground in a real browser: headless Chromium against a real server."""

import base64
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from server.app import attach, create_app
from server.cli import listen
from server.settings import ServeSettings
from tests.e2e.conftest import ServerProcess
from tests.server.conftest import END_ID, FakeEngine
from trm import bundled_model_path
from trm.chat import solve_messages
from trm.checkpoint import read_config
from trm.config import TRMConfig
from trm.engine.hosted import Hosted
from trm.engine.request import Event, Usage
from trm.errors import DeviceError

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WAIT_S = 120
TOM = "Tom has 12 apples. He buys 7 more and gives 5 to Anna. How many apples does he have left?"
TRAINED = read_config(bundled_model_path()).n_supervision

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: deploy/debian-packages.txt"),
]


class Page:
    """The playground in a browser, by what a person sees of it."""

    def __init__(self, driver: webdriver.Chrome, pictures: Path) -> None:
        self.driver = driver
        self.pictures = pictures
        self.expected_errors = ""  # of the console, as a pattern

    def open(self, server: ServerProcess | SimpleNamespace) -> "Page":
        self.driver.get(f"{server.url}/")
        self.driver.execute_script("sessionStorage.clear()")
        self.driver.refresh()
        return self

    def open_ready(self, server: ServerProcess | SimpleNamespace, work: str = "full") -> "Page":
        """With this choice of how much work a reply shows."""
        self.open(server)
        self.wait(lambda: self["effort"].is_enabled())
        self.work(work).click()
        return self

    def work(self, choice: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, f"#work [value={choice}]")

    def __getitem__(self, id_: str) -> WebElement:
        return self.driver.find_element(By.ID, id_)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self.driver, WAIT_S, poll_frequency=0.05).until(lambda _: condition())

    def write(self, question: str, *keys: str) -> None:
        self["question"].clear()
        self["question"].send_keys(question, *keys)

    def ask(self, question: str) -> None:
        self.write(question, Keys.ENTER)
        self.wait_for_answer()

    def wait_for_answer(self) -> None:
        self.wait(lambda: not self["stop"].is_displayed() and self["reply"].is_displayed())

    def vote(self) -> None:
        """To its end: until then every vote draws all bars anew, under whoever reads them."""
        self["vote"].click()
        self.wait(lambda: not self["stop"].is_displayed() and self.all("#bars li"))

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    @property
    def selected(self) -> int:
        """Which token is selected; exactly one is."""
        (index,) = [i for i, token in enumerate(self.tokens()) if token.get_attribute("aria-selected") == "true"]
        return index

    def tokens(self) -> list[WebElement]:
        return self.all("#tokens [role=option]")

    def says(self) -> list[str]:
        """What each step says, as it is read aloud or seen."""
        return [card.get_attribute("textContent") or "" for card in self.all("#says-steps li")]

    def heat(self) -> list[list[str]]:
        """The table under the reply, row by row."""
        return [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in self.all("#heat tr")]

    def emulate(self, command: str, **settings: Any) -> None:
        self.driver.execute_cdp_cmd(command, settings)

    def resize(self, width: int, height: int) -> None:
        self.emulate(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def prefer(self, **features: str) -> None:
        chosen = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.emulate("Emulation.setEmulatedMedia", features=chosen)

    def picture(self, name: str) -> None:
        """The whole page, for people to look at."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        (self.pictures / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return int(self.driver.execute_script(script))

    def brightness(self) -> float:
        """Of the page's background, 0 to 1."""
        colour = self.driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 / 255


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)  # no sandbox: tests may run as root
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, tmp_path: Path) -> Iterator[Page]:
    """A page that must not put an error on the console, be it a script's or the security policy's."""
    page = Page(driver, tmp_path)
    page.resize(1000, 1100)
    page.prefer(prefers_color_scheme="light", prefers_reduced_motion="no-preference")
    driver.get_log("browser")
    yield page
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert [error for error in errors if not (page.expected_errors and re.search(page.expected_errors, error))] == []


@pytest.fixture(scope="module")
def locked(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    return start_server("--api-key", "sesame", "--public-paths", "/", "/playground/*")


def test_it_opens_on_an_answer_at_once_and_one_sees_what_each_step_says(page: Page, server: ServerProcess) -> None:
    page.open(server)
    page.wait(lambda: page["effort"].is_enabled())
    assert "qwen-trm" in page["model"].text
    assert page["effort-words"].text == f"{TRAINED} steps a token, as trained"
    assert page.work("none").is_selected()
    assert page["question"].get_attribute("value") == TOM

    page["ask"].click()
    page.wait_for_answer()

    assert page["answer"].text == "14"
    assert "".join(token.text for token in page.tokens()) == r"\boxed{14}"
    assert re.fullmatch(rf"5 tokens, {TRAINED}\.0 steps each, [\d.]+\ss", page["summary"].text)
    backbone, first, second, *rest = page.says()
    assert backbone.startswith("backbone: ")
    assert first == "step 1: 19 ✓, right: 12+7=19"
    assert second == "step 2, the answer: 14 ✓, right: 19-5=14"
    assert rest == [f"steps 3 to {TRAINED}: 14 ✓, right: still 14"]
    page.picture("light")


def test_one_sees_where_the_recursion_changed_its_mind(page: Page, server: ServerProcess) -> None:
    page.open(server)
    page.wait(lambda: page["effort"].is_enabled())
    page.ask(TOM)

    changed = page.all("#tokens .changed")
    number = [token.text for token in page.tokens()].index(changed[0].text)
    wanted = changed[0].get_attribute("title").removeprefix("the backbone said ")
    assert f"{len(changed)} of 5 tokens" in page["changes"].text
    assert page.selected == number, "the page opens where something changed"
    token = re.escape(changed[0].text)
    assert re.fullmatch(
        rf"The backbone said {re.escape(wanted)}; step \d changed it to “{token}”\.", page["story"].text
    )
    header, said, *_ = page.heat()
    assert header == ["step", *map(str, range(TRAINED + 1))]
    assert said[0] == changed[0].text
    assert (said[1].endswith("leads"), said[-1].endswith("leads")) == (False, True)


def test_tokens_are_walked_through_by_keyboard(page: Page, server: ServerProcess) -> None:
    page.open_ready(server)
    page.ask(TOM)

    while page.driver.switch_to.active_element.get_attribute("role") != "option":
        page.press(Keys.TAB)
    visited = []
    for key in (Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.HOME, Keys.ARROW_LEFT):
        page.press(key)
        visited.append(page.selected)
    for key in (Keys.END, Keys.ARROW_RIGHT, Keys.ARROW_LEFT):
        page.press(key)
        visited.append(page.selected)

    assert visited == [0, 1, 2, 1, 0, 0, 20, 20, 19]
    page.press(Keys.END)
    assert page["steps-title"].text == "Token 21: }"
    assert page["story"].text == f"The backbone said “}}”, and all {TRAINED} steps agreed."
    assert page.driver.switch_to.active_element == page.tokens()[20]
    assert page.tokens()[20].value_of_css_property("outline-style") == "solid"
    page.tokens()[7].click()
    assert page["steps-title"].text == "Token 8: ⏎"


def test_up_and_down_go_to_the_next_token_that_changed(page: Page, server: ServerProcess) -> None:
    page.open_ready(server, "none")
    page.ask(TOM)
    while page.driver.switch_to.active_element.get_attribute("role") != "option":
        page.press(Keys.TAB)
    changed = [number for number, token in enumerate(page.tokens()) if "changed" in token.get_attribute("class")]
    assert changed

    page.press(Keys.HOME)
    down = [page.selected] if page.selected in changed else []
    for _ in changed[len(down) :]:
        page.press(Keys.ARROW_DOWN)
        down.append(page.selected)
    page.press(Keys.ARROW_DOWN)
    assert page.selected == changed[-1], "there is no further one"
    up = [page.selected]
    for _ in changed[1:]:
        page.press(Keys.ARROW_UP)
        up.append(page.selected)
    assert (down, up) == (changed, changed[::-1])


def test_the_effort_is_chosen_by_keyboard(page: Page, server: ServerProcess) -> None:
    page.open_ready(server, "none")
    page["effort"].send_keys(Keys.HOME)
    assert page["effort-words"].text == "0 steps a token, the backbone alone"
    page.ask(TOM)

    assert "0.0 steps each" in page["summary"].text
    assert page.heat()[0] == ["step", "0"]
    assert "the recursion was not asked" in page["story"].text
    assert page["answer"].text != "14"

    page["effort"].send_keys(*[Keys.ARROW_RIGHT] * (TRAINED + 2))
    assert page["effort-words"].text == f"{TRAINED + 2} steps a token, beyond training"
    page.ask(TOM)

    assert page.heat()[0] == ["step", *map(str, range(TRAINED + 3))]
    assert [header.text for header in page.all("#heat .beyond")] == [str(TRAINED + 1), str(TRAINED + 2)]


def test_an_example_is_a_click(page: Page, server: ServerProcess) -> None:
    page.open_ready(server)

    page.all("#examples button")[0].click()
    page.wait_for_answer()

    assert page["question"].get_attribute("value") == TOM
    assert page["answer"].text == "14"


def test_a_vote_is_bars(page: Page, server: ServerProcess) -> None:
    page.open_ready(server)
    page.write(TOM)
    page["samples"].clear()
    page["samples"].send_keys("12")

    page.vote()

    bars = {
        bar.find_element(By.CLASS_NAME, "said").text: int(bar.find_element(By.CLASS_NAME, "count").text.split()[0])
        for bar in page.all("#bars li")
    }
    assert sum(bars.values()) == 12
    winner = page.all("#bars .winner .said")[0].text
    assert page["verdict"].text == f"{winner} has {bars[winner]} of 12 votes."
    assert bars[winner] == max(count for answer, count in bars.items() if answer != "no answer")
    track, fill = page.all("#bars .winner .track")[0], page.all("#bars .winner .fill")[0]
    assert fill.size["width"] / track.size["width"] == pytest.approx(bars[winner] / 12, abs=0.02)
    page.picture("vote")


def test_a_reply_can_be_stopped(page: Page, server: ServerProcess) -> None:
    """The server sleeps meanwhile, so that the reply cannot be over before it is stopped."""
    page.open_ready(server)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        page.write(TOM, Keys.ENTER)
        page.wait(lambda: page["stop"].is_displayed())
        page.press(Keys.ESCAPE)
        page.wait(lambda: not page["stop"].is_displayed())
        page["vote"].click()
        page.wait(lambda: page["stop"].is_displayed())
        page["stop"].click()
        page.wait(lambda: not page["stop"].is_displayed())
    finally:
        os.kill(server.process.pid, signal.SIGCONT)

    assert not page["problem"].is_displayed(), "to stop is no failure"
    assert not page["reply"].is_displayed()
    page.ask(TOM)
    assert page["answer"].text == "14"


def test_a_new_question_replaces_the_one_before_it(page: Page, server: ServerProcess) -> None:
    page.open_ready(server)
    apples, stickers, *_ = page.all("#examples button")

    page.driver.execute_script("for (const button of arguments) button.click()", stickers, apples, stickers, apples)
    page.wait_for_answer()

    assert page["answer"].text == "14"
    assert len(page.tokens()) == 21


def test_a_key_is_asked_for_and_kept_for_this_tab_only(page: Page, locked: ServerProcess) -> None:
    page.expected_errors = "401"
    page.open(locked)
    page.wait(lambda: page["problem"].is_displayed())
    assert page["problem"].text == "This server needs an API key."
    assert page.driver.switch_to.active_element == page["key"]

    page.press("wrong", Keys.ENTER)
    page.wait(lambda: page["problem"].text == "The server refused this API key.")
    page["key"].clear()
    page["key"].send_keys("sesame", Keys.ENTER)
    page.wait(lambda: page["effort"].is_enabled())
    assert not page["problem"].is_displayed()
    page.work("full").click()
    page.ask(TOM)

    assert page["answer"].text == "14"
    assert page.driver.execute_script("return [localStorage.length, document.cookie]") == [0, ""]
    page.driver.refresh()
    page.wait(lambda: page["effort"].is_enabled())


def test_errors_are_said_in_words(page: Page, server: ServerProcess) -> None:
    page.expected_errors = "400|ERR_INTERNET_DISCONNECTED"
    page.open_ready(server)
    too_long = "How many apples? " * 2000
    page.driver.execute_script("arguments[0].value = arguments[1]", page["question"], too_long)
    page["ask"].click()
    page.wait(lambda: page["problem"].is_displayed())
    assert page["problem"].text.startswith("The question is too long")
    assert not page["reply"].is_displayed()

    offline = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    page.emulate("Network.enable")
    page.emulate("Network.emulateNetworkConditions", offline=True, **offline)
    page.write(TOM, Keys.ENTER)
    page.wait(lambda: page["problem"].text == "The server cannot be reached. Is it still running?")
    page.picture("error")
    page.emulate("Network.emulateNetworkConditions", offline=False, **(offline | dict.fromkeys(list(offline)[1:], -1)))
    page["ask"].click()
    page.wait_for_answer()
    assert not page["problem"].is_displayed()


def test_it_is_dark_where_people_want_it_dark(page: Page, server: ServerProcess) -> None:
    page.open_ready(server)
    assert page.brightness() > 0.9

    page.prefer(prefers_color_scheme="dark")
    page.ask(TOM)

    assert page.brightness() < 0.15
    page.picture("dark")


def test_it_fits_a_phone(page: Page, server: ServerProcess) -> None:
    page.resize(360, 740)
    page.open_ready(server)
    assert page.overflow() == 0
    page["effort"].send_keys(Keys.END)
    page.ask(TOM)

    assert page["answer"].text == "14"
    assert len(page.heat()[0]) == 18, "a wide table, which scrolls by itself"
    assert page.overflow() == 0
    page.picture("phone")
    page.vote()
    assert page.overflow() == 0


def test_without_motion_the_table_waits_for_the_end(page: Page, server: ServerProcess) -> None:
    page.prefer(prefers_reduced_motion="reduce")
    page.open_ready(server, "none")
    page.ask(TOM)

    assert "changed" in page.tokens()[page.selected].get_attribute("class")
    assert page["answer"].text == "14"


# On a fake engine, which says what no model would


@contextmanager
def serving(app: FastAPI) -> Iterator[SimpleNamespace]:
    """Serve an app in a thread of this process."""
    with listen("127.0.0.1", 0) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield SimpleNamespace(url=f"http://127.0.0.1:{sock.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


def saying(*tokens: bytes, error: DeviceError | None = None) -> Callable[[Any], Iterator[Event]]:
    """A script of the fake engine: each byte an id, and of each token one step, which chose its first byte."""

    def script(request: Any) -> Iterator[Event]:
        usage = Usage(len(request.prompt_ids), len(tokens), 0)
        for token in tokens:
            traces = tuple((((byte + 1, -0.1),),) for byte in token) if request.params.trace else ()
            text = token.decode(errors="ignore")
            yield Event(tuple(byte + 1 for byte in token), text, traces=traces)
        yield Event((), "", "error" if error else "stop", usage, error)

    return script


def stepping(*steps: str) -> Callable[[Any], Iterator[Event]]:
    """A script of the fake engine, which answers at once; in each place step t says what `steps[t]` has there."""
    said = [rf"\boxed{{{text}}}".encode() for text in steps]
    reply = said[-1]

    def script(request: Any) -> Iterator[Event]:
        for place, byte in enumerate(reply):
            ids = [text[place] + 1 if place < len(text) else END_ID for text in said]
            trace = tuple(((id_, -0.1), (byte + 1, -3.0)) for id_ in ids)
            yield Event((byte + 1,), chr(byte), traces=(trace,) if request.params.trace else ())
        yield Event((), "", "stop", Usage(len(request.prompt_ids), len(reply), len(reply) * (len(steps) - 1)))

    return script


def test_it_opens_on_a_problem_answered_at_once_and_says_whether_each_step_is_right(page: Page) -> None:
    engine = FakeEngine(stepping("7", "19", "14", "14", "14"), max_model_len=1000)
    engine.model.config.work = ["full", "none"]
    with serving(create_app(engine, ServeSettings())) as server:
        page.open(server)
        page.wait(lambda: page["effort"].is_enabled())
        assert page["work-words"].text == ""
        assert page["question"].get_attribute("value") == TOM
        assert page.work("none").is_selected()
        assert not engine.requests
        page["ask"].click()
        page.wait_for_answer()

        assert engine.chat.conversations == [solve_messages(TOM, work="none")]
        assert page["answer"].text == "14"
        assert page.says() == [
            "backbone: 7",
            "step 1: 19 ✓, right: 12+7=19",
            "step 2, the answer: 14 ✓, right: 19-5=14",
            "steps 3 to 4: 14 ✓, right: still 14",
        ]
        assert page["says-story"].text == "Step 2 is the first to say the answer, and it stays."
        assert page["says-right"].is_displayed()
        assert not page["says-cut"].is_displayed()
        assert len(page.heat()[0]) == 6, "the tokens are there as ever"
        page.picture("at-once")

        engine.script = stepping("", "24", "14", "15")
        page["ask"].click()
        page.wait_for_answer()
        assert page["answer"].text == "15"
        assert page.says() == [
            "backbone: –",
            "step 1: 24 ✗, wrong: 12+7=19",
            "step 2: 14 ✓, right: 19-5=14",
            "step 3, the answer: 15 ✗, wrong: still 14",
        ]
        assert page["says-story"].text == "Step 3 is the first to say the answer."


def test_a_step_that_says_more_than_the_answer_has_places_for_is_cut(page: Page) -> None:
    """Of 20 the first step shows both digits and not that they end there."""
    engine = FakeEngine(stepping("101", "20", *"5" * 14, "3"), max_model_len=1000)
    page.resize(360, 740)
    with serving(create_app(engine, ServeSettings())) as server:
        page.open_ready(server, work="none")
        page.all("#examples button")[4].click()
        page.wait_for_answer()

        assert page.says()[:3] == [
            "backbone: 10…",
            "step 1: 20… ✓, right: 5*4=20",
            "step 2: 5 ✗, wrong: 20+7=27",
        ]
        assert page.says()[-1] == "step 16, the answer: 3 ✓, right: still 3"
        assert page["says-cut"].is_displayed()
        assert page.overflow() == 0

        engine.script = stepping("7", "98", "3")
        page["ask"].click()
        page.wait_for_answer()
        assert page.says()[1] == "step 1: 98… ✗, wrong: 5*4=20"


def test_of_a_question_of_ones_own_only_what_each_step_says_is_known(page: Page) -> None:
    engine = FakeEngine(stepping("14", "19", "14", "14", "14"), max_model_len=1000)
    with serving(create_app(engine, ServeSettings())) as server:
        page.open_ready(server, work="none")
        page.ask(f"{TOM} And?")
        assert page.says() == ["backbone: 14", "step 1: 19", "step 2, the answer: 14", "steps 3 to 4: 14"]
        assert page["says-story"].text == "Step 2 is back at the answer, and it stays."
        assert not page["says-right"].is_displayed()

        engine.script = stepping("7", "19")
        page.ask(TOM)
        missing = "Step 1 is the first to say the answer. The problem takes 2 steps; it got 1."
        assert page["says-story"].text == missing
        engine.script = stepping("7")
        page.ask("?")
        assert page.says() == ["backbone, the answer: 7"]
        assert page["says-story"].text == "The backbone alone says the answer."
        engine.script = saying(b"7 and ", rb"\boxed{7}")
        page.ask("?")
        assert not page["says"].is_displayed(), "of a reply with its work one place is no answer"


def test_a_box_ends_at_the_brace_that_closes_it(page: Page) -> None:
    engine = FakeEngine(stepping(r"\frac{1}{3}", r"\frac{1}{2}", r"\frac{1}{2}"), max_model_len=1000)
    with serving(create_app(engine, ServeSettings())) as server:
        page.open_ready(server, work="none")
        page.ask("?")
        assert page.says() == [r"backbone: \frac{1}{3}", r"step 1, the answer: \frac{1}{2}", r"step 2: \frac{1}{2}"]
        engine.script = stepping(r"\{1}\}", r"\{2\}")
        page.ask("?")
        assert page.says() == [r"backbone: \{1", r"step 1, the answer: \{2\}"]


def test_of_half_an_answer_no_step_is_judged(page: Page) -> None:
    """It would call the 1 of 14 right, and a step behind it, too."""
    engine = FakeEngine(max_model_len=1000)
    whole = stepping("7", "19", "14")

    def script(request: Any) -> Iterator[Event]:
        for place, event in enumerate(whole(request)):
            if place == len(r"\boxed{"):
                engine.hold()  # behind this one
            yield event

    engine.script = script
    with serving(create_app(engine, ServeSettings())) as server:
        page.open_ready(server, work="none")
        page.write(TOM, Keys.ENTER)
        page.wait(lambda: len(page.tokens()) == len(r"\boxed{1"))
        page["stop"].click()
        page.wait(lambda: not page["stop"].is_displayed())
        engine.release()

        assert page["answer"].text == "?"
        assert not page["says"].is_displayed()


def test_it_says_what_a_model_has_not_learned(page: Page) -> None:
    """A model that was trained to show its work opens with that; the others can be tried."""
    engine = FakeEngine(max_model_len=1000)
    with serving(create_app(engine, ServeSettings())) as server:
        page.open(server)
        page.wait(lambda: page["effort"].is_enabled())
        assert page.work("full").is_selected()
        assert page["work-words"].text == ""

        page.work("none").click()
        assert page["work-words"].text == "this model has not learned it"
        page.picture("not-learned")


def test_how_much_work_to_show_is_chosen_by_keyboard(page: Page) -> None:
    engine = FakeEngine(max_model_len=1000, max_queue=16)
    with serving(create_app(engine, ServeSettings())) as server:
        page.open_ready(server, work="none")
        while page.driver.switch_to.active_element.get_attribute("name") != "work":
            page.press(Keys.TAB)
        page.press(Keys.ARROW_LEFT)
        assert page.work("equations").is_selected()
        page["ask"].click()
        page.wait_for_answer()
        page.vote()

        assert engine.chat.conversations == [solve_messages(TOM, work="equations")] * 2


def test_it_waits_for_a_server_that_is_starting(page: Page) -> None:
    page.expected_errors = "503"
    app = create_app(None, ServeSettings())
    with serving(app) as server:
        page.open(server)
        page.wait(lambda: page["problem"].text == "The server is still loading its model.")
        assert not page["effort"].is_enabled()

        attach(app, FakeEngine())
        page.wait(lambda: page["effort"].is_enabled())

        assert not page["problem"].is_displayed()


def test_what_a_model_says_is_text_never_markup(page: Page) -> None:
    engine = FakeEngine(saying(rb"\boxed{<img src=x onerror=alert(1)>}", "<b>é".encode()), max_queue=16)
    with serving(create_app(engine, ServeSettings())) as server:
        page.open_ready(server)
        page.ask("?")

        assert page["answer"].text == "<img src=x onerror=alert(1)>"
        assert page.says()[-1] == "backbone, the answer: <img src=x onerror=alert(1)>"
        assert page["tokens"].text == r"\boxed{<img src=x onerror=alert(1)>}<b>◌é"
        page.press(Keys.TAB)
        page.tokens()[-2].click()
        assert page["steps-title"].text == "Token 40: c3"
        page.vote()
        assert page.all("#bars .said")[0].text == "<img src=x onerror=alert(1)>"
        assert page.all("main img, main b") == []


def test_a_vote_is_counted_while_it_goes_on(page: Page) -> None:
    engine = FakeEngine(max_rows=8)

    def script(request: Any) -> Iterator[Event]:
        index = request.params.sample_index
        if index == 2:
            engine.hold()  # the ones behind it end when it is released
        text = "" if index == 1 else rf"\boxed{{{7 if index < 6 else 8}}}"
        yield Event((5,), text, "stop", Usage(3, 1, 4))

    engine.script = script
    with serving(create_app(engine, ServeSettings())) as server:
        page.open_ready(server)
        page.write("?")
        page["samples"].clear()
        page["samples"].send_keys("8")
        page["vote"].click()
        page.wait(lambda: page["verdict"].text == "7 has 2 of 3 votes so far; 8 samples are asked.")
        assert [bar.text.split() for bar in page.all("#bars li")] == [
            ["7", "2", "votes"],
            ["no", "answer", "1", "votes"],
        ]

        engine.release()
        page.wait(lambda: not page["stop"].is_displayed())

        assert page["verdict"].text == "7 has 5 of 8 votes."
        assert len(page.all("#bars li")) == 3

        def tied(request: Any) -> Iterator[Event]:
            yield Event((5,), rf"\boxed{{{14 if request.params.sample_index % 2 else 19}}}", "stop", Usage(3, 1, 4))

        engine.script = tied
        page["vote"].click()
        page.wait(lambda: page["verdict"].text == "19 has 4 of 8 votes.")
        assert [said.text for said in page.all("#bars .said")] == ["19", "14"]


def test_a_reply_that_breaks_off_says_so(page: Page) -> None:
    engine = FakeEngine(saying(b"1", b"2", error=DeviceError("a logit is not finite")))
    with serving(create_app(engine, ServeSettings())) as server:
        page.open_ready(server)
        page.ask("?")

        assert page["problem"].text == "That did not work: a logit is not finite."
        assert page["answer"].text == "?"
        assert page["summary"].text.startswith("stopped after 2 tokens")


def test_a_model_is_chosen_where_there_are_several(page: Page) -> None:
    """Hidden with one. The effort is then that model's, and its questions go to it."""
    engine = FakeEngine(saying(rb"\boxed{5}"), max_model_len=1000, max_queue=16)
    with serving(create_app(engine, ServeSettings(served_model_name="own"))) as server:
        page.open_ready(server)
        assert not page["choice"].is_displayed()

        config = TRMConfig(n_supervision=2, work=["none"])
        engine.decoders["short"] = Hosted(SimpleNamespace(config=config), engine.chat, max_supervision=3)
        page.open_ready(server)
        assert page["choice"].is_displayed()
        assert page["model"].text.startswith("own ")
        Select(page["models"]).select_by_visible_text("short")
        assert page["model"].text.startswith("short ")
        assert (page["effort"].get_property("max"), page["effort"].get_property("value")) == ("3", "2")
        page.picture("models")
        assert page.overflow() == 0
        page.ask("2+3?")
        page.vote()

    assert len(engine.requests) > 2
    assert {request.decoder for request in engine.requests} == {"short"}
