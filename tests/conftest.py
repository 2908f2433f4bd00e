"""Fixtures and settings of all tests: number of processes, markers, and one Ray for each process."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any
from unittest.mock import patch

import pytest
from _pytest import runner
from jaxtyping import _import_hook

from tests.call_stack import call_with_room
from tests.triton_interpreter import omit_overflow_checks

# Test processes, ranks and workers share the CPUs. Threads of OpenMP that wait for each other must not take CPU time
# from others. Set here, since torch reads it when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Imports of a million objects that stay: the collector would look at all of them again and again.
gc.disable()

if shutil.which("nvidia-smi") is None:
    # Without a GPU, tests of kernels interpret them; set here, since transformers imports triton, which reads it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def load_code(loader: Any, name: str) -> CodeType | None:
    """Load the bytecode of a module whose shapes jaxtyping checks.

    jaxtyping 0.3 looks for files of bytecode of its own until the module has run, so also for all that the module
    imports. Where none are written, each process would compile torch, transformers and others, for 8 seconds of CPU.
    """
    find_file = partial(_import_hook._optimized_cache_from_source, loader._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", find_file):
        return SourceFileLoader.get_code(loader, name)


checking_loader: Any = _import_hook._JaxtypingLoader
checking_loader.get_code, checking_loader.exec_module = load_code, SourceFileLoader.exec_module


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of test processes of `-n auto`: one more than there are CPUs, since tests wait for processes.

    At most 8, since many tests start a Ray.
    """
    return min((os.cpu_count() or 1) + 1, 8)


PROCESS_FIXTURES = {"ray_cluster", "server"}
"""Fixtures that start processes: Ray, and the S3 server of tests/pipelines/conftest.py."""

LONGEST_FILES = (
    "jobs/test_run.py",
    "jobs/cluster/test_machines.py",
    "jobs/cluster/test_submit.py",
    "pipelines/training/test_faults.py",
    "jobs/test_recipe.py",
    "jobs/test_serve.py",
    "pipelines/training/test_group.py",
    "pipelines/data/test_elastic.py",
    "pipelines/training/test_layouts.py",
    "test_house.py",
    "pipelines/training/test_trackers.py",
    "jobs/test_features.py",
    "pipelines/training/test_validation.py",
    "pipelines/training/test_divided.py",
    "pipelines/training/test_skew.py",
    "pipelines/training/test_memory.py",
    "pipelines/training/test_packed.py",
    "pipelines/training/test_worker.py",
    "redux/test_compiled.py",
    "jobs/bench/test_scripts.py",
    "jobs/bench/test_gpu.py",
)
"""Files that take about half a minute or more, the longest first."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests with fixtures that start processes as integration tests, and start long files first.

    These are the longest files and then those of integration tests. The short files after them keep all test processes
    busy until the end.
    """
    for item in items:
        if PROCESS_FIXTURES & {*getattr(item, "fixturenames", ())}:
            item.add_marker("integration")
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST_FILES)}
    for item in items:
        if item.get_closest_marker("integration"):
            ranks.setdefault(item.path, len(LONGEST_FILES))
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST_FILES) + 1))


def pytest_collection_finish() -> None:
    """Collect garbage again, but not among the objects of imported modules and collected tests."""
    omit_overflow_checks()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let the interpreter collect all objects at its end. Libraries report frozen ones as leaked."""
    gc.unfreeze()


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    """Run a test as pytest does, with room for its frames."""
    return call_with_room(runner.pytest_runtest_protocol, item, nextitem)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """The module `ray`, initialised on a local Ray with two CPUs; it ends with the session.

    Starting takes seconds, so it is shared, and imported here so that tests without it do not pay for it.
    """
    import torch

    from tests import shared_ray

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # set before Ray starts, so that its workers inherit it
    with shared_ray.start_ray(with_forks=not has_gpu) as ray:
        yield ray


@pytest.fixture(scope="session")
def in_process() -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which this process does the work of Ray."""
    from tests import local_ray  # imported here, because it imports Ray

    return local_ray.run_in_process


@pytest.fixture
def local_ray_data(in_process: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Do the work of Ray Data in this process during a whole test."""
    with in_process():
        yield
