"""`redux jobs …`: what was submitted to a Ray cluster, through Ray's Jobs API.

The token and what a job is given go with the requests, so these go nowhere in clear but to this machine or a private
network, and through no proxy. Whatever the cluster answers, or does not, is told in one line. Nothing of a job itself
is imported, so that these verbs are quick.
"""

import asyncio
import contextlib
import datetime
import ipaddress
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.exit_codes import EXIT_INTERRUPTED
from redux.extras import write_install_command

RUN = "redux_run"
"""Key in a submission's metadata of the name of its run."""

ADDRESS = "RAY_API_SERVER_ADDRESS"

STOP = "RAY_JOB_STOP_WAIT_TIME_S"
"""The variable from which Ray reads how long a job has after SIGTERM; without it, RAY_STOP_S."""

RAY_STOP_S = 3

UNKNOWN = "does not exist"
"""In what Ray answers about a job that it does not know."""

TRIES = 8
"""How often in a row a lost connection is made again; waits double from 2 s to 30 s, two minutes in all."""

TOKEN = (
    "RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN, in the file of RAY_AUTH_TOKEN_PATH, or in "
    "~/.ray/auth_token"
)


# --- to a cluster -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(address: str) -> Iterator[JobSubmissionClient]:
    """Who speaks with the cluster at an address; ValueError, in one line, for whatever it does not answer."""
    if find_spec("aiohttp") is None or find_spec("requests") is None:
        raise ValueError(f"jobs on a cluster need more packages: {write_install_command('cluster')}")
    import aiohttp

    address = address.rstrip("/")
    _check_address(address)
    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    os.environ[ADDRESS] = address  # Ray's client takes this, or RAY_ADDRESS, before what it is told
    if address.startswith("http:"):
        os.environ["no_proxy"] = "*"  # a proxy could read all of it
    try:
        yield JobSubmissionClient(address)
    except AuthenticationError as error:
        wrong = "another than its token" if "403" in str(error) or "Authentication failed" in str(error) else "no token"
        raise ValueError(f"{address}: refused, got {wrong}, allowed: {TOKEN}") from None
    except (OSError, aiohttp.ClientError) as error:
        raise ValueError(
            f"{address}: no Ray answers here, allowed: where its dashboard does ({_last(error)})"
        ) from None
    except RuntimeError as error:  # what the cluster says, perhaps a traceback
        if "No available agent" in str(error):
            raise ValueError(
                f"{address}: the head's dashboard agent is not there; perhaps another Ray of its machine has the port, "
                "allowed: ray start --head --dashboard-agent-listen-port with one that is free"
            ) from None
        raise ValueError(f"{address}: {_last(error)}") from None


def _last(error: Exception) -> str:
    text = re.sub(r"^Request failed with status code \d+: ", "", str(error).strip().removesuffix("."))
    return (text.strip().splitlines() or [type(error).__name__])[-1]


def _check_address(address: str) -> None:
    """ValueError where it is none, or where a token and a job's variables would be seen by others on their way."""
    wrong = ValueError(f"--address: got {address}, allowed: http://HOST:PORT or https://HOST:PORT")
    try:
        parts = urlsplit(address)
        places = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.username or parts.password:
        raise ValueError(f"--address: got a password in it, allowed: {TOKEN}")
    if parts.scheme not in ("http", "https") or None in places or parts.path or parts.query or parts.fragment:
        raise wrong
    if parts.scheme == "https":
        return
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(parts.hostname, None)}
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{address}: no Ray answers here, allowed: where its dashboard does ({error})") from None
    if any(ipaddress.ip_address(str(one).partition("%")[0]).is_global for one in found):
        raise ValueError(
            f"--address: got {address}, allowed: https, a private network or a tunnel to this machine, as others could "
            "read the token and what a job is given on their way"
        )


# --- what was submitted -----------------------------------------------------------------------------------------------


def run_of(job: JobDetails) -> str | None:
    """The name of its run; None of a job that was not submitted here."""
    return (job.metadata or {}).get(RUN)


def exit_code(job: JobDetails) -> int:
    """That of the job: 0 also while it lives, 130 where it was stopped, 1 where it failed without one."""
    if job.status == JobStatus.STOPPED:
        return EXIT_INTERRUPTED
    if job.status != JobStatus.FAILED:
        return 0
    code = job.driver_exit_code or 1
    return code if code > 0 else 128 - code  # by a signal, as a shell reports it


def follow(client: JobSubmissionClient, id: str, say: Callable[[str], None]) -> JobDetails:
    """Hand on the log of a job until it has ended; returns how it did.

    A connection that is lost is made again, and what was said is not said twice.
    """
    import aiohttp

    said = failures = 0

    async def tail() -> None:
        nonlocal said, failures
        seen = 0
        async for text in client.tail_job_logs(id):
            new = text[max(said - seen, 0) :]
            seen += len(text)
            if new:
                say(new)
                said, failures = seen, 0

    while True:
        try:
            job = client.get_job_info(id)
            asyncio.run(tail())
            job = client.get_job_info(id)
            if job.status.is_terminal():
                return job
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            failures += 1
            if failures > TRIES or UNKNOWN in str(error):
                raise
        time.sleep(min(2**failures, 30))


def show(text: str) -> None:
    print(text, end="", flush=True)


def goes_on(id: str, address: str) -> int:
    """Say to whom was interrupted that a job was not; returns the exit code."""
    print(
        f"redux: {id} goes on without this; redux jobs logs {id} -f shows it, redux jobs stop {id} ends it, both with "
        f"--address {address}",
        file=sys.stderr,
    )
    return EXIT_INTERRUPTED


# --- redux jobs -------------------------------------------------------------------------------------------------------


def listing(address: str) -> int:
    """Print the cluster's jobs as a table, the oldest first."""
    with cluster(address) as client:
        jobs = [job for job in client.list_jobs() if job.submission_id]
    rows: list[tuple[str, ...]] = [("ID", "NAME", "STATUS", "SINCE", "DURATION", "MESSAGE")]
    rows += [_row(job) for job in sorted(jobs, key=lambda job: job.start_time or 0)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _check_id(id: str) -> None:
    """ValueError where it is none: Ray would put it into a URL as it is."""
    if not re.fullmatch(r"[^\s/?#%]+", id):
        raise ValueError(f"ID: got {id or 'nothing'}, allowed: one that redux jobs list shows")


def status(address: str, id: str) -> int:
    """Print how a job does in one line; its exit code is the job's."""
    _check_id(id)
    with cluster(address) as client:
        job = client.get_job_info(id)
    print(line(job))
    return exit_code(job)


def logs(address: str, id: str, to_the_end: bool) -> int:
    """Print what a job said so far, or until it has ended; then the exit code is the job's."""
    _check_id(id)
    with cluster(address) as client:
        if not to_the_end:
            show(client.get_job_logs(id))
            return 0
        try:
            return exit_code(follow(client, id, show))
        except KeyboardInterrupt:
            return goes_on(id, address)


def stop(address: str, id: str) -> int:
    """Stop a job, and wait until it has stopped."""
    _check_id(id)
    with cluster(address) as client:
        job = client.get_job_info(id)
        if not job.status.is_terminal():
            grace = ((job.runtime_env or {}).get("env_vars") or {}).get(STOP, RAY_STOP_S)
            print(f"{id} is to stop; for a checkpoint it has up to {grace} s", flush=True)
            client.stop_job(id)
            try:
                job = follow(client, id, lambda text: None)
            except KeyboardInterrupt:
                print(f"redux: {id} stops without this", file=sys.stderr)
                return EXIT_INTERRUPTED
    print(line(job))
    return 0


def line(job: JobDetails) -> str:
    """How a job does."""
    id, name, status, since, duration, message = _row(job)
    return f"{id} is {status} (run {name}, since {since}, {duration}): {message}"


def _row(job: JobDetails) -> tuple[str, ...]:
    begun = datetime.datetime.fromtimestamp((job.start_time or 0) / 1000).astimezone()
    ended = datetime.datetime.fromtimestamp(job.end_time / 1000).astimezone() if job.end_time else None
    lasted = (ended or datetime.datetime.now().astimezone()) - begun
    return (
        job.submission_id or "-",
        run_of(job) or "-",
        str(job.status),
        begun.strftime("%Y-%m-%d %H:%M"),
        str(datetime.timedelta(seconds=max(round(lasted.total_seconds()), 0))),
        # of a failed job, its whole log would follow
        (job.message or "-").partition("\n")[0].partition(", last available logs")[0],
    )
