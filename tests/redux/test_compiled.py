"""Compiled models give what they give uncompiled; `tests/redux/compiled.py` has the comparisons."""

import os
from pathlib import Path

import pytest

from tests.forks import ForkedCommand

pytestmark = pytest.mark.integration


def run_checks(folder: Path, *names: str) -> tuple[int, str]:
    """Run checks in a process without checks of shapes. Return its exit code and its output."""
    with (folder / "output").open("w+") as output:
        code = ForkedCommand("tests.redux.compiled", names, os.environ, output.fileno()).wait()
        output.seek(0)
        return code, output.read()


CHECKS = ("tower", "threads", "decoding step")


@pytest.mark.parametrize("name", CHECKS)
def test_a_compiled_model_gives_the_same(tmp_path: Path, name: str) -> None:
    code, output = run_checks(tmp_path, name)
    assert code == 0, output[-2000:]


@pytest.mark.slow
def test_a_tower_compiled_by_inductor_gives_the_same(tmp_path: Path) -> None:
    code, output = run_checks(tmp_path, "tower by Inductor")
    assert code == 0, output[-2000:]
