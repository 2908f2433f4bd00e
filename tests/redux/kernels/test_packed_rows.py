"""Fused kernels serve packed rows, whose conversations they compute as each alone."""

import pytest

from redux.kernels import set_kernels
from tests.redux.test_packed import CMAIS, build_model, compare_with_each_alone


def test_fused_attention_of_packed_conversations_is_that_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    set_kernels("fused")
    compare_with_each_alone(build_model(CMAIS["weights"], layers=2), monkeypatch)
