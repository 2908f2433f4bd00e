"""The demo page in a real browser: a key, images, answers with their traces, the keyboard, narrow and dark screens."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.serving import protocol
from pipelines.serving.settings import RequestLimits, ServedModel, ServerSettings
from redux.chat import load_chat_model
from redux.messages import Message, Sampling
from tests.jobs import chatty
from tests.pipelines.serving.browser import PROGRAM, Browser, open_browser
from tests.pipelines.serving.local_gateway import serve_locally
from tests.pipelines.serving.test_protocol import encode_image

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="needs chromium")]

QUESTION = "What colour is the <b>shape</b>?"
KEY = "k-3y"
IDLE = "document.querySelector('#send').textContent === 'Ask'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    chatty.save_model(folder / "m")
    for number in (1, 2):
        (folder / f"{number}.png").write_bytes(encode_image(30 + number, 40))
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    settings = ServerSettings(
        model=ServedModel(name="m", path=str(folder / "m"), compares=True),
        api_key=KEY,
        limits=RequestLimits(new_tokens=30_000),
    )
    with serve_locally(settings) as url:
        yield url


@pytest.fixture
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser
        assert browser.errors == []


def test_a_conversation_on_a_desktop(browser: Browser, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "DEFAULT_NEW_TOKENS", 6)
    browser.open(url, 1280)
    browser.wait_for("!document.querySelector('#key-label').hidden")
    for key, shown in (("wrong", "#error"), (KEY, "#compare-label")):
        browser.run("document.querySelector('#key').value = ''; document.querySelector('#key').focus()")
        browser.type(key)
        browser.press("Enter")
        browser.wait_for(f"!document.querySelector('{shown}').hidden")
    assert KEY not in browser.run("document.documentElement.outerHTML")
    assert browser.run("document.querySelector('#key-label').hidden")

    browser.choose_files("#file", folder / "1.png", folder / "2.png")
    browser.wait_for("document.querySelectorAll('.thumb').length === 2")
    browser.run("document.querySelector('.thumb').click(); document.querySelector('#text').focus()")
    browser.type(QUESTION)
    browser.press("Enter")
    browser.wait_for("document.querySelectorAll('.chips li').length === 8")
    model = load_chat_model(folder / "m")
    image = (folder / "2.png").read_bytes()
    chat = model.encode([Message(role="user", text=QUESTION, images=(image,))])
    [expected] = model.generate([chat], [Sampling(max_new_tokens=6)], lambda deltas: [])
    assert browser.run("document.querySelector('.answer').textContent") == expected.text
    assert browser.run("document.querySelector('.question').textContent") == QUESTION
    assert browser.run("document.querySelectorAll('.question b').length") == 0  # text, never HTML
    assert "8 of 16 image tokens" in browser.run("document.querySelector('.card .chips').textContent")
    assert "16 of 16 image tokens" in browser.run("document.querySelectorAll('.card .chips')[1].textContent")
    assert browser.run(
        "[...document.querySelectorAll('.card')].map((card) => card.querySelectorAll('figure').length)"
    ) == [3, 0]

    # The keyboard moves from word to word.
    browser.run("document.querySelector('.word').focus()")
    pressed = "[...document.querySelectorAll('.word')].findIndex((word) => word.ariaPressed === 'true')"
    assert browser.run(pressed) == 0
    browser.press("ArrowRight")
    assert browser.run(pressed) == 1
    assert browser.run("document.querySelectorAll('.word[tabindex=\"0\"]').length") == 1
    word = browser.run("document.querySelectorAll('.word')[1].textContent.trim()")
    assert word in browser.run("document.querySelector('canvas').getAttribute('aria-label')")
    # Every control has a name.
    assert browser.run(
        "[...document.querySelectorAll('button, textarea, input:not([hidden])')].every((node) => node.ariaLabel ||"
        " node.textContent.trim() || node.labels?.length)"
    )

    # The second question continues the conversation.
    browser.run("document.querySelector('#text').focus()")
    browser.type("Is it red?")
    browser.press("Enter")
    browser.wait_for("document.querySelectorAll('.chips li').length === 16")
    assert browser.run("document.querySelectorAll('.turn:last-child .card')[0].querySelectorAll('figure').length") == 3
    assert browser.run("document.querySelectorAll('.remark').length") == 0
    browser.run("document.querySelector('#reset').click()")
    assert browser.run("document.querySelectorAll('.turn').length") == 0
    assert not browser.run("document.querySelector('#welcome').hidden")

    # A question without any image is answered, with a remark; so far the conversation had images.
    browser.run("document.querySelector('#text').focus()")
    browser.type("Is it red?")
    browser.press("Enter")
    browser.wait_for("document.querySelector('.remark')?.textContent.startsWith('No image: ')")
    browser.wait_for(IDLE)
    browser.wait_for("document.querySelectorAll('.card').length === 2")


def test_an_answer_can_be_stopped(browser: Browser, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "DEFAULT_NEW_TOKENS", 30_000)
    open_with_key(browser, url, 1280)
    browser.run("document.querySelector('#compare').checked = false; document.querySelector('#text').focus()")
    browser.type("Is it red?")
    browser.press("Enter")
    browser.wait_for("document.querySelector('.answer')?.textContent")
    assert not browser.run(IDLE)
    browser.run("document.querySelector('#send').click()")
    browser.wait_for("document.querySelector('.card .error')?.textContent === 'stopped'")
    browser.wait_for(IDLE)
    browser.wait_for("fetch('/health').then((answer) => answer.json()).then((health) => health.conversations === 0)")


def test_a_dark_phone(browser: Browser, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "DEFAULT_NEW_TOKENS", 100)
    open_with_key(browser, url, 390, is_dark=True)
    browser.choose_files("#file", folder / "1.png", folder / "2.png")
    browser.wait_for("document.querySelectorAll('.thumb').length === 2")
    browser.run("document.querySelector('#text').focus()")
    browser.type("x" * 200)
    browser.press("Enter")
    browser.wait_for("document.querySelectorAll('.chips li').length === 8")
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
    # An image that this server does not read is an error in its place, and the next question works.
    (folder / "3.png").write_bytes((folder / "1.png").read_bytes()[:200])
    browser.choose_files("#file", folder / "3.png")
    browser.wait_for("document.querySelectorAll('.thumb').length === 1")
    browser.run("document.querySelector('#text').focus()")
    browser.type("Is it red?")
    browser.press("Enter")
    browser.wait_for("document.querySelector('.card .error')?.textContent.includes('image')")
    browser.wait_for(IDLE)


def open_with_key(browser: Browser, url: str, width: int, is_dark: bool = False) -> None:
    browser.open(url, width, is_dark)
    browser.run(f"sessionStorage.setItem('redux-key', '{KEY}')")
    browser.open(f"{url}/?", width, is_dark)
    browser.wait_for("!document.querySelector('#compare-label').hidden")
