"""The Ray that a run uses: the one that RAY_ADDRESS names, or one of its own that ends with it.

Who reaches a Ray runs what they like on it.  One's own therefore listens on loopback alone, asks for a token and shows
no dashboard; a named one must ask for a token where its address is a public one.
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
from ray.exceptions import AuthenticationError
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from pipelines import interrupts

# read by libraries here and in every worker; a task is one thread, so tokenizers must not start more
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_AIR_NEW_OUTPUT": "0",  # of Tune, which would print tables in between
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed; Ray's own is 2
    # how long workers wait for machines of which one has just died, before others are looked for; Ray's own is 60
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # how soon a notice is heard; Ray's own is 5 of perhaps 30
}


REACH_S = 10
"""Until a named Ray counts as not there."""

END_S = 10
"""For the kernel to end killed processes."""

LOOK_S = 1
"""Between looks whether the head of a named Ray is there."""

GONE = (
    "the head of the cluster at {}:{} is gone; if it stays away, Ray ends this command within a minute. The same "
    "command goes on from the last checkpoint"
)

MAX_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path of a Unix socket."""

LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Longest path of a socket in the folder of a Ray."""

SETTINGS = b"\x04"
"""Type of the frame that both sides of HTTP/2 send first (RFC 9113, section 6.5)."""

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)
"""First bytes of a client of HTTP/2, on which gRPC runs (RFC 9113, section 3.4): magic text and empty settings."""

LO = "lo0" if sys.platform == "darwin" else "lo"

LOOPBACK = {
    # Ray on Linux takes the machine's address wherever 127.0.0.1 is asked for, unless told to be as elsewhere
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    "GLOO_SOCKET_IFNAME": LO,  # workers among each other
    "NCCL_SOCKET_IFNAME": LO,
}
"""What keeps a Ray and its workers on this machine."""


@contextmanager
def session() -> Iterator[None]:
    """Ray for the length of a with block, quiet but for progress bars and errors; one within another is the same.

    ValueError where RAY_ADDRESS names a Ray that cannot be reached, or one at a public address without a token.
    """
    if ray.is_initialized():
        yield
        return
    environment = {name: os.environ.setdefault(name, value) for name, value in ENVIRONMENT.items()}
    disable_progress_bar()  # of transformers, which would show one for each file it reads
    with _private() if is_own() else _named(os.environ["RAY_ADDRESS"]) as settings:
        try:
            _connect(runtime_env={"env_vars": environment}, **settings)
            interrupts.check()
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors come back as exceptions
            ray.data.DataContext.get_current().enable_progress_bars = False  # each long step has a bar of its own
            yield
        finally:
            with interrupts.deferred():
                ray.shutdown()


def _connect(**settings: Any) -> None:
    """ray.init; ValueError where there is no Ray, or where it wants another token."""
    print("starting Ray" if is_own() else f"connecting to Ray at {settings['address']}", flush=True)
    try:
        # Ray 2.60 would put two handlers of its own for SIGTERM in place, one of which exits with 15, the other with a
        # stack trace; and a Ray that is started by half could not be ended in order, while a named one may take long
        with (
            patch.object(ray_utils, "set_sigterm_handler"),
            patch.object(ray_constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", True),
            interrupts.deferred() if is_own() else nullcontext(),
        ):
            # what went wrong in a worker comes back as an exception
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **settings)
    except Exception as error:
        if "timed out during startup" in str(error):  # Ray 2.60 raises Exception itself, after 30 s
            raise TimeoutError("Ray did not start in time, as on a machine with too much other work") from None
        if is_own() or not isinstance(error, ConnectionError | RuntimeError | AuthenticationError):
            raise
        why = " ".join(str(error).split())
        raise ValueError(f"RAY_ADDRESS: {os.environ['RAY_ADDRESS']}: {why}") from None


@contextmanager
def _private() -> Iterator[dict[str, Any]]:
    """Settings of a Ray that only this process and its children reach, and the environment that makes it so.

    No process of it is left afterwards. Its folder, with its logs, is left where an error ended it that the user cannot
    do anything about.
    """
    wanted = {**LOOPBACK, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **_find_short_folder()}
    before = {name: os.environ.get(name) for name in wanted}
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(wanted)
    ray_constants.ENABLE_RAY_CLUSTER = False  # this process has read the variable
    _reread()
    folders, keep = set(_folders()), False
    try:
        with _own_sessions():
            yield {"address": "local", "include_dashboard": False}
    except Exception as error:
        keep = not isinstance(error, ValueError)
        raise
    finally:
        if not keep:
            _remove_folders(set(_folders()) - folders)
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _reread()


def _find_short_folder() -> dict[str, str]:
    """Environment that moves Ray's folder to /tmp where TMPDIR is too long a path for its sockets.

    Schedulers give a job such a TMPDIR. ValueError where RAY_TMPDIR itself is too long.
    """
    longest = Path(get_default_ray_temp_dir(), LONGEST_SOCKET)
    excess = len(os.fsencode(longest)) - MAX_SOCKET_BYTES
    if excess <= 0:
        return {}
    if own := os.environ.get("RAY_TMPDIR"):
        raise ValueError(f"RAY_TMPDIR: got {own}, allowed: a path that is {excess} bytes shorter, for Ray's sockets")
    return {"RAY_TMPDIR": "/tmp"}


@contextmanager
def _own_sessions() -> Iterator[None]:
    """Keep signals from the processes that Ray starts here, and end all of them, with what they started.

    Each gets a session of its own. In that of this process they would get the signals of its process group: Ctrl-C in a
    terminal, SIGTERM of `timeout` and of schedulers. They would die before a checkpoint is made. They also block these
    signals, and so does what they start: systemd sends SIGTERM to every process of a service.

    The kernel kills them if this process is killed (PR_SET_PDEATHSIG). Where it has no such thing, Ray has a process
    that ends the process group, so there they stay in it.
    """
    started = list[int]()

    class Process(services.ConsolePopen):
        def __init__(self, *args: Any, preexec_fn: Callable[[], None], **kwargs: Any) -> None:
            def prepare() -> None:
                preexec_fn()
                signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)

            super().__init__(*args, start_new_session=True, preexec_fn=prepare, **kwargs)
            started.append(self.pid)

        def terminate(self) -> None:
            self.kill()

    if not ray_utils.detect_fate_sharing_support():
        yield
        return
    with patch.object(services, "ConsolePopen", Process):
        try:
            yield
        finally:
            with interrupts.deferred():
                _end(started)


def _end(sessions: list[int]) -> None:
    """Kill the processes of these sessions: Ray's agents would only notice after a minute that the rest is gone."""
    left = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) in sessions:
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=END_S)


def _folders() -> list[Path]:
    """Folders of the Rays that this process has started."""
    return list(Path(get_default_ray_temp_dir()).glob(f"session_*_{os.getpid()}"))


def _remove_folders(folders: set[Path]) -> None:
    latest = Path(get_default_ray_temp_dir(), "session_latest")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        if latest.is_symlink() and latest.resolve() == folder.resolve():
            latest.unlink(missing_ok=True)


def _reread() -> None:
    """Ray's C++ side keeps what it read of the environment: the mode, and the token."""
    _raylet.Config.initialize("")  # type: ignore[attr-defined]
    _raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


@contextmanager
def _named(address: str) -> Iterator[dict[str, Any]]:
    """Settings of the Ray at HOST:PORT, whose head is kept an eye on.

    ValueError where nothing listens there, where one of the two wants TLS and the other does not take it, or where the
    host is on no private network and Ray's token authentication is off: whoever finds the port could run what they
    like.
    """
    if address == "auto":
        address = _find_address()
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"RAY_ADDRESS: got {address}, allowed: HOST:PORT, auto or local")
    place = host.strip("[]"), int(port)
    try:
        ip = _answers(place)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"RAY_ADDRESS: nothing answers at {address}: {why}") from None
    if ipaddress.ip_address(ip).is_global and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise ValueError(
            f"RAY_ADDRESS: {address} is {ip}, a public address, without a token; allowed: a private or loopback "
            "address, or RAY_AUTH_MODE=token here and where the cluster is started"
        )
    _agree_on_tls(address, place)
    _check_protocol(address, place)
    over = threading.Event()
    threading.Thread(target=_watch, args=(place, over), daemon=True).start()
    try:
        yield {"address": address}
    finally:
        over.set()


def _find_address() -> str:
    """Find the address of the Ray that was last started on this machine, perhaps one that has ended since.

    Ray itself would try to reach that for more than a minute.
    """
    if address := ray_utils.read_ray_address():
        return str(address)
    raise ValueError(
        "RAY_ADDRESS: got auto, and no Ray was started on this machine, allowed: HOST:PORT of one, or none, and the "
        "command starts its own"
    )


def _answers(place: tuple[str, int]) -> str:
    """Whose address it is; OSError where nobody takes the call."""
    with socket.create_connection(place, REACH_S) as call:
        return str(call.getpeername()[0]).partition("%")[0]


def _uses_tls() -> bool:
    """Tell if the environment turns on Ray's TLS."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _agree_on_tls(address: str, place: tuple[str, int]) -> None:
    """ValueError where Ray's channels would not come about: it would try for a minute, and end the process."""
    wanted = _uses_tls()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if wanted:
        try:
            context.load_verify_locations(os.environ["RAY_TLS_CA_CERT"])
            own = os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"]
            context.load_cert_chain(*own, password="")  # else it would be asked for at the terminal
        except (KeyError, OSError) as error:
            raise ValueError(
                f"RAY_USE_TLS: got {error!r}, allowed: with RAY_TLS_CA_CERT, RAY_TLS_SERVER_CERT and "
                "RAY_TLS_SERVER_KEY, files in PEM form"
            ) from None
    else:  # only whether it would answer
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    answered = False
    try:
        with (
            socket.create_connection(place, REACH_S) as call,
            context.wrap_socket(call, server_hostname=place[0]) as tls,
        ):
            answered = True
            if not tls.recv(1):  # what it makes of the certificate comes after the handshake
                raise ConnectionError("it hung up, as on certificates that it does not trust")
    except OSError as error:
        if wanted:
            raise ValueError(f"RAY_ADDRESS: {address} and RAY_USE_TLS=1 here: {error}, allowed: TLS at both") from None
    if answered and not wanted:
        raise ValueError(f"RAY_ADDRESS: {address} asks for TLS, allowed: RAY_USE_TLS=1 and the cluster's certificates")


def _check_protocol(address: str, place: tuple[str, int]) -> None:
    """Check that a gRPC server listens; ValueError otherwise, since Ray would try to connect for minutes."""
    if _uses_tls():
        return  # the TLS handshake has agreed on HTTP/2
    answer = b""
    with suppress(OSError), socket.create_connection(place, REACH_S) as call:
        call.sendall(HTTP2_PREFACE)
        answer = call.makefile("rb").read(9)
    if answer[3:4] != SETTINGS:
        raise ValueError(
            f"RAY_ADDRESS: what listens at {address} is not the head of a Ray cluster, allowed: HOST:PORT that "
            "`ray start --head` printed (the port is 6379 if none was chosen)"
        )


def _watch(place: tuple[str, int], over: threading.Event) -> None:
    """Say it when the head is gone, and when it is back.

    Ray's C++ side waits a minute for it and then ends the process: nothing in Python is asked, so it is said before.
    """
    gone = False
    while not over.wait(LOOK_S):
        try:
            _answers(place)
        except OSError:
            if not gone:
                tqdm.write(f"redux: {GONE.format(*place)}", file=sys.stderr)
            gone = True
        else:
            if gone:
                tqdm.write(f"redux: the head of the cluster at {place[0]}:{place[1]} is back", file=sys.stderr)
            gone = False


def require(needed: Mapping[str, float], what: str) -> None:
    """ValueError where Ray runs on this machine alone and has less: what needs it would wait without end.

    needed: by Ray's names, CPU or GPU.
    """
    for name, count in needed.items():
        have = ray.cluster_resources().get(name, 0)
        if is_own() and have < count:
            raise ValueError(f"{what} needs {count:g} {name}s, allowed: {have:g}, which this machine has")


def count_places(gpu_share: float = 1) -> int:
    """Count the processes with a model that fit: one a GPU or share of one, without GPUs one a CPU.

    Each takes half a CPU, and one CPU is left to read data.
    """
    cpus, gpu_count = int(ray.cluster_resources().get("CPU", 1)), gpus()
    most = int(gpu_count / gpu_share) if gpu_count else cpus
    return max(min(most, 2 * (cpus - 1)), 1)


def describe_shortage() -> str:
    """Describe what Ray has no room for now, of all that it is to place together; "" where it lacks nothing."""
    groups = ray.util.placement_group_table().values()
    needed = Counter[str]()
    for group in groups:
        if group["state"] == "PENDING":
            for bundle in group["bundles"].values():
                needed.update(bundle)
    there, free = ray.cluster_resources(), ray.available_resources()
    lacking = [
        f"{count:g} {name}s: Ray has {there.get(name, 0):g}, of which {free.get(name, 0):g} are free"
        for name, count in needed.items()
        if free.get(name, 0) < count
    ]
    return f"waiting for {', and for '.join(lacking)}" if lacking else ""


def gpus() -> float:
    """GPUs that Ray has."""
    return float(ray.cluster_resources().get("GPU", 0))


def is_own() -> bool:
    """Whether the run starts a Ray of its own, since none is named."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")
