"""Log messages about kernels reach the user through the recorder."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.training.worker import KernelMessages, forward_kernel_messages

LOGGER = logging.getLogger("redux.kernels")


@pytest.fixture(autouse=True)
def restore_logger() -> Iterator[None]:
    handlers, level = list(LOGGER.handlers), LOGGER.level
    yield
    LOGGER.handlers[:] = handlers
    LOGGER.setLevel(level)


def make_recorder(messages: list[str]) -> Any:
    return SimpleNamespace(add_message=messages.append)


def test_both_decisions_are_shown_with_the_stage() -> None:
    messages: list[str] = []
    forward_kernel_messages(make_recorder(messages), "instruct")
    LOGGER.info("K-means: fused kernel")
    LOGGER.warning("CMAI: plain code, because heads are 256 wide")
    assert messages == ["instruct: K-means: fused kernel", "instruct: CMAI: plain code, because heads are 256 wide"]


def test_a_later_stage_of_the_same_process_uses_only_its_recorder() -> None:
    first: list[str] = []
    second: list[str] = []
    forward_kernel_messages(make_recorder(first), "pretrain")
    forward_kernel_messages(make_recorder(second), "instruct")
    LOGGER.info("K-means: fused kernel")
    assert (first, second) == ([], ["instruct: K-means: fused kernel"])
    assert sum(isinstance(handler, KernelMessages) for handler in LOGGER.handlers) == 1
