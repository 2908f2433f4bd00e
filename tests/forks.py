"""Server of the workers of one raylet. Workers are forks of it, and it has imported torch and Ray.

A new process imports them for up to ten seconds of CPU; a fork starts in milliseconds. The first worker that a raylet
starts becomes the server, in the session of the raylet and below it. `request_worker.py` connects it with the others.
`use_forks` makes a Ray start its workers so. As a program, this module runs another one whose Ray has forks as workers:

    python -m tests.worker_forks jobs.command run job.yaml
"""

import argparse
import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch

from pipelines.core.imports import import_without

WORKER_MODULES = ["torch._dynamo", "torch._inductor", "redux.contrastive", "redux.loading"]
"""Modules that workers import and that do not import Ray. DeepSpeed imports the first two in every rank."""

WITH_FORKS = [sys.executable, "-m", "tests.worker_forks"]
"""First words of a command whose Ray has forks as workers. The name of a module and its words follow."""

WORKER_SCRIPT = str(Path(__file__).with_name("request_worker.py"))

REGISTER_TIMEOUT = {"RAY_worker_register_timeout_seconds": "600"}
"""Environment of a raylet. Its server answers when it has imported everything, on a busy machine after minutes."""


@contextmanager
def use_forks() -> Iterator[None]:
    """Let the workers of a Ray that this process starts in a with block be forks, which cannot use a GPU.

    On other systems than Linux, they are new processes.
    """
    from ray._private import parameter

    if sys.platform != "linux":
        yield
        return
    parameters = partial(parameter.RayParams, setup_worker_path=WORKER_SCRIPT)
    with patch.object(parameter, "RayParams", parameters):
        yield


def serve(listener: socket.socket) -> None:
    """Fork a worker for each request, until the raylet ends."""
    # It fails if the raylet has ended already, and with it this process.
    raylet = os.pidfd_open(int(os.environ["RAY_RAYLET_PID"]))
    # Imports run faster without collections. Later collections, in forks, neither look at these objects nor copy them.
    gc.disable()
    import_without("deepspeed", "mlflow")
    for name in WORKER_MODULES:
        importlib.import_module(name)
    # A worker without a job gets its job with its first task. Ray reads the variable when it is imported.
    os.environ["RAY_JOB_ID"] = "ffffffff"
    _import_with_ray()
    gc.freeze()
    gc.enable()
    # Nobody waits for the workers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while raylet not in select.select([listener, raylet], [], [])[0]:
        request, _ = listener.accept()
        with request:
            _, descriptors, _, _ = socket.recv_fds(request, 1, 3)
            with request.makefile() as file:
                words, environment, folder = json.load(file)
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
        os.setpgrp()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        # Ray has read its settings from the environment of the server.
        reset_auth_token_state()
        parser = argparse.ArgumentParser()
        parser.add_argument("--serialized-runtime-env-context", default="{}")
        parser.add_argument("--language", choices=["PYTHON"])
        options, sys.argv = parser.parse_known_args(words)
        context = RuntimeEnvContext.deserialize(options.serialized_runtime_env_context)
        update_envs(context.env_vars)
        if context.command_prefix:
            # The prefix of a working directory.
            _, directory, _ = context.command_prefix
            os.chdir(directory)
            sys.path.insert(0, directory)
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        os._exit(code if isinstance(code, int) else code is not None)


def run_with_forks() -> None:
    """Run the module that the first word of this command names, with the other words.

    A Ray that it starts has neither a log monitor nor a server of Ray's client, which no test uses.
    """
    from ray._private.node import Node

    sys.argv.pop(0)
    os.environ.update(REGISTER_TIMEOUT)
    with (
        patch.object(Node, "start_log_monitor"),
        patch.object(Node, "start_ray_client_server"),
        nullcontext() if shutil.which("nvidia-smi") else use_forks(),
    ):
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_with_forks()
