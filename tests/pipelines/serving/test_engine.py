"""The engine answers many callers in batches, each as alone; callers that leave and faults do not touch the others."""

import base64
import threading
from collections.abc import Iterator
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.serving.engine import BatchingEngine, Ticket
from pipelines.serving.events import Event, FailureEvent, TextEvent, TraceEvent
from pipelines.serving.loading import share_weights_without_methods
from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
from redux.chat import ChatModel
from redux.conversation import TEMPLATES, train_word_tokenizer
from redux.messages import Message, Sampling
from redux.model import build_model
from redux.settings import CMAI, VMTC
from tests.pipelines.serving.test_protocol import encode_image

QUESTIONS = ["Is it a red circle?", "What colour is the shape?", "yes", "a blue square or a green circle"]


@pytest.fixture(scope="module")
def model() -> ChatModel:
    tokenizer = train_word_tokenizer([*QUESTIONS, "USER: ASSISTANT: no"], 256)
    tower = TowerSizes(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    language = LanguageSizes(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    built = build_model(ModelSettings(tower=tower, language=language, vmtc=VMTC(), cmai=CMAI()), tokenizer).eval()
    with torch.no_grad():
        for weight in built.parameters():
            if weight.dim() > 1:
                weight.mul_(0.16 / weight.std())
    return ChatModel(built, tokenizer, TEMPLATES["vicuna_bare"])


@pytest.fixture
def engine(model: ChatModel) -> Iterator[BatchingEngine]:
    engine = BatchingEngine({"m": model}, max_batch_size=3)
    yield engine
    engine.close()
    assert not engine.is_alive


class Caller:
    """Submits a question and collects its events."""

    def __init__(self, engine: BatchingEngine, question: str, limit: int = 6, traces: bool = False) -> None:
        messages = [Message(role="user", text=question, images=(encode_image(),))]
        self.events: Queue[Event] = Queue()
        sampling = Sampling(max_new_tokens=limit)
        self.ticket = Ticket("m", engine.models["m"].encode(messages), sampling, traces, self.events.put)
        self.traces = traces
        engine.submit(self.ticket)

    def wait(self) -> list[Event]:
        """Return all events up to the last one."""
        events: list[Event] = []
        while True:
            event = self.events.get(timeout=60)
            events.append(event)
            is_end = isinstance(event, TextEvent) and event.finish_reason and not self.traces
            if is_end or not isinstance(event, TextEvent):
                return events


def join_text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextEvent))


def answer_alone(model: ChatModel, question: str, limit: int = 6) -> str:
    chat = model.encode([Message(role="user", text=question, images=(encode_image(),))])
    return model.generate([chat], [Sampling(max_new_tokens=limit)], lambda deltas: [])[0].text


def test_each_caller_gets_the_answer_of_its_question(engine: BatchingEngine, model: ChatModel) -> None:
    questions = QUESTIONS * 3
    callers = [Caller(engine, question) for question in questions]
    answers = [join_text(caller.wait()) for caller in callers]
    assert answers == [answer_alone(model, question) for question in questions]


def test_a_caller_that_leaves_ends_its_row_and_no_other(engine: BatchingEngine, model: ChatModel) -> None:
    callers = [Caller(engine, question, limit=30) for question in QUESTIONS]
    callers[1].ticket.is_cancelled = True
    for number in (0, 2, 3):
        assert join_text(callers[number].wait()) == answer_alone(model, QUESTIONS[number], 30)


def test_a_fault_ends_its_batch_and_the_next_one_is_answered(
    engine: BatchingEngine, model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail(*_: Any) -> Any:
        failed.set()
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(ChatModel, "generate", fail)
        [event] = Caller(engine, QUESTIONS[0]).wait()
        assert failed.is_set()
    assert isinstance(event, FailureEvent)
    assert "out of memory" in event.message
    assert join_text(Caller(engine, QUESTIONS[1]).wait()) == answer_alone(model, QUESTIONS[1])


def test_a_trace_follows_the_text(engine: BatchingEngine) -> None:
    *texts, last = Caller(engine, QUESTIONS[0], traces=True).wait()
    assert isinstance(last, TraceEvent)
    [image] = last.trace["images"]
    assert (image["tokens_before"], image["tokens"]) == (16, 8)
    assert image["patches"].startswith("data:image/png;base64,")
    assert len(image["allowed"]) == len(last.trace["words"]) == texts[-1].tokens
    assert {len(base64.b64decode(row)) for row in image["allowed"]} == {16}


def test_the_compared_model_shares_the_weights_and_has_no_methods(model: ChatModel) -> None:
    plain = share_weights_without_methods(model.model)
    ours = dict(model.model.named_parameters())
    assert {name: weight.data_ptr() for name, weight in plain.named_parameters()} == {
        name: weight.data_ptr() for name, weight in ours.items()
    }
    assert (plain.config.vmtc, plain.config.cmai) == (None, None)
    assert plain.config.image_seq_length == 16
    chat = ChatModel(plain, model.tokenizer, model.template).encode([Message(role="user", text="yes")])
    assert chat.image_tokens == 0
    text_only = torch.from_numpy(chat.input_ids[None])
    with torch.no_grad():
        got, expected = plain(input_ids=text_only).logits, model.model(input_ids=text_only).logits
    np.testing.assert_array_equal(got.numpy(), expected.numpy())
