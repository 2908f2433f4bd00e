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

RUN = "redux_run"
"""Key in a submission's metadata of the name of its run."""

ADDRESS = "RAY_API_SERVER_ADDRESS"

STOP = "RAY_JOB_STOP_WAIT_TIME_S"
"""The variable from which Ray reads how long a job has after SIGTERM; without it, RAY_STOP_S."""

RAY_STOP_S = 3

UNKNOWN = "does not exist"
"""In what Ray answers about a job that it does not know."""

RECONNECTS = 8
"""How often in a row a lost connection is made again; waits double from 2 s to 30 s, two minutes in all."""

TOKEN = (
    "RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN, in the file of RAY_AUTH_TOKEN_PATH, or in "
    "~/.ray/auth_token"
)


# --- to a cluster -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connect(address: str) -> Iterator[JobSubmissionClient]:
    """Connect to the cluster at an address; ValueError in one line for any failure of a request."""
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
    """Check an address; ValueError if it is none, or if others could read the token and variables on the way."""
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


def find_run_name(job: JobDetails) -> str | None:
    """Return the name of the run of a job; None if the job was not submitted by Redux."""
    return (job.metadata or {}).get(RUN)


def find_exit_code(job: JobDetails) -> int:
    """Return the exit code of a job: 0 while it is active, 130 if it was stopped, 1 if it failed without a code."""
    if job.status == JobStatus.STOPPED:
        return EXIT_INTERRUPTED
    if job.status != JobStatus.FAILED:
        return 0
    code = job.driver_exit_code or 1
    return code if code > 0 else 128 - code  # by a signal, as a shell reports it


def follow(client: JobSubmissionClient, id: str, write_text: Callable[[str], None]) -> JobDetails:
    """Print the log of a job until it ends; returns its final status.

    A lost connection is made again, and lines that were printed are not repeated.
    """
    import aiohttp

    printed = failures = 0

    async def tail() -> None:
        nonlocal printed, failures
        seen = 0
        async for text in client.tail_job_logs(id):
            new = text[max(printed - seen, 0) :]
            seen += len(text)
            if new:
                write_text(new)
                printed, failures = seen, 0

    while True:
        try:
            job = client.get_job_info(id)
            asyncio.run(tail())
            job = client.get_job_info(id)
            if job.status.is_terminal():
                return job
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            failures += 1
            if failures > RECONNECTS or UNKNOWN in str(error):
                raise
        time.sleep(min(2**failures, 30))


def print_log(text: str) -> None:
    print(text, end="", flush=True)


def report_detached(id: str, address: str) -> int:
    """Tell an interrupted user that the job itself continues; returns the exit code."""
    print(
        f"redux: {id} goes on without this; redux jobs logs {id} -f shows it, redux jobs stop {id} ends it, both with "
        f"--address {address}",
        file=sys.stderr,
    )
    return EXIT_INTERRUPTED


# --- redux jobs -------------------------------------------------------------------------------------------------------


def listing(address: str) -> int:
    """Print the jobs of a cluster as a table, oldest first."""
    with connect(address) as client:
        jobs = [job for job in client.list_jobs() if job.submission_id]
    rows: list[tuple[str, ...]] = [("ID", "NAME", "STATUS", "SINCE", "DURATION", "MESSAGE")]
    rows += [_row(job) for job in sorted(jobs, key=lambda job: job.start_time or 0)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _check_id(id: str) -> None:
    """Check an id; ValueError if it is none, because Ray puts it into a URL unchanged."""
    if not re.fullmatch(r"[^\s/?#%]+", id):
        raise ValueError(f"ID: got {id or 'nothing'}, allowed: one that redux jobs list shows")


def status(address: str, id: str) -> int:
    """Print the status of a job in one line; returns the exit code of the job."""
    _check_id(id)
    with connect(address) as client:
        job = client.get_job_info(id)
    print(describe_status(job))
    return find_exit_code(job)


def logs(address: str, id: str, to_the_end: bool) -> int:
    """Print the log of a job so far, or until it ends; then returns the exit code of the job."""
    _check_id(id)
    with connect(address) as client:
        if not to_the_end:
            print_log(client.get_job_logs(id))
            return 0
        try:
            return find_exit_code(follow(client, id, print_log))
        except KeyboardInterrupt:
            return report_detached(id, address)


def stop(address: str, id: str) -> int:
    """Stop a job and wait until it has ended."""
    _check_id(id)
    with connect(address) as client:
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
    print(describe_status(job))
    return 0


def describe_status(job: JobDetails) -> str:
    """Describe the status of a job in one line."""
    id, name, status, since, duration, message = _row(job)
    return f"{id} is {status} (run {name}, since {since}, {duration}): {message}"


def _row(job: JobDetails) -> tuple[str, ...]:
    begun = datetime.datetime.fromtimestamp((job.start_time or 0) / 1000).astimezone()
    ended = datetime.datetime.fromtimestamp(job.end_time / 1000).astimezone() if job.end_time else None
    lasted = (ended or datetime.datetime.now().astimezone()) - begun
    return (
        job.submission_id or "-",
        find_run_name(job) or "-",
        str(job.status),
        begun.strftime("%Y-%m-%d %H:%M"),
        str(datetime.timedelta(seconds=max(round(lasted.total_seconds()), 0))),
        # of a failed job, its whole log would follow
        (job.message or "-").partition("\n")[0].partition(", last available logs")[0],
    )
