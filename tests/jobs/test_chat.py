"""`redux ask` and `redux chat`: answers are those of evaluation, and a conversation in a terminal survives Ctrl-C."""

import codecs
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from redux.answering import load
from redux.chat import load_chat_model
from redux.messages import Message, Sampling
from tests.jobs import chatty
from tests.jobs.command_line import run_command
from tests.pipelines.serving.test_protocol import encode_image

QUESTION = "What colour is the shape?"
IMAGE = encode_image(40, 30)

EVENT_S = 300
"""Limit of the wait for more output."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the model `m` and the image `a b.png`."""
    folder = tmp_path_factory.mktemp("chat")
    chatty.save_model(folder / "m")
    (folder / "a b.png").write_bytes(IMAGE)
    return folder


# --- redux ask -----------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_evaluation(folder: Path) -> None:
    result = run_command("ask", folder / "m", folder / "a b.png", QUESTION, "--max-new-tokens", 6)
    assert result.code == 0, result.err
    assert result.out == load(folder / "m")([QUESTION], [IMAGE], max_new_tokens=6).texts[0] + "\n"


def test_options_change_model_and_sampling(folder: Path) -> None:
    words = ["ask", folder / "m", folder / "a b.png", folder / "a b.png", QUESTION, "--max-new-tokens", 6]
    options = ["--image-tokens", "all", "--gamma", 0, "--temperature", 2, "--seed", 1]
    model = load_chat_model(folder / "m", vmtc=None, reduction=None, cmai=None)
    chat = model.encode([Message(role="user", text=QUESTION, images=(IMAGE, IMAGE))])
    assert chat.image_tokens == 32
    sampling = Sampling(max_new_tokens=6, temperature=2.0, seed=1)
    assert run_command(*words, *options).out == model.generate([chat], [sampling], lambda deltas: [])[0].text + "\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["m", "gone.png", QUESTION],
            "gone.png: not found, allowed: an existing file; the question is the last argument",
        ),
        (
            ["m", QUESTION, "a b.png"],
            "QUESTION: got the file a b.png, allowed: a question as the last",
        ),
        (["m", "gone.png", "why? " * 1000], "gone.png: not found"),
        (["m", "m/config.json", QUESTION], "config.json"),
        (["m", QUESTION, "--temperature", "-1"], "--temperature: got -1.0, allowed: 0 to 100"),
        (["m", QUESTION, "--image-tokens", "17"], "17"),
        (["m", "what is <image>?"], "<image>"),
        (["gone", QUESTION], "gone"),
        ([".", QUESTION], "no job.yaml or config.json"),
    ],
)
def test_mistakes_are_one_line(folder: Path, words: list[str], error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    # huggingface_hub has read the environment; online, it would ask for minutes.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = run_command("ask", *words)
    assert (result.code, result.out) == (2, "")
    assert error in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_a_question_without_an_image_is_answered_with_a_remark(folder: Path) -> None:
    result = run_command("ask", folder / "m", QUESTION, "--max-new-tokens", 6)
    assert result.out == load(folder / "m")([QUESTION], [None], max_new_tokens=6).texts[0] + "\n"
    assert "redux: no image: the model answers from the text alone\n" in result.err
    assert "no image" not in run_command("ask", folder / "m", folder / "a b.png", QUESTION, "--max-new-tokens", 6).err


# --- redux chat ----------------------------------------------------------------------------------------------------


def test_a_conversation_from_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"/image {folder}/a b.png\n{QUESTION}\n\n/tokens {folder}/t.png\nIs it red?\n/quit\n{QUESTION}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    result = run_command("chat", folder / "m", "--max-new-tokens", 6)
    model = load_chat_model(folder / "m")
    messages = [Message(role="user", text=QUESTION, images=(IMAGE,))]
    answers = []
    for following in ("Is it red?", None):
        [answer] = model.generate([model.encode(messages)], [Sampling(max_new_tokens=6)], lambda deltas: [])
        answers.append(answer.text)
        if following:
            messages += [Message(role="assistant", text=answer.text), Message(role="user", text=following)]
    assert result.out.splitlines() == [
        f"{folder}/a b.png goes with the next question",
        answers[0],
        f"{folder}/t.png",
        "16 patches become 8 image tokens, in each image",
        answers[1],
    ]
    assert Image.open(folder / "t.png").width == 256


def test_a_conversation_without_an_image_says_so_at_its_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a reset; a conversation with an image has no such remark."""
    lines = f"{QUESTION}\n{QUESTION}\n/reset\n{QUESTION}\n/reset\n/image {folder}/a b.png\n{QUESTION}\n{QUESTION}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    result = run_command("chat", folder / "m", "--max-new-tokens", 2)
    said = [number for number, line in enumerate(result.out.splitlines()) if "no image: the model answers" in line]
    assert said == [0, 4]


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.terminal, inside = pty.openpty()
        # The new session's leader takes the terminal as its own, so that Ctrl-C reaches it as a signal.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.command", *words],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        os.close(inside)
        self.output = ""
        # A read may end within a character, or within the end of a line.
        self.decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)

    def wait_for(self, pattern: str) -> str:
        """Read until the new output matches a pattern; return the output up to the end of the match."""
        while not (found := re.search(pattern, self.output, re.DOTALL)):
            assert select.select([self.terminal], [], [], EVENT_S)[0], f"no {pattern!r} in {self.output!r}"
            self.output += self.decoder.decode(os.read(self.terminal, 4096))
        text, self.output = self.output[: found.end()], self.output[found.end() :]
        return text

    def type(self, text: str) -> None:
        """Type at the prompt."""
        self.wait_for(r"> $")
        os.write(self.terminal, text.encode())


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    # Background jobs of a shell, such as the tests may be, ignore it, and their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    terminal = Terminal("chat", str(folder / "m"), "--max-new-tokens", "30000")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.terminal)


@pytest.mark.integration
def test_a_conversation_in_a_terminal(terminal: Terminal, folder: Path) -> None:
    model = load_chat_model(folder / "m")
    chat = model.encode([Message(role="user", text=QUESTION, images=(IMAGE,))])
    [expected] = model.generate([chat], [Sampling(max_new_tokens=4)], lambda deltas: [])
    terminal.wait_for("/help lists the commands")
    terminal.type("/help\n")
    terminal.wait_for(r"/image FILE.*/quit")
    terminal.type("/nonsense\n")
    terminal.wait_for(r"/nonsense: no command, allowed: /image, /tokens, /reset, /help, /quit")
    terminal.type("/tokens\n")
    terminal.wait_for(r"no image yet")
    terminal.type("/image gone.png\n")
    terminal.wait_for(r"gone\.png: not found")
    terminal.type(f"/image {folder}/a b.png\n")
    terminal.wait_for(r"a b.png goes with the next question")
    # The answer would take minutes.
    terminal.type(f"{QUESTION}\n")
    terminal.wait_for(re.escape(f"{QUESTION}\n{expected.text}"))
    os.write(terminal.terminal, b"\x03")
    terminal.wait_for(r" …\n")
    terminal.type("/tokens\n")
    assert terminal.wait_for("16 patches become 8 image tokens").count("▀") == 48 * 24
    terminal.type("Is it red?\n")
    terminal.wait_for(r"Is it red\?\n\w+")
    os.write(terminal.terminal, b"\x03")
    terminal.type("/reset\n")
    terminal.wait_for("a new conversation")
    terminal.type("/tokens\n")
    terminal.wait_for("no image yet")
    terminal.type("\x04")
    assert terminal.process.wait(120) == 0
