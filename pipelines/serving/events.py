"""Events of an answer, from the engine through Ray Serve to the gateway. Imports neither torch nor Ray.

Their order: a RefusalEvent alone; or a PromptEvent, TextEvents of which the last has a finish reason, and, if it was
requested, a TraceEvent. A FailureEvent may end the answer at any time.
"""

from typing import Any, NamedTuple

from redux.messages import FinishReason


class PromptEvent(NamedTuple):
    """First event of an answer: counts of the encoded conversation."""

    tokens: int
    image_tokens: int
    image_tokens_before: int


class RefusalEvent(NamedTuple):
    """Only event of a conversation that the model cannot take."""

    message: str


class TextEvent(NamedTuple):
    """New text of an answer.

    Args:
        text: text to append.
        tokens: new tokens so far.
        finish_reason: None while the answer goes on.
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None = None


class TraceEvent(NamedTuple):
    """Trace of an answer, see `describe_trace`; it comes after the text."""

    trace: dict[str, Any]


class FailureEvent(NamedTuple):
    """End of an answer by an error of the server."""

    message: str


Event = TextEvent | TraceEvent | FailureEvent
"""Event of the engine."""
