"""Connection to Ray: the cluster that RAY_ADDRESS names, or a private Ray that ends with the run.

Anyone who can connect to a Ray can run any code on it. A private Ray therefore listens on loopback only, requires a
token and shows no dashboard. A named cluster with a public address must require a token.
"""

import ipaddress
import logging
import os
import secrets
import shutil
import signal
import socket
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray
import ray.data
from ray import _raylet
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants, services
from ray._private import utils as ray_utils
from ray._private.node import Node
from ray.exceptions import AuthenticationError
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from pipelines.core import interrupts

LIBRARY_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # a task uses one thread
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_AIR_NEW_OUTPUT": "0",  # or Tune prints tables between our lines
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # delay until a dead worker is noticed; Ray's default is 2
    # Time that workers wait for a machine that has just died, before Ray looks for others; Ray's default is 60.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # a notice may come only 30 s ahead; Ray's default is 5
}
"""Variables that libraries read here and in every worker."""

CONNECT_TIMEOUT_S = 10
"""Time-out of a connection to a named cluster."""

MAX_START_ATTEMPTS = 3
"""Attempts to start a private Ray, which gives up after 30 s on an overloaded machine."""

KILL_TIMEOUT_S = 10
"""Time that the kernel gets to end killed processes."""

HEAD_POLL_S = 1
"""Interval between checks of the head of a named cluster."""

HEAD_GONE_MESSAGE = (
    "the head of the cluster at {}:{} is gone; if it does not come back, Ray ends this command within a minute. The "
    "same command continues from the last checkpoint"
)

MAX_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""Maximum length of the path of a Unix socket."""

LONGEST_SOCKET_PATH = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Longest relative path of a socket in Ray's folder."""

HTTP2_SETTINGS_TYPE = b"\x04"
"""Type of the SETTINGS frame, which both sides of HTTP/2 send first (RFC 9113, section 6.5)."""

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + HTTP2_SETTINGS_TYPE + bytes(5)
"""First bytes of an HTTP/2 client (RFC 9113, section 3.4): magic text and empty settings. gRPC runs on HTTP/2."""

LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"

LOOPBACK_ENVIRONMENT = {
    # On Linux, Ray replaces 127.0.0.1 by the machine's address unless this is "0", as on other systems.
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    "GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE,  # connections between workers
    "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE,
}
"""Environment that keeps Ray and its workers on the loopback interface."""

UNUSED_SERVICES_ENVIRONMENT = {
    # This actor asks Ray each second if a machine will be preempted; nobody tells a private Ray.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Environment that turns off services of which a private Ray has no use. On two cores each one slows the workers."""


@contextmanager
def open_session() -> Iterator[None]:
    """Connect to Ray for the length of a with block. A nested block reuses the session.

    Ray prints nothing but progress bars and errors.

    Raises:
        ValueError: RAY_ADDRESS names a cluster that cannot be reached, or one at a public address without a token.
        TimeoutError: a private Ray did not start in time.
    """
    if ray.is_initialized():
        yield
        return
    environment = {name: os.environ.setdefault(name, value) for name, value in LIBRARY_ENVIRONMENT.items()}
    disable_progress_bar()  # transformers would show one bar per file that it reads
    settings_context = _private_settings() if is_private() else _cluster_settings(os.environ["RAY_ADDRESS"])
    with settings_context as settings:
        try:
            # A private Ray inherits the variables. A runtime environment there would make the workers useless that Ray
            # starts in advance, one for each CPU.
            _connect(runtime_env=None if is_private() else {"env_vars": environment}, **settings)
            interrupts.raise_if_interrupted()
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised here as exceptions
            ray.data.DataContext.get_current().enable_progress_bars = False  # long steps have bars of ours
            yield
        finally:
            with interrupts.defer_signals():
                ray.shutdown()


def _connect(**settings: Any) -> None:
    """Call ray.init. Raise ValueError if there is no Ray, or if it requires another token."""
    print("starting Ray" if is_private() else f"connecting to Ray at {settings['address']}", flush=True)
    for attempt in range(1, MAX_START_ATTEMPTS + 1):
        try:
            # Ray 2.60 installs two SIGTERM handlers: one exits with 15, the other prints a stack trace. Both are
            # disabled. Signals wait while a private Ray starts, since a half-started Ray cannot be stopped cleanly.
            # Connecting to a named cluster may take long, so there they do not wait.
            with (
                patch.object(ray_utils, "set_sigterm_handler"),
                patch.object(ray_constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", True),
                interrupts.defer_signals() if is_private() else nullcontext(),
            ):
                # Errors of workers are raised here as exceptions, so their logs are not needed.
                ray.init(logging_level=logging.ERROR, log_to_driver=False, **settings)
            return
        except Exception as error:
            if "timed out during startup" in str(error):  # Ray 2.60 raises a bare Exception after 30 s
                interrupts.raise_if_interrupted()
                ray.shutdown()
                if attempt < MAX_START_ATTEMPTS:
                    print("Ray did not start within 30 s; trying again", flush=True)
                    continue
                raise TimeoutError("Ray did not start in time; the machine may be overloaded") from None
            if is_private() or not isinstance(error, ConnectionError | RuntimeError | AuthenticationError):
                raise
            reason = " ".join(str(error).split())
            raise ValueError(f"RAY_ADDRESS: {os.environ['RAY_ADDRESS']}: {reason}") from None


@contextmanager
def _private_settings() -> Iterator[dict[str, Any]]:
    """Set up the environment of a private Ray, and yield its arguments of ray.init.

    Only this process and its children can connect to a private Ray. All its processes are ended afterwards. Its folder
    with the logs stays only after an error that the user cannot fix (anything but ValueError).
    """
    environment = {
        **LOOPBACK_ENVIRONMENT,
        **UNUSED_SERVICES_ENVIRONMENT,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **_find_short_folder(),
    }
    before = {name: os.environ.get(name) for name in environment}
    enable_cluster = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(environment)
    ray_constants.ENABLE_RAY_CLUSTER = False  # ray read the variable when it was imported
    _reload_environment()
    folders = set(_list_session_folders())
    keep_folder = False
    try:
        with _isolate_processes(), omit_services():
            yield {"address": "local", "include_dashboard": False}
    except Exception as error:
        keep_folder = not isinstance(error, ValueError)
        raise
    finally:
        if not keep_folder:
            _remove_session_folders(set(_list_session_folders()) - folders)
        # Restore the environment, so that a later session may use a named cluster.
        ray_constants.ENABLE_RAY_CLUSTER = enable_cluster
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _reload_environment()


@contextmanager
def omit_services() -> Iterator[None]:
    """Start a Ray without the services that show or report its state, or scale a cluster (Ray 2.60).

    Each is a process that imports packages for a second of CPU or more. ray.init would wait for the API server.
    """
    with (
        # It would read the logs of all processes ten times a second, to print them here. Nothing is printed.
        patch.object(Node, "start_log_monitor"),
        # It would scale a cluster that does not exist.
        patch.object(Node, "start_monitor"),
        # The dashboard; without its frontend, it only reports usage to Ray's authors.
        patch.object(Node, "start_api_server"),
        # The agent of each node then does what it does where Ray is installed without `ray[default]`.
        patch.object(ray_utils, "get_dashboard_dependency_error", return_value=ImportError("not needed")),
    ):
        yield


def _find_short_folder() -> dict[str, str]:
    """Return the variable that moves Ray's folder to /tmp if TMPDIR is too long a path for Ray's sockets.

    Some schedulers give jobs such a TMPDIR. ValueError if RAY_TMPDIR itself is too long.
    """
    longest = Path(get_default_ray_temp_dir(), LONGEST_SOCKET_PATH)
    excess = len(os.fsencode(longest)) - MAX_SOCKET_PATH_BYTES
    if excess <= 0:
        return {}
    if ray_tmpdir := os.environ.get("RAY_TMPDIR"):
        raise ValueError(
            f"RAY_TMPDIR: got {ray_tmpdir}, allowed: a path that is {excess} bytes shorter, for Ray's sockets"
        )
    return {"RAY_TMPDIR": "/tmp"}


@contextmanager
def _isolate_processes() -> Iterator[None]:
    """Start Ray's processes in new sessions with signals blocked, and kill them and their children at the end.

    In this process's session they would get the signals of its process group: Ctrl-C in a terminal, SIGTERM of
    `timeout` and of schedulers. They would end before a checkpoint is written. They and their children also block
    these signals, because systemd sends SIGTERM to every process of a service.

    The kernel kills them if this process is killed (PR_SET_PDEATHSIG). On systems without that call, Ray has a process
    that ends the process group, so there they stay in the session of this process.
    """
    session_ids = list[int]()  # each also the id of the first process of the session

    class IsolatedProcess(services.ConsolePopen):
        def __init__(self, *args: Any, preexec_fn: Callable[[], None], **kwargs: Any) -> None:
            def prepare() -> None:  # runs in the child, between fork and exec
                preexec_fn()
                signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)

            super().__init__(*args, start_new_session=True, preexec_fn=prepare, **kwargs)
            session_ids.append(self.pid)

        def terminate(self) -> None:
            self.kill()

    if not ray_utils.detect_fate_sharing_support():
        yield
        return
    with patch.object(services, "ConsolePopen", IsolatedProcess):
        try:
            yield
        finally:
            with interrupts.defer_signals():
                _kill_sessions(session_ids)


def _kill_sessions(sessions: list[int]) -> None:
    """Kill the processes of these sessions. Ray's agents would notice only after a minute that the others are gone."""
    killed = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) in sessions:
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=KILL_TIMEOUT_S)


def _list_session_folders() -> list[Path]:
    """List the folders of Ray sessions that this process has started."""
    return list(Path(get_default_ray_temp_dir()).glob(f"session_*_{os.getpid()}"))


def _remove_session_folders(folders: set[Path]) -> None:
    latest = Path(get_default_ray_temp_dir(), "session_latest")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        if latest.is_symlink() and latest.resolve() == folder.resolve():
            latest.unlink(missing_ok=True)


def _reload_environment() -> None:
    """Let Ray's C++ side read the authentication mode and the token again: it caches both."""
    _raylet.Config.initialize("")  # type: ignore[attr-defined]
    _raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


@contextmanager
def _cluster_settings(address: str) -> Iterator[dict[str, Any]]:
    """Check the cluster at HOST:PORT, watch its head in a thread, and yield the arguments of ray.init.

    Raises:
        ValueError: nothing listens there; only one side uses TLS; or the address is public and token authentication is
            off, so that anyone who finds the port could run any code.
    """
    if address == "auto":
        address = _find_address()
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"RAY_ADDRESS: got {address}, allowed: HOST:PORT, auto or local")
    endpoint = host.strip("[]"), int(port)
    try:
        ip = _resolve_peer(endpoint)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"RAY_ADDRESS: nothing answers at {address}: {reason}") from None
    if ipaddress.ip_address(ip).is_global and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise ValueError(
            f"RAY_ADDRESS: {address} is {ip}, a public address, without a token; allowed: a private or loopback "
            "address, or RAY_AUTH_MODE=token here and where the cluster is started"
        )
    # Ray itself would retry for minutes and then end the process, so TLS and the protocol are checked first.
    _check_tls(address, endpoint)
    _check_protocol(address, endpoint)
    stopped = threading.Event()
    threading.Thread(target=_watch_head, args=(endpoint, stopped), daemon=True).start()
    try:
        yield {"address": address}
    finally:
        stopped.set()


def _find_address() -> str:
    """Find the address of the Ray that was last started on this machine. It may have ended since.

    The caller checks the address, because Ray itself would retry for more than a minute.
    """
    if address := ray_utils.read_ray_address():
        return str(address)
    raise ValueError(
        "RAY_ADDRESS: got auto, and no Ray was started on this machine, allowed: HOST:PORT of a cluster, or unset to "
        "start a private Ray"
    )


def _resolve_peer(endpoint: tuple[str, int]) -> str:
    """Connect and return the IP address of the other side. OSError if nothing accepts the connection."""
    with socket.create_connection(endpoint, CONNECT_TIMEOUT_S) as connection:
        return str(connection.getpeername()[0]).partition("%")[0]


def _uses_tls() -> bool:
    """Return True if the environment turns on Ray's TLS."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _check_tls(address: str, endpoint: tuple[str, int]) -> None:
    """Raise ValueError if both sides do not agree on TLS. Ray would retry for a minute and then end the process."""
    uses_tls = _uses_tls()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    # Certificates are read as Ray reads them; without TLS here, only the other side's answer matters.
    if uses_tls:
        try:
            context.load_verify_locations(os.environ["RAY_TLS_CA_CERT"])
            certificate = os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"]
            context.load_cert_chain(*certificate, password="")  # without a password, OpenSSL asks at the terminal
        except (KeyError, OSError) as error:
            raise ValueError(
                f"RAY_USE_TLS: got {error!r}, allowed: with RAY_TLS_CA_CERT, RAY_TLS_SERVER_CERT and "
                "RAY_TLS_SERVER_KEY, files in PEM form"
            ) from None
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    # Do a handshake with the other side.
    answered = False
    try:
        with (
            socket.create_connection(endpoint, CONNECT_TIMEOUT_S) as connection,
            context.wrap_socket(connection, server_hostname=endpoint[0]) as tls,
        ):
            answered = True
            if not tls.recv(1):  # in TLS 1.3 a server rejects the client's certificate after the handshake
                raise ConnectionError("it closed the connection, as for certificates that it does not trust")
    except OSError as error:
        if uses_tls:
            raise ValueError(
                f"RAY_ADDRESS: {address} and RAY_USE_TLS=1 here: {error}, allowed: TLS on both sides"
            ) from None
    if answered and not uses_tls:
        raise ValueError(f"RAY_ADDRESS: {address} asks for TLS, allowed: RAY_USE_TLS=1 and the cluster's certificates")


def _check_protocol(address: str, endpoint: tuple[str, int]) -> None:
    """Raise ValueError if the server does not speak HTTP/2. Ray would retry for minutes to reach its head there."""
    if _uses_tls():
        return  # the server has chosen HTTP/2 in the TLS handshake
    answer = b""
    with suppress(OSError), socket.create_connection(endpoint, CONNECT_TIMEOUT_S) as connection:
        connection.sendall(HTTP2_PREFACE)
        answer = connection.makefile("rb").read(9)  # a frame's header: 3 bytes of length, then the type
    if answer[3:4] != HTTP2_SETTINGS_TYPE:
        raise ValueError(
            f"RAY_ADDRESS: the server at {address} is not the head of a Ray cluster, allowed: HOST:PORT that "
            "`ray start --head` printed (the port is 6379 if none was chosen)"
        )


def _watch_head(endpoint: tuple[str, int], stopped: threading.Event) -> None:
    """Print a line when the head of the cluster disappears, and another when it is back.

    Ray's C++ side waits a minute for the head and then ends the process without calling Python. The user must know the
    reason before that.
    """
    is_gone = False
    while not stopped.wait(HEAD_POLL_S):
        try:
            _resolve_peer(endpoint)
        except OSError:
            if not is_gone:
                tqdm.write(f"redux: {HEAD_GONE_MESSAGE.format(*endpoint)}", file=sys.stderr)
            is_gone = True
        else:
            if is_gone:
                tqdm.write(f"redux: the head of the cluster at {endpoint[0]}:{endpoint[1]} is back", file=sys.stderr)
            is_gone = False


def require_resources(needed: Mapping[str, float], consumer: str) -> None:
    """Raise ValueError if a private Ray has fewer resources than needed: the consumer would wait forever.

    Args:
        needed: amounts by Ray's names of resources, "CPU" or "GPU".
        consumer: name of the part that needs them, for the message.
    """
    for name, count in needed.items():
        available = ray.cluster_resources().get(name, 0)
        if is_private() and available < count:
            raise ValueError(f"{consumer} needs {count:g} {name}s, allowed: {available:g}, which this machine has")


def count_model_processes(gpu_share: float = 1) -> int:
    """Count the processes with a model that fit on the cluster.

    With GPUs, one process per GPU or share of a GPU; without, one per CPU. Each takes half a CPU, and one CPU is left
    for reading data.
    """
    cpus = int(ray.cluster_resources().get("CPU", 1))
    limit = count_processes_on_gpus(gpu_share) if count_gpus() else cpus
    return max(min(limit, 2 * (cpus - 1)), 1)


def count_processes_on_gpus(gpu_share: float) -> int:
    """Count the processes that fit on the GPUs of the cluster. Ray gives a process no parts of two GPUs."""
    return int(count_gpus()) * int(1 / gpu_share + 1e-6)  # 1 / (1 / 93) is less than 93


def count_local_cpus() -> int:
    """Count the CPUs of this machine that this process may use."""
    # macOS has no affinity of processes.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_shortage() -> str:
    """Describe the resources that pending placement groups still lack, or return "" if none is lacking."""
    needed = Counter[str]()
    for group in ray.util.placement_group_table().values():
        if group["state"] == "PENDING":
            for bundle in group["bundles"].values():
                needed.update(bundle)
    total, free = ray.cluster_resources(), ray.available_resources()
    lacking = [
        f"{count:g} {name}s: Ray has {total.get(name, 0):g}, of which {free.get(name, 0):g} are free"
        for name, count in needed.items()
        if free.get(name, 0) < count
    ]
    return f"waiting for {', and for '.join(lacking)}" if lacking else ""


def count_gpus() -> float:
    """Count the GPUs of the cluster."""
    return float(ray.cluster_resources().get("GPU", 0))


def is_private() -> bool:
    """Return True if the run starts a private Ray, because RAY_ADDRESS names no cluster."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")
