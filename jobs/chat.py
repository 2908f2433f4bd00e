"""Ask a trained model in the terminal: one question (`redux ask`) or a conversation (`redux chat`)."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from jobs.layout import find_model
from pipelines.core import failures, storage
from redux.answering import is_llava
from redux.chat import ChatModel, choose_methods, load_chat_model
from redux.image import decode_rgb
from redux.messages import Delta, Message, Sampling
from redux.trace import trace_images

HELP = """\
/image FILE      show an image with the next question
/tokens [FILE]   draw the image tokens: kept patches are unchanged, patches of one colour and texture share a token
/reset           begin again
/quit            end (or Ctrl-D)"""

ASK_USAGE = "redux ask MODEL IMAGE... QUESTION"

NO_IMAGE = "no image: the model answers from the text alone"
"""Remark on a question without any image, which is often forgotten."""

UPPER_HALF = "▀"
"""Character whose colour is the upper of two pixels, on a background of the lower one."""

PICTURE_COLUMNS = 48
"""Width of a picture in the terminal, in characters."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options of `redux chat`, see its help.

    Args:
        model: folder of a run; or folder, hub id or URL of a LLaVA.
        images: images of the first question.
        image_tokens: image tokens that VMTC leaves, or "all"; None for those of the training.
        gamma: largest share of inhibited image tokens; None for that of the training.
        device: device; None takes a GPU if there is one.
        max_new_tokens, temperature, top_p, seed: see `redux.chat.Sampling`.
    """

    model: str
    images: Sequence[str]
    image_tokens: int | Literal["all"] | None
    gamma: float | None
    device: str | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class AskOptions(ChatOptions):
    """Options of `redux ask`: a question, about all images."""

    question: str


def ask(options: AskOptions) -> str:
    """Return the answer to one question.

    Raises:
        ValueError: the model or an image cannot be read, or an option is out of range.
    """
    sampling = build_sampling(options)
    find_model(options.model)  # A wrong model is named before a wrong image
    if os.path.isfile(options.question):  # Path.is_file() raises for a long question
        raise ValueError(
            f"QUESTION: got the file {options.question}, allowed: a question as the last argument: {ASK_USAGE}"
        )
    try:
        images = tuple(map(read_image_file, options.images))
    except ValueError as error:
        raise ValueError(f"{error}; the question is the last argument: {ASK_USAGE}") from None
    message = Message(role="user", text=options.question, images=images)
    model = open_model(options)
    if not images:
        print(f"redux: {NO_IMAGE}", file=sys.stderr)
    [answer] = model.generate([model.encode([message])], [sampling], lambda deltas: [])
    return answer.text


def run_chat(options: ChatOptions) -> None:
    """Hold a conversation in the terminal until its input ends.

    Raises:
        ValueError: the model or a first image cannot be read, or an option is out of range.
    """
    sampling = build_sampling(options)
    find_model(options.model)  # A wrong model is named before a wrong image
    images = [read_image_file(image) for image in options.images]
    model = open_model(options)
    conversation = Conversation(model, sampling, images)
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() a history and line editing

        print(f"{options.model}; /help lists the commands")
    for line in _read_lines():
        if not conversation.handle(line.strip()):
            break


def build_sampling(options: ChatOptions) -> Sampling:
    """Build the sampling from the options; ValueError names an option that is out of range."""
    names = ("max_new_tokens", "temperature", "top_p", "seed")
    try:
        return Sampling(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise ValueError(f"--{name.replace('_', '-')}:{rest}") from None


def open_model(options: ChatOptions) -> ChatModel:
    """Load the model that the options name, with their settings of the method."""
    source = find_model(options.model)
    if not is_llava(source):
        raise ValueError(f"{options.model}: the model is not a LLaVA, allowed: a LLaVA with a CLIP or SigLIP tower")
    methods = choose_methods(source, options.image_tokens, options.gamma)
    return load_chat_model(source, device=options.device, **methods)


def read_image_file(path: str) -> bytes:
    """Read an image file; ValueError if it is missing or no image."""
    try:
        content = storage.read(path)
    except OSError as error:
        raise ValueError(failures.classify_error(error).text) from None
    try:
        decode_rgb(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return content


@dataclass
class Conversation:
    """A conversation in the terminal.

    Args:
        model: the model.
        sampling: how it answers.
        new_images: images for the next question.
        messages: the conversation so far.
    """

    model: ChatModel
    sampling: Sampling
    new_images: list[bytes] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    def handle(self, line: str) -> bool:
        """Handle a line of the user; False ends the conversation."""
        verb, _, argument = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/image": self._add_image,
            "/tokens": self._draw_tokens,
            "/reset": self._reset,
            "/help": lambda _: print(HELP),
        }
        if verb in ("/quit", "/exit"):
            return False
        try:
            if verb in commands:
                commands[verb](argument.strip())
            elif verb.startswith("/"):
                print(f"{verb}: no command, allowed: {', '.join((*commands, '/quit'))}")
            elif line:
                self._answer(line)
        except ValueError as error:
            print(error)
        return True

    def _add_image(self, path: str) -> None:
        if not path:
            raise ValueError("/image: got no file, allowed: /image FILE")
        self.new_images.append(read_image_file(path))
        print(f"{path} goes with the next question")

    def _reset(self, _: str) -> None:
        self.messages.clear()
        self.new_images.clear()
        print("a new conversation")

    def _answer(self, question: str) -> None:
        """Answer a question and print the answer as it grows. Ctrl-C ends the answer, which stays as far as it got."""
        message = Message(role="user", text=question, images=tuple(self.new_images))
        if not self.messages and not message.images:
            print(f"({NO_IMAGE}; /image FILE shows one with the next question)")
        chat = self.model.encode([*self.messages, message])
        printed: list[str] = []

        def show(deltas: Sequence[Delta]) -> list[int]:
            printed.extend(delta.text for delta in deltas)
            print("".join(delta.text for delta in deltas), end="", flush=True)
            return []

        try:
            self.model.generate([chat], [self.sampling], show)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():  # Nobody would go on
                raise
            print(" …", end="")
        print()
        self.messages += [message, Message(role="assistant", text="".join(printed))]
        self.new_images.clear()

    def _draw_tokens(self, path: str) -> None:
        """Draw the image tokens of all images so far."""
        images = [image for message in self.messages for image in message.images] + self.new_images
        if not images:
            raise ValueError("/tokens: no image yet, allowed: after /image FILE")
        chat = self.model.encode([Message(role="user", text="", images=tuple(images))])
        traces = trace_images(self.model, chat)
        pictures = [trace.draw() for trace in traces]
        if path:
            _join_pictures(pictures).save(_check_png(path))
            print(path)
        else:
            for picture in pictures:
                print(format_picture(picture, PICTURE_COLUMNS))
        print(f"{chat.patches_per_image} patches become {chat.tokens_per_image} image tokens, in each image")


def _check_png(path: str) -> Path:
    file = Path(path)
    if file.suffix.lower() != ".png" or not file.parent.is_dir():
        raise ValueError(f"/tokens: got {path}, allowed: a file NAME.png in a folder that exists")
    return file


def _join_pictures(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put pictures of one height side by side."""
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))


def format_picture(picture: Image.Image, columns: int) -> str:
    """Format a picture as coloured characters for a terminal with 24-bit colours, two pixels a character."""
    rows = 2 * round(columns * picture.height / picture.width / 2)
    pixels = np.asarray(picture.convert("RGB").resize((columns, rows), Image.Resampling.BOX))
    lines = []
    for upper_row, lower_row in zip(pixels[::2], pixels[1::2], strict=True):
        cells = [
            "\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*upper, *lower) + UPPER_HALF
            for upper, lower in zip(upper_row, lower_row, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def _read_lines() -> Iterator[str]:
    """Read lines until the end of the input. Ctrl-C at the prompt ends a conversation in a terminal, too."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()
            return
