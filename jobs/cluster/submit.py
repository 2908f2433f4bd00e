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
from jobs.cluster.kubernetes_options import PASSWORD
from jobs.cluster.manifest import STOP_MARGIN_S
from jobs.cluster.remote import (
    RUN_METADATA_KEY,
    STOP_WAIT_VARIABLE,
    UNKNOWN_JOB_TEXT,
    connect,
    describe_status,
    find_exit_code,
    find_run_name,
    follow,
    print_log,
    report_detached,
)
from jobs.exit_codes import EXIT_MISUSE
from jobs.layout import list_paths
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
    """Submit a job, and follow it if it is to be followed or retried.

    Returns:
        The exit code.

    Raises:
        ValueError: the cluster refuses the job, another submission of this run is active, or a file must not be copied.
    """
    # As written, not resolved: paths in it are those of the cluster.
    tree = document.read_tree(submission.job, submission.overrides)
    job = tree.get("job", tree)  # A study or a search has one for all its runs
    _check_submission(submission, job)
    environment = _collect_environment(submission.env, (job.get("recovery") or {}).get("grace_s", Recovery.grace_s))
    # Packaged before the connection: a secret among the files must stop the submission first.
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch, "package.zip")
        command = write_entrypoint(submission, package.write_package(Path.cwd(), submission.job, archive))
        with connect(submission.address) as client:
            return _submit_with_retries(
                client, submission, command, {"working_dir": str(archive), "env_vars": environment}
            )


def write_entrypoint(submission: Submission, file: str) -> str:
    """Write the shell command of the job; it runs the copied code if that is Redux, otherwise the code of the image."""
    redux = ("python", "-m", "jobs.command") if _is_redux(Path.cwd()) else ("redux",)
    # ~/ stays outside the quotes, so that the shell of the cluster replaces it.
    home = "~/" if submission.runs_dir.startswith("~/") else ""
    runs_dir = home + shlex.quote(submission.runs_dir.removeprefix("~/"))
    # With exec, so that Ray's SIGTERM reaches redux and not a shell around it.
    return f"exec {shlex.join([*redux, 'run', file, *submission.overrides])} --runs-dir {runs_dir}"


def _is_redux(folder: Path) -> bool:
    """Return True if a folder is a checkout of Redux."""
    path = folder / "pyproject.toml"
    if not path.is_file():
        return False
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8")).get("project")
    except ValueError as error:  # Wrong TOML, or not UTF-8
        raise ValueError(f"{path}: {error}, allowed: TOML") from None
    return isinstance(project, dict) and project.get("name") == "redux-vlm"


def _check_submission(submission: Submission, job: Mapping[str, Any]) -> None:
    """Check the options and the paths of the job, which must exist on the cluster."""
    if not (PurePosixPath(submission.runs_dir).is_absolute() or submission.runs_dir.startswith("~/")):
        raise ValueError(
            f"--runs-dir: got {submission.runs_dir}, allowed: an absolute path on the cluster, or '~/…', because the "
            "working folder of a job is deleted after it"
        )
    if submission.id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", submission.id):
        raise ValueError(f"--id: got {submission.id}, allowed: letters, digits, dots, _ and -, a letter or digit first")
    for key, url in list_paths(job):
        if "://" not in url and not PurePosixPath(url).is_absolute():
            raise ValueError(
                f"{key}: got {url}, allowed: a URL or an absolute path, because the working folder of the job "
                "has no data and is deleted after it"
            )
    for key, text in {
        "overrides": " ".join(submission.overrides),
        str(submission.job): submission.job.read_text(encoding="utf-8"),
    }.items():
        if PASSWORD.search(text):
            raise ValueError(
                f"{key}: got a URL with a password, allowed: a URL without, because others can read submitted files"
            )


def _collect_environment(names: Sequence[str], grace_s: float) -> dict[str, str]:
    """Collect the variables that the job gets besides those of the cluster."""
    for name in names:
        if "=" in name:  # The value may be secret, so it is not shown
            raise ValueError(
                f"--env: got {name.partition('=')[0]}=…, allowed: the name alone, the value is that of this shell"
            )
        if name not in os.environ:
            raise ValueError(f"--env: got {name}, which is not set here, allowed: a variable that is set")
        if "$" in os.environ[name]:
            raise ValueError(
                f"--env: {name} has a $ in its value, allowed: none, because Ray would replace it by the value of a "
                "variable"
            )
    return {
        STOP_WAIT_VARIABLE: str(math.ceil(grace_s) + STOP_MARGIN_S),
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # A run sets variables too; this keeps those of --env
        **{name: os.environ[name] for name in names},
    }


def _submit_with_retries(
    client: JobSubmissionClient, submission: Submission, command: str, runtime_env: dict[str, Any]
) -> int:
    """Submit a job, and again after failures as often as allowed; returns the exit code."""
    code = 0
    for number in range(1, submission.retries + 2):
        job_id = _submit_once(client, submission, number, command, runtime_env)
        if not (submission.wait or submission.retries):
            break
        try:
            ended_job = follow(client, job_id, print_log)
        except KeyboardInterrupt:
            return report_detached(job_id, submission.address)
        except RuntimeError as error:
            if UNKNOWN_JOB_TEXT not in str(error) or number > submission.retries:
                raise
            print(f"{job_id} is lost: the cluster no longer knows it, as after a restart of its head", flush=True)
            continue
        print(describe_status(ended_job), flush=True)
        code = find_exit_code(ended_job)
        if ended_job.status != JobStatus.FAILED or code == EXIT_MISUSE:
            break
    return code


def _submit_once(
    client: JobSubmissionClient, submission: Submission, number: int, command: str, runtime_env: dict[str, Any]
) -> str:
    """Submit the job once, or find it if its id was submitted before; returns its id."""
    # Read again for each try, because others may have submitted meanwhile.
    jobs_by_id = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
    job_id = _choose_id(submission, number, jobs_by_id)
    if job_id not in jobs_by_id:
        active = [
            other_id
            for other_id, job in jobs_by_id.items()
            if find_run_name(job) == submission.name and not job.status.is_terminal()
        ]
        if active:
            raise _build_conflict_error(submission.name, active[0], jobs_by_id[active[0]].status)
        try:
            client.submit_job(
                entrypoint=command,
                submission_id=job_id,
                runtime_env=runtime_env,
                metadata={RUN_METADATA_KEY: submission.name},
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            if submission.id is None:  # Another submission was faster
                raise _build_conflict_error(submission.name, job_id, client.get_job_status(job_id)) from None
        else:
            attempt = f", try {number} of {submission.retries + 1}" if submission.retries else ""
            print(
                f"{job_id} is submitted{attempt}; redux jobs logs {job_id} -f --address {submission.address}",
                flush=True,
            )
            return job_id
    # The id exists: it is this submission, repeated, or somebody else's job.
    job = client.get_job_info(job_id)
    if find_run_name(job) != submission.name:
        raise ValueError(
            f"--id: got {job_id}, which is {find_run_name(job) or 'another job'}, allowed: an id of {submission.name}"
        )
    print(describe_status(job), flush=True)
    return job_id


def _choose_id(submission: Submission, number: int, jobs_by_id: Mapping[str, Any]) -> str:
    """Choose the id of a submission: the id of the user and a number, or the first free id from the name of the run."""
    if submission.id is not None:
        return submission.id if number == 1 else f"{submission.id}-{number}"
    # Ray refuses the id of an ended job, too.
    job_id, count = submission.name, 1
    while job_id in jobs_by_id and (
        jobs_by_id[job_id].status.is_terminal() or find_run_name(jobs_by_id[job_id]) != submission.name
    ):
        count += 1
        job_id = f"{submission.name}-{count}"
    if job_id in jobs_by_id:
        raise _build_conflict_error(submission.name, job_id, jobs_by_id[job_id].status)
    return job_id


def _build_conflict_error(name: str, job_id: str, status: JobStatus) -> ValueError:
    return ValueError(
        f"{name}: {job_id} is {status}, allowed: one submission of a run at a time; choose another name=…, or "
        f"redux jobs stop {job_id}"
    )
