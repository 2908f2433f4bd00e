"""Compiled models give what they give uncompiled; `tests/redux/compiled.py` has the comparisons."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def run_checks(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.redux.compiled", *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


CHECKS = ("tower", "threads", "decoding step")


@pytest.fixture(scope="module")
def checks() -> subprocess.CompletedProcess[str]:
    """Output of one process that makes all checks, since torch and transformers take seconds to load."""
    return run_checks(*CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_compiled_model_gives_the_same(checks: subprocess.CompletedProcess[str], name: str) -> None:
    assert name in checks.stdout.splitlines(), checks.stderr[-2000:]


@pytest.mark.slow
def test_a_tower_compiled_by_inductor_gives_the_same() -> None:
    ended = run_checks("tower by Inductor")
    assert ended.returncode == 0, ended.stderr[-2000:]
