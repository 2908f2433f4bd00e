"""Messages of a conversation, and how an answer is chosen and delivered. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le

from redux.conversation import IMAGE_TOKEN

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message of a conversation.

    Args:
        role: who wrote it. Only the first message may be the system's; then user and assistant take turns.
        text: its text.
        images: encoded image files, only in a user's message.
    """

    role: Role
    text: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Choice of the tokens of an answer.

    Args:
        max_new_tokens: limit of the answer in tokens.
        temperature: divisor of the logits. 0 takes the likeliest token.
        top_p: smallest probability mass of the likeliest tokens among which one is drawn.
        seed: seed of the draws. None takes a new one for each answer.
        stop: texts that end the answer and are not part of it.
    """

    max_new_tokens: Annotated[int, Ge(1)] = 512
    temperature: Annotated[float, Ge(0), Le(100)] = 0.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[Any, str]] = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 100, "0 to 100"),
            "top_p": (0 < self.top_p <= 1, "above 0, up to 1"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "a number of 64 bits"),
            "stop": (all(self.stop), "texts that are not empty"),
        }
        for name, (is_allowed, allowed) in bounds.items():
            if not is_allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed: {allowed}")


class Delta(NamedTuple):
    """New text of a row.

    Args:
        row: number of the row in its batch.
        text: text to append; it may be empty.
        tokens: new tokens of the row so far, with the end token.
        finish_reason: None while the answer goes on; "stop" for the end token or a stop text, "length" for the limit.
    """

    row: int
    text: str
    tokens: int
    finish_reason: FinishReason | None = None


def check_messages(messages: Sequence[Message]) -> None:
    """Check the order of roles and the texts of a conversation that the assistant continues.

    Raises:
        ValueError: names the message and what is allowed.
    """
    if not messages:
        raise ValueError("messages: got none, allowed: at least one of the user")
    first_turn = int(messages[0].role == "system")
    for number, message in enumerate(messages, 1):
        expected = ("user", "assistant")[(number - 1 - first_turn) % 2] if number > first_turn else "system"
        if message.role != expected:
            raise ValueError(f"message {number}: got role {message.role}, allowed: {expected}")
        if IMAGE_TOKEN in message.text:
            raise ValueError(f"message {number}: got {IMAGE_TOKEN} in its text, allowed: images beside the text")
        if message.images and message.role != "user":
            raise ValueError(f"message {number}: got an image of role {message.role}, allowed: images of the user")
    if messages[-1].role != "user":
        raise ValueError(f"message {len(messages)}: got role {messages[-1].role}, allowed: user, as the last one")
