"""Work with the jobs of a Ray cluster through Ray's Jobs API (`redux jobs`).

Requests carry the token and the variables of a job. So unencrypted requests go only to this machine or to a private
network, and never through a proxy. Every failure is reported in one line. This module imports no job code, so these
verbs answer quickly.
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

RUN_METADATA_KEY = "redux_run"
"""Key of a job's metadata with the name of its run."""

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""Environment variable with the address of a cluster."""

STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Environment variable of a job with the seconds that Ray waits between SIGTERM and SIGKILL."""

DEFAULT_STOP_WAIT_S = 3
"""Ray's default of that variable."""

UNKNOWN_JOB_TEXT = "does not exist"
"""Text in Ray's response about an unknown job."""

MAX_RECONNECTS = 8
"""Attempts in a row to restore a lost connection; waits double from 2 s to 30 s, two minutes in all."""

TOKEN_SOURCES = (
    "RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN, in the file of RAY_AUTH_TOKEN_PATH, or in "
    "~/.ray/auth_token"
)


# --- connection -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connect(address: str) -> Iterator[JobSubmissionClient]:
    """Connect to the cluster at an address; ValueError in one line for any failure of a request."""
    if find_spec("aiohttp") is None or find_spec("requests") is None:
        raise ValueError(f"jobs on a cluster need more packages: {write_install_command('cluster')}")
    import aiohttp

    address = address.rstrip("/")
    _check_address(address)
    # Ray's clients log each upload, but a submission is reported in one line.
    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    os.environ[ADDRESS_VARIABLE] = address  # Ray's client prefers this variable, or RAY_ADDRESS, to its argument
    if address.startswith("http:"):
        os.environ["no_proxy"] = "*"  # Without encryption, a proxy could read the token
    try:
        yield JobSubmissionClient(address)
    except AuthenticationError as error:
        token = (
            "another token than that of the cluster"
            if "403" in str(error) or "Authentication failed" in str(error)
            else "no token"
        )
        raise ValueError(f"{address}: refused, got {token}, allowed: {TOKEN_SOURCES}") from None
    except (OSError, aiohttp.ClientError) as error:
        raise ValueError(
            f"{address}: no Ray answers here, allowed: the address of a Ray dashboard ({_extract_last_line(error)})"
        ) from None
    except RuntimeError as error:  # An error response of the cluster, perhaps with a traceback
        if "No available agent" in str(error):
            raise ValueError(
                f"{address}: the head has no dashboard agent; perhaps another Ray on its machine uses the port, "
                "allowed: ray start --head --dashboard-agent-listen-port with a free port"
            ) from None
        raise ValueError(f"{address}: {_extract_last_line(error)}") from None


def _extract_last_line(error: Exception) -> str:
    """Extract the last line of an error, which of a traceback is the message."""
    text = re.sub(r"^Request failed with status code \d+: ", "", str(error).strip().removesuffix("."))
    return (text.strip().splitlines() or [type(error).__name__])[-1]


def _check_address(address: str) -> None:
    """Check an address; ValueError if it is wrong, or if others could read the token and variables on the network."""
    malformed = ValueError(f"--address: got {address}, allowed: http://HOST:PORT or https://HOST:PORT")
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise malformed from None
    if parts.username or parts.password:
        raise ValueError(f"--address: got a password in it, allowed: {TOKEN_SOURCES}")
    if parts.scheme not in ("http", "https") or None in (host, port) or parts.path or parts.query or parts.fragment:
        raise malformed
    if parts.scheme == "https":
        return
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{address}: no Ray answers here, allowed: the address of a Ray dashboard ({error})") from None
    # An IPv6 address may end with %interface.
    if any(ipaddress.ip_address(str(ip).partition("%")[0]).is_global for ip in addresses):
        raise ValueError(
            f"--address: got {address}, allowed: https, a private network or a tunnel to this machine, because others "
            "could read the token and the variables of a job on the network"
        )


# --- jobs -------------------------------------------------------------------------------------------------------------


def find_run_name(job: JobDetails) -> str | None:
    """Return the name of the run of a job; None if the job was not submitted by Redux."""
    return (job.metadata or {}).get(RUN_METADATA_KEY)


def find_exit_code(job: JobDetails) -> int:
    """Return the exit code of a job: 0 while it is active, 130 if it was stopped, 1 if it failed without a code."""
    if job.status == JobStatus.STOPPED:
        return EXIT_INTERRUPTED
    if job.status != JobStatus.FAILED:
        return 0
    code = job.driver_exit_code or 1
    return code if code > 0 else 128 - code  # By a signal, as a shell reports it


def follow(client: JobSubmissionClient, job_id: str, write_text: Callable[[str], None]) -> JobDetails:
    """Write the log of a job until it ends; returns its final status.

    A lost connection is restored, and text that was written is not repeated.
    """
    import aiohttp

    printed = failures = 0

    async def tail() -> None:
        nonlocal printed, failures
        received = 0
        async for text in client.tail_job_logs(job_id):
            # A new connection sends the log from its beginning.
            new = text[max(printed - received, 0) :]
            received += len(text)
            if new:
                write_text(new)
                printed, failures = received, 0

    while True:
        try:
            job = client.get_job_info(job_id)
            asyncio.run(tail())
            job = client.get_job_info(job_id)
            if job.status.is_terminal():
                return job
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            failures += 1
            # A cluster that was restarted does not know the job, and waiting does not bring it back.
            if failures > MAX_RECONNECTS or UNKNOWN_JOB_TEXT in str(error):
                raise
        time.sleep(min(2**failures, 30))


def print_log(text: str) -> None:
    """Print a piece of a log, which has its own line ends."""
    print(text, end="", flush=True)


def report_detached(job_id: str, address: str) -> int:
    """Tell an interrupted user that the job itself continues; returns the exit code."""
    print(
        f"redux: {job_id} continues on the cluster; redux jobs logs {job_id} -f shows it, redux jobs stop {job_id} "
        f"ends it, both with --address {address}",
        file=sys.stderr,
    )
    return EXIT_INTERRUPTED


# --- redux jobs -------------------------------------------------------------------------------------------------------


def print_jobs(address: str) -> int:
    """Print the jobs of a cluster as a table, oldest first."""
    with connect(address) as client:
        jobs = [job for job in client.list_jobs() if job.submission_id]
    rows: list[tuple[str, ...]] = [("ID", "NAME", "STATUS", "SINCE", "DURATION", "MESSAGE")]
    rows += [_build_row(job) for job in sorted(jobs, key=lambda job: job.start_time or 0)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _check_id(job_id: str) -> None:
    """Check the form of an id, because Ray puts it into a URL unchanged."""
    if not re.fullmatch(r"[^\s/?#%]+", job_id):
        raise ValueError(f"ID: got {job_id or 'nothing'}, allowed: an id that redux jobs list shows")


def print_status(address: str, job_id: str) -> int:
    """Print the status of a job in one line; returns the exit code of the job."""
    _check_id(job_id)
    with connect(address) as client:
        job = client.get_job_info(job_id)
    print(describe_status(job))
    return find_exit_code(job)


def print_logs(address: str, job_id: str, follow_to_end: bool) -> int:
    """Print the log of a job so far, or until it ends; then returns the exit code of the job."""
    _check_id(job_id)
    with connect(address) as client:
        if not follow_to_end:
            print_log(client.get_job_logs(job_id))
            return 0
        try:
            return find_exit_code(follow(client, job_id, print_log))
        except KeyboardInterrupt:
            return report_detached(job_id, address)


def stop_job(address: str, job_id: str) -> int:
    """Stop a job and wait until it has ended."""
    _check_id(job_id)
    with connect(address) as client:
        job = client.get_job_info(job_id)
        if not job.status.is_terminal():
            grace = ((job.runtime_env or {}).get("env_vars") or {}).get(STOP_WAIT_VARIABLE, DEFAULT_STOP_WAIT_S)
            print(f"{job_id} stops; it has up to {grace} s for a checkpoint", flush=True)
            client.stop_job(job_id)
            try:
                job = follow(client, job_id, lambda text: None)
            except KeyboardInterrupt:
                print(f"redux: {job_id} stops in the background", file=sys.stderr)
                return EXIT_INTERRUPTED
    print(describe_status(job))
    return 0


def describe_status(job: JobDetails) -> str:
    """Describe the status of a job in one line."""
    job_id, name, status, since, duration, message = _build_row(job)
    return f"{job_id} is {status} (run {name}, since {since}, {duration}): {message}"


def _build_row(job: JobDetails) -> tuple[str, ...]:
    """Build the row of a job: id, name, status, start, duration, message."""
    start_time = datetime.datetime.fromtimestamp((job.start_time or 0) / 1000).astimezone()
    end_time = datetime.datetime.fromtimestamp(job.end_time / 1000).astimezone() if job.end_time else None
    duration = (end_time or datetime.datetime.now().astimezone()) - start_time
    return (
        job.submission_id or "-",
        find_run_name(job) or "-",
        str(job.status),
        start_time.strftime("%Y-%m-%d %H:%M"),
        str(datetime.timedelta(seconds=max(round(duration.total_seconds()), 0))),
        # The message of a failed job continues with its log.
        (job.message or "-").partition("\n")[0].partition(", last available logs")[0],
    )
