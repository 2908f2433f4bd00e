"""Submit a job to an existing Ray cluster through Ray's Jobs API (`redux submit`).

The job is checked here first. Then the current folder is copied to the cluster, without data and secrets (see
jobs/cluster/package.py). In a checkout of Redux the job runs that code, otherwise the code of the cluster's image.

Only one submission of a run is active at a time: Ray refuses an id that it knows, so the second of two submissions is
refused, and after the first has ended the next is NAME-2. With an id of your own, submitting is idempotent: repeat it
if you do not know whether it worked. Every try uses the same run folder, so finished work is never repeated.

A stopped job gets SIGTERM and writes a checkpoint. Ray allows 3 seconds for that; a job submitted here gets its
recovery.grace_s.
"""

import math
import os
import re
import shlex
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from jobs import document
from jobs.cluster import package
from jobs.cluster.manifest import PASSWORD, STOP_MARGIN_S
from jobs.cluster.remote import (
    RUN,
    STOP,
    UNKNOWN,
    connect,
    describe_status,
    find_exit_code,
    find_run_name,
    follow,
    print_log,
    report_detached,
)
from jobs.exit_codes import EXIT_MISUSE
from pipelines.training.stage import Recovery


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Options of a submission.

    Args:
        job: job file, already checked.
        overrides: values that replace those of the file.
        name: name of the run.
        address: dashboard of the cluster.
        runs_dir: folder of run folders on the cluster.
        id: submission id; None derives one from the name.
        env: names of local environment variables that the job gets.
        wait: follow the job to its end.
        retries: how often a failed job is submitted again.
    """

    job: Path
    overrides: Sequence[str]
    name: str
    address: str
    runs_dir: str
    id: str | None
    env: Sequence[str]
    wait: bool
    retries: int


def submit(submission: Submission) -> int:
    """Submit a job, and follow it if that is wanted.

    Returns:
        The exit code.

    Raises:
        ValueError: the cluster refuses the job, another submission of this run is active, or a file must not be copied.
    """
    tree = document.plain(submission.job, submission.overrides)
    job = tree.get("job", tree)  # of a study or a search, what its runs have in common
    _check(submission, job)
    environment = _environment(submission.env, (job.get("recovery") or {}).get("grace_s", Recovery.grace_s))
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch, "package.zip")
        command = write_entrypoint(submission, package.write_package(Path.cwd(), submission.job, archive))
        with connect(submission.address) as client:
            return _submit(client, submission, command, {"working_dir": str(archive), "env_vars": environment})


def write_entrypoint(submission: Submission, file: str) -> str:
    """Write the shell command of the job: with the copied code if it is Redux's, otherwise with that of the image."""
    redux = ("python", "-m", "jobs.command") if _is_redux(Path.cwd()) else ("redux",)
    home = "~/" if submission.runs_dir.startswith("~/") else ""  # the shell's there, which it would not see in quotes
    runs_dir = home + shlex.quote(submission.runs_dir.removeprefix("~/"))
    return f"exec {shlex.join([*redux, 'run', file, *submission.overrides])} --runs-dir {runs_dir}"


def _is_redux(folder: Path) -> bool:
    project = folder / "pyproject.toml"
    return project.is_file() and tomllib.loads(project.read_text()).get("project", {}).get("name") == "redux-vlm"


def _check(submission: Submission, job: Mapping[str, Any]) -> None:
    if not (PurePosixPath(submission.runs_dir).is_absolute() or submission.runs_dir.startswith("~/")):
        raise ValueError(
            f"--runs-dir: got {submission.runs_dir}, allowed: a path on the cluster from the root on, or '~/…', as the "
            "working folder of a job is deleted after it"
        )
    if submission.id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", submission.id):
        raise ValueError(f"--id: got {submission.id}, allowed: letters, digits, dots, _ and -, a letter or digit first")
    sets = (job.get("data") or {}).get("sets") or {}
    named = {"checkpoints": job.get("checkpoints")} | {f"data.sets.{name}": url for name, url in sets.items()}
    for where, url in named.items():
        if url and "://" not in url and not PurePosixPath(url).is_absolute():
            raise ValueError(
                f"{where}: got {url}, allowed: a URL or a path from the root on, as the folder in which the job runs "
                "has no data and is deleted after it"
            )
    for where, text in {
        "overrides": " ".join(submission.overrides),
        str(submission.job): submission.job.read_text(),
    }.items():
        if PASSWORD.search(text):
            raise ValueError(
                f"{where}: got a URL with a password, allowed: one without, as others see what is submitted"
            )


def _environment(names: Sequence[str], grace_s: float) -> dict[str, str]:
    """Collect the variables that the job gets besides those of the cluster."""
    for name in names:
        if "=" in name:  # what follows may be secret, and is not shown
            raise ValueError(
                f"--env: got {name.partition('=')[0]}=…, allowed: the name alone; its value is the one here"
            )
        if name not in os.environ:
            raise ValueError(f"--env: got {name}, which is not set here, allowed: a variable that is")
        if "$" in os.environ[name]:
            raise ValueError(f"--env: {name} has a $ in its value, allowed: none, as Ray puts variables in its place")
    return {
        STOP: str(math.ceil(grace_s) + STOP_MARGIN_S),
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # a run sets variables too; those that --env names stay
        **{name: os.environ[name] for name in names},
    }


def _submit(client: JobSubmissionClient, submission: Submission, command: str, runtime_env: dict[str, Any]) -> int:
    """Submit a job, and again after failures as often as allowed; returns the exit code."""
    code = 0
    for number in range(1, submission.retries + 2):
        job_id = _try(client, submission, number, command, runtime_env)
        if not (submission.wait or submission.retries):
            break
        try:
            ended = follow(client, job_id, print_log)
        except KeyboardInterrupt:
            return report_detached(job_id, submission.address)
        except RuntimeError as error:
            if UNKNOWN not in str(error) or number > submission.retries:
                raise
            print(f"{job_id} is lost: the cluster has forgotten it, as after the death of its head", flush=True)
            continue
        print(describe_status(ended), flush=True)
        code = find_exit_code(ended)
        if ended.status != JobStatus.FAILED or code == EXIT_MISUSE:
            break
    return code


def _try(
    client: JobSubmissionClient, submission: Submission, number: int, command: str, runtime_env: dict[str, Any]
) -> str:
    """Submit one try, or find it if its id was submitted before; returns its id."""
    known = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
    job_id = _id(submission, number, known)
    if job_id not in known:
        living = [
            id for id, job in known.items() if find_run_name(job) == submission.name and not job.status.is_terminal()
        ]
        if living:
            raise _taken(submission.name, living[0], known[living[0]].status)
        try:
            client.submit_job(
                entrypoint=command, submission_id=job_id, runtime_env=runtime_env, metadata={RUN: submission.name}
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            if submission.id is None:  # someone was faster
                raise _taken(submission.name, job_id, client.get_job_status(job_id)) from None
        else:
            of = f", try {number} of {submission.retries + 1}" if submission.retries else ""
            print(f"{job_id} is submitted{of}; redux jobs logs {job_id} -f --address {submission.address}", flush=True)
            return job_id
    found = client.get_job_info(job_id)
    if find_run_name(found) != submission.name:
        raise ValueError(
            f"--id: got {job_id}, which is {find_run_name(found) or 'another job'}, allowed: an id of {submission.name}"
        )
    print(describe_status(found), flush=True)
    return job_id


def _id(submission: Submission, number: int, known: Mapping[str, Any]) -> str:
    """Choose the id of a try: the given id and a number, or the first free one that begins with the name of the run."""
    if submission.id is not None:
        return submission.id if number == 1 else f"{submission.id}-{number}"
    job_id, count = submission.name, 1
    while job_id in known and (known[job_id].status.is_terminal() or find_run_name(known[job_id]) != submission.name):
        count += 1
        job_id = f"{submission.name}-{count}"
    if job_id in known:
        raise _taken(submission.name, job_id, known[job_id].status)
    return job_id


def _taken(name: str, job_id: str, status: JobStatus) -> ValueError:
    return ValueError(
        f"{name}: {job_id} is {status}, allowed: one submission of a run at a time; another by name=…, or "
        f"redux jobs stop {job_id}"
    )
