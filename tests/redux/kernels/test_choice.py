"""The choice between fused kernels and plain code, and its log messages."""

import logging
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

import redux
from redux import kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def restored_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start with the choice "auto", no message logged, Triton and its interpreter; restore the choice afterwards."""
    monkeypatch.setattr(kernels, "_logged_choices", set())
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = kernels.get_kernels()
    kernels.set_kernels("auto")
    yield
    kernels.set_kernels(before)


def test_auto_uses_kernels_only_on_a_gpu() -> None:
    assert kernels.use_fused("K-means", GPU)
    assert not kernels.use_fused("K-means", CPU)
    assert not kernels.use_fused("K-means", GPU, unsupported="there are more than 1,024 tokens")


def test_plain_uses_no_kernel() -> None:
    redux.set_kernels("plain")
    assert not kernels.use_fused("K-means", GPU)


def test_fused_uses_a_kernel_or_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    redux.set_kernels("fused")
    assert kernels.use_fused("K-means", GPU)
    assert kernels.use_fused("K-means", CPU), "the interpreter runs kernels on tensors of a CPU"
    with pytest.raises(ValueError, match="kernels: got fused, allowed for K-means: auto or plain, because there are 9"):
        kernels.use_fused("K-means", GPU, unsupported="there are 9 tokens")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="because tensors are on cpu, and kernels need a GPU"):
        kernels.use_fused("K-means", CPU)


def test_without_triton_auto_is_plain_and_fused_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_HAS_TRITON", False)
    assert not kernels.use_fused("K-means", GPU)
    redux.set_kernels("fused")
    with pytest.raises(ValueError, match="because triton is not installed"):
        kernels.use_fused("K-means", GPU)


def test_each_decision_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "redux.kernels")
    for _ in range(2):
        kernels.use_fused("K-means", GPU)
        kernels.use_fused("CMAI", GPU, unsupported="heads are 256 wide")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "K-means: fused kernel"),
        ("WARNING", "CMAI: plain code, because heads are 256 wide"),
    ]


def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # The type checker of tests would refuse it first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="kernels: got 'fast', allowed: auto, plain, fused"):
        redux.set_kernels("fast")  # type: ignore[arg-type]
