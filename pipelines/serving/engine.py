"""Batching of the conversations of many callers. Does not import Ray.

One thread runs the model, batch after batch. A batch takes all conversations that wait for the same model, so batches
grow with the load. Callers encode their conversations themselves, in parallel. A caller that leaves ends its row.
"""

import base64
import io
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from pipelines.serving.events import Event, FailureEvent, TextEvent, TraceEvent
from redux.chat import ChatAnswer, ChatModel, EncodedChat
from redux.messages import Delta, Sampling
from redux.trace import AnswerTrace, trace_answer

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A conversation that waits or is answered.

    Args:
        model: name of the model.
        chat: the encoded conversation.
        sampling: how to answer it.
        traces: add a TraceEvent.
        deliver: gets the events, in the thread of the engine.
        is_cancelled: set by the caller to end the answer.
    """

    model: str
    chat: EncodedChat
    sampling: Sampling
    traces: bool
    deliver: Callable[[Event], None] = field(repr=False)
    is_cancelled: bool = False


class BatchingEngine:
    """Answers the conversations of many callers in batches.

    Args:
        models: models by name.
        max_batch_size: conversations that are answered at the same time.
    """

    def __init__(self, models: Mapping[str, ChatModel], max_batch_size: int) -> None:
        self.models, self.max_batch_size = models, max_batch_size
        self._waiting: deque[Ticket] = deque()
        self._answered: list[Ticket] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="batching", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while the thread answers."""
        return self._thread.is_alive()

    def submit(self, ticket: Ticket) -> None:
        """Queue a conversation. Its last event has a finish reason, or is a TraceEvent or a FailureEvent."""
        with self._changed:
            self._waiting.append(ticket)
            self._changed.notify()

    def count_conversations(self) -> int:
        """Count the conversations that wait or are answered."""
        with self._changed:
            return sum(not ticket.is_cancelled for ticket in self._waiting) + len(self._answered)

    def close(self) -> None:
        """End the thread after the current batch."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        # The only thread that runs the model.
        while batch := self._next_batch():
            try:
                self._answer(batch)
            except Exception as error:  # The next batch may be answered
                _logger.exception("a batch of %d failed", len(batch))
                for ticket in batch:
                    ticket.deliver(FailureEvent(_describe_failure(error)))
            with self._changed:
                self._answered = []

    def _next_batch(self) -> list[Ticket]:
        """Wait for conversations and take those of one model; an empty list at the end."""
        with self._changed:
            while True:
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_cancelled)
                if self._waiting or self._is_closed:
                    break
                self._changed.wait()
            if self._is_closed:
                return []
            # The conversation that has waited longest chooses the model.
            name = self._waiting[0].model
            batch = [ticket for ticket in self._waiting if ticket.model == name][: self.max_batch_size]
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in batch)
            self._answered = batch
            return batch

    def _answer(self, batch: Sequence[Ticket]) -> None:
        model = self.models[batch[0].model]

        def deliver(deltas: Sequence[Delta]) -> list[int]:
            for delta in deltas:
                batch[delta.row].deliver(TextEvent(delta.text, delta.tokens, delta.finish_reason))
            return [row for row, ticket in enumerate(batch) if ticket.is_cancelled]

        # Rows end one by one; the batch ends with its longest answer.
        answers = model.generate([ticket.chat for ticket in batch], [ticket.sampling for ticket in batch], deliver)
        # Traces come last, so that no caller waits for the trace of another one.
        for ticket, answer in zip(batch, answers, strict=True):
            if ticket.traces and not ticket.is_cancelled:
                ticket.deliver(TraceEvent(_trace(model, ticket.chat, answer)))


def _trace(model: ChatModel, chat: EncodedChat, answer: ChatAnswer) -> dict[str, Any]:
    return describe_trace(trace_answer(model, chat, answer.tokens))


def _describe_failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the device is out of memory; try fewer or shorter conversations, or a smaller --max-batch-size"
    return f"{type(error).__name__} while the batch was answered; the log of the server has the details"


def describe_trace(trace: AnswerTrace) -> dict[str, Any]:
    """Describe a trace in JSON.

    Returns:
        {"words": [text], "images": [{"image", "patches", "tokens_before", "tokens", "allowed"}]}. `image` and
        `patches` are PNG files as data URLs, the second with kept and merged patches; `allowed` has for each word the
        patches row by row as bytes in base64, 255 where all layers let the word attend.
    """
    images = []
    for number, image in enumerate(trace.images):
        shares = [trace.spread_over_patches(word, number) for word in range(len(trace.words))]
        allowed = [(row * 255).round().astype("uint8").tobytes() for row in shares]
        images.append(
            {
                "image": encode_png(image.image),
                "patches": encode_png(image.draw()),
                "tokens_before": len(image.token_of_patch),
                "tokens": image.num_tokens,
                "allowed": [base64.b64encode(row).decode() for row in allowed],
            }
        )
    return {"words": list(trace.words), "images": images}


def encode_png(image: Image.Image) -> str:
    """Encode an image as PNG in a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
