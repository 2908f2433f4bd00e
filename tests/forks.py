"""Forks of a process that has imported torch, Ray and DeepSpeed: ranks, commands, and the workers of a Ray.

A new process imports them for up to ten seconds of CPU; a fork starts in milliseconds. Each test process has one fork
server, which starts with the first fork and ends with the test process.

- `start_fork` calls a function in a fork.
- `ForkedCommand` runs a program in a fork, and lets the workers of its Ray be forks.
- `use_forks` lets the workers of a Ray that this process starts be forks. `request_worker.py` requests them.
"""

import argparse
import atexit
import ctypes
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import psutil

WORKER_SCRIPT = str(Path(__file__).with_name("request_worker.py"))

WORKER_SERVER = "REDUX_TEST_WORKER_SERVER"
"""Environment variable of a raylet: name of the abstract socket of the process that forks its workers."""

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 26, 1 << 28, 1 << 29, 1 << 30
"""Kinds of namespaces; os has them since Python 3.12."""

ENDING_S = 30
"""Limit of the time in which killed processes end."""


def start_fork(work: Callable[..., Any], *args: Any) -> BaseProcess:
    """Call `work(*args)` in a fork of the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded_modules"])
    process = context.Process(target=work, args=args)
    process.start()
    return process


# Commands


class ForkedCommand:
    """A command in a fork, which has a session of its own: `python -m MODULE WORDS...` without the imports.

    It has the methods of `subprocess.Popen` that tests use.

    Args:
        module: name of the module.
        words: its arguments.
        environment: all its environment variables.
        output: descriptor for standard output and errors.
        namespaces: process in whose namespaces the command runs: user, network, mounts, host name and processes.
            The process of the fork stays outside and ends with the command.
    """

    def __init__(
        self,
        module: str,
        words: Sequence[str],
        environment: Mapping[str, str],
        output: int,
        namespaces: int | None = None,
    ) -> None:
        self._process = start_fork(
            _become_command, module, list(words), dict(environment), reduction.DupFd(output), namespaces
        )
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None before the end."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()


def _become_command(
    module: str, words: list[str], environment: dict[str, str], output: Any, namespaces: int | None
) -> NoReturn:
    os.setsid()
    descriptor = output.detach()
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    # The test process may ignore SIGINT, and then so does the fork server.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if namespaces:
        _enter_namespaces(namespaces)
    _replace_environment(environment)
    _end_after(lambda: _run_module(module, words))


def _enter_namespaces(process: int) -> None:
    """Move a child of this process into the namespaces of another one, and continue there; this process waits for it.

    A process cannot move into a namespace of processes, only its later children can.
    """
    folder = Path.cwd()
    namespaces = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWPID
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(os.pidfd_open(process), namespaces):
        raise OSError(ctypes.get_errno(), "setns")
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    os.chdir(folder)


def _run_module(module: str, words: list[str]) -> None:
    """Run a module as a program. A Ray that it starts has forks of this process as workers.

    A Ray that it starts has neither a log monitor nor a server of Ray's client, which no test uses.
    """
    from ray._private.node import Node

    sys.argv = [module, *words]
    with (
        patch.object(Node, "start_log_monitor"),
        patch.object(Node, "start_ray_client_server"),
        nullcontext() if shutil.which("nvidia-smi") else use_forks(_fork_this_process),
    ):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _replace_environment(environment: dict[str, str]) -> None:
    """Replace all environment variables, also for libraries that have read those of the fork server."""
    from ray._private.authentication_test_utils import reset_auth_token_state

    os.environ.clear()
    os.environ.update(environment)
    reset_auth_token_state()
    tempfile.tempdir = None


def _end_after(run: Callable[[], Any]) -> NoReturn:
    """Run a program in this process, and end as a new process would."""
    code: Any = 1
    try:
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)


# Workers of a Ray


@contextmanager
def use_forks(fork: Callable[..., int] | None = None) -> Iterator[None]:
    """Let the workers of a Ray that this process starts in a with block be forks, which cannot use a GPU.

    On other systems than Linux, they are new processes.

    Args:
        fork: calls a function in a fork and returns its process ID. By default, a fork of the fork server.
    """
    from ray._private import parameter

    if sys.platform != "linux":
        yield
        return
    with socket.socket(socket.AF_UNIX) as listener:
        name = f"redux-{os.getpid()}-{os.urandom(8).hex()}"
        listener.bind(f"\0{name}")
        listener.listen(1000)
        server = psutil.Process((fork or _fork_the_server)(_serve, listener, os.getpid()))
    parameters = partial(parameter.RayParams, setup_worker_path=WORKER_SCRIPT)
    try:
        with patch.object(parameter, "RayParams", parameters), patch.dict(os.environ, {WORKER_SERVER: name}):
            yield
    finally:
        _kill(server)


def _kill(server: psutil.Process) -> None:
    """Kill a process and its forks, and wait for their end."""
    with suppress(psutil.NoSuchProcess):
        processes = [server, *server.children()]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=ENDING_S)


def _fork_the_server(work: Callable[..., Any], *args: Any) -> int:
    """Call a function in a fork of the fork server."""
    process = start_fork(work, *args)
    assert process.pid
    return process.pid


def _fork_this_process(work: Callable[..., Any], *args: Any) -> int:
    """Call a function in a fork of this process, which has imported the modules."""
    if process := os.fork():
        return process
    _end_after(lambda: work(*args))


def _serve(listener: socket.socket, owner: int) -> None:
    """Fork a worker for each request, until the owner of this server and all raylets with workers end.

    Workers are killed when their raylet ends.
    """
    # Signals to the group of the owner are not for workers. The session is that of the owner.
    os.setpgrp()
    # Nobody waits for the workers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    processes = {owner: os.pidfd_open(owner)}
    workers: dict[int, list[int]] = {owner: []}
    while processes:
        ready, _, _ = select.select([listener, *processes.values()], [], [])
        for process in [process for process, descriptor in processes.items() if descriptor in ready]:
            os.close(processes.pop(process))
            for worker in workers.pop(process):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(worker, signal.SIGKILL)
                os.close(worker)
        if listener in ready:
            raylet, worker = _fork_worker(listener)
            if raylet not in processes:
                processes[raylet], workers[raylet] = os.pidfd_open(raylet), []
            workers[raylet].append(os.pidfd_open(worker))


def _fork_worker(listener: socket.socket) -> tuple[int, int]:
    """Fork a worker for a request, and return the process IDs of its raylet and of the worker."""
    request, _ = listener.accept()
    with request:
        _, descriptors, _, _ = socket.recv_fds(request, 1, 3)
        with request.makefile() as file:
            words, environment, folder, mask = json.load(file)
    worker = os.fork()
    if worker == 0:
        listener.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        _end_after(lambda: _run_worker(words, environment, folder, mask))
    for descriptor in descriptors:
        os.close(descriptor)
    return int(environment["RAY_RAYLET_PID"]), worker


def _run_worker(words: list[str], environment: dict[str, str], folder: str, mask: list[int]) -> None:
    """Run the command of a worker in this process, as ray/_private/workers/setup_worker.py does in a new one."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    # Ray ends the process group of a worker with the worker.
    os.setpgrp()
    os.chdir(folder)
    _replace_environment(environment)
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
