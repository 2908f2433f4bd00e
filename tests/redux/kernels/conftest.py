"""Kernels under test: interpreted without a GPU, and the choice of kernels as before after each test.

Where Triton does not exist (macOS), only tests of the choice run. On Linux a missing Triton is an error.
"""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from redux.kernels import get_kernels, set_kernels

if sys.platform == "linux" or find_spec("triton"):
    import tests.redux.kernels.interpreter  # noqa: F401
else:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.stem != "test_choice"]


@pytest.fixture(autouse=True)
def restored_choice() -> Iterator[None]:
    before = get_kernels()
    yield
    set_kernels(before)
