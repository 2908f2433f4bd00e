"""The Ray that the tests of a process share. Its workers are forks of one process, which has imported torch and Ray.

A new process imports them for up to ten seconds of CPU; a fork starts in milliseconds. Ray starts each worker by
`request_worker.py`, which passes command and environment on to the server, the main part of this module.
"""

import argparse
import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch

import pytest

from pipelines.core.imports import import_without

WORKER_MODULES = ["torch._dynamo", "torch._inductor", "redux.contrastive", "redux.loading"]
"""Modules that workers import and that do not import Ray. DeepSpeed imports the first two in every rank."""

WORKERS_SOCKET = "REDUX_TEST_WORKERS_SOCKET"
"""Environment variable with the path of the socket for requests."""


@contextmanager
def start_ray(with_forks: bool) -> Iterator[Any]:
    """Start Ray on two CPUs for the length of a with block, and yield the module `ray`.

    Args:
        with_forks: workers are forks, which cannot use a GPU.
    """
    import ray

    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(3):
            path = f"{folder}/{attempt}"
            server = _start_server(path) if with_forks else None
            try:
                _init_ray(path if with_forks else None)
                break
            except Exception as error:  # Ray 2.60 gives up after 30 s on a busy machine
                _end(server)
                if attempt == 2 or "timed out during startup" not in str(error):
                    raise
        yield ray
        _end(server)


def _init_ray(path: str | None) -> None:
    """Start Ray. Its workers are requested at the path of a socket; None starts normal workers."""
    import ray
    from ray._private import parameter

    script = path and str(Path(__file__).with_name("request_worker.py"))
    # ray.init sets variables that must stay, so only these two are restored.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parameter, "RayParams", partial(parameter.RayParams, setup_worker_path=script))
        patched.setenv(WORKERS_SOCKET, path or "")
        # The server answers the first requests when it has imported everything, on a busy machine after minutes.
        patched.setenv("RAY_worker_register_timeout_seconds", "600")
        # address="local": a Ray that happens to run on the machine is not a test's to use
        ray.init(address="local", num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)


def _end(server: subprocess.Popen[bytes] | None) -> None:
    """End Ray and the server of its workers."""
    import ray

    ray.shutdown()
    if server:
        server.communicate()


def _start_server(path: str) -> subprocess.Popen[bytes]:
    """Start the server of workers. It ends when its standard input is closed, at the latest with this process."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(100)
        number = listener.fileno()
        command = [sys.executable, "-m", "tests.shared_ray", str(number)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[number], cwd=Path(__file__).parents[1])


def serve(listener: socket.socket) -> None:
    """Fork a worker for each request, until standard input is closed."""
    import_without("deepspeed", "mlflow")
    for name in WORKER_MODULES:
        importlib.import_module(name)
    is_first = True
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        request, _ = listener.accept()
        with request:
            _, descriptors, _, _ = socket.recv_fds(request, 1, 3)
            with request.makefile() as file:
                words, environment, folder = json.load(file)
        if is_first:
            # Ray reads these variables when it is imported. A worker without a job gets its job with its first task.
            os.environ.update(environment, RAY_JOB_ID="ffffffff")
            _import_with_ray()
            # Nobody waits for the workers.
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            is_first = False
        if os.fork() == 0:
            listener.close()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            _become_worker(words, environment, folder)
        for descriptor in descriptors:
            os.close(descriptor)


def _import_with_ray() -> None:
    """Import the modules that import Ray, without a draw from Ray's generator of IDs.

    The first draw seeds it. Forks of a process with a seeded generator would draw the same IDs for their tasks.
    """
    import ray.actor

    class_id = ray.actor.ActorClassID
    # Ray draws an ID for each class of actors.
    draw = SimpleNamespace(from_random=lambda: class_id(os.urandom(class_id.size())))
    with patch.object(ray.actor, "ActorClassID", draw):
        importlib.import_module("pipelines.training.worker")


def _become_worker(words: list[str], environment: dict[str, str], folder: str) -> NoReturn:
    """Run the command of a worker in this process, as ray/_private/workers/setup_worker.py does in a new one."""
    from ray._private.authentication_test_utils import reset_auth_token_state
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs

    code: Any = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Ray ends the process group of a worker with the worker.
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        # Ray has read its settings from the environment of the server.
        reset_auth_token_state()
        parser = argparse.ArgumentParser()
        parser.add_argument("--serialized-runtime-env-context", default="{}")
        parser.add_argument("--language", choices=["PYTHON"])
        options, sys.argv = parser.parse_known_args(words)
        update_envs(RuntimeEnvContext.deserialize(options.serialized_runtime_env_context).env_vars)
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        os._exit(code if isinstance(code, int) else code is not None)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
