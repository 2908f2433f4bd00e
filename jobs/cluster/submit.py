"""`redux submit`: a job on a Ray cluster that is there already, through Ray's Jobs API.

The job is checked here first. What then travels is the folder in which this is started, without data and secrets (see
jobs/cluster/package.py); if it is a checkout of Redux its code is the one that runs; else that of the cluster's image.

One run at a time has a name: Ray refuses an id that it knows, so of two submissions of one job at once one is turned
away, and when the first has ended the next is NAME-2. With an id of one's own, submitting is idempotent: whoever does
not know whether it worked does it again. What was done goes on in any case: every try has the same run folder.

A stopped job gets SIGTERM and makes a checkpoint. For that Ray gives 3 seconds; a job submitted here gets what its
recovery.grace_s promises.
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
from jobs.cluster.manifest import MARGIN_S, PASSWORD
from jobs.cluster.remote import RUN, STOP, UNKNOWN, cluster, exit_code, follow, goes_on, line, run_of, show
from jobs.exit_codes import EXIT_MISUSE
from pipelines.training.stage import Recovery


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is asked for.

    job, overrides: a file that was checked, and values in place of its own.  name: of its run.
    runs_dir: folder of the run folders, on the cluster.
    id: None derives one from the name.
    env: names of variables here that the job is to have.
    wait: follow it to its end.  retries: how often it is submitted again where it fails.
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


def submit(asked: Submission) -> int:
    """Submit a job, and follow it if that is asked for; returns an exit code.

    ValueError where the cluster does not take it, another submission of this run lives, or something cannot travel.
    """
    tree = document.plain(asked.job, asked.overrides)
    job = tree.get("job", tree)  # of a study or a search, what its runs have in common
    _check(asked, job)
    environment = _environment(asked.env, (job.get("recovery") or {}).get("grace_s", Recovery.grace_s))
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch, "package.zip")
        command = entrypoint(asked, package.pack(Path.cwd(), asked.job, archive))
        with cluster(asked.address) as client:
            return _submit(client, asked, command, {"working_dir": str(archive), "env_vars": environment})


def entrypoint(asked: Submission, file: str) -> str:
    """The shell's command on the cluster: with the code that travels if it is Redux's, else with the image's."""
    redux = ("python", "-m", "jobs.command") if _is_redux(Path.cwd()) else ("redux",)
    home = "~/" if asked.runs_dir.startswith("~/") else ""  # the shell's there, which it would not see in quotes
    runs_dir = home + shlex.quote(asked.runs_dir.removeprefix("~/"))
    return f"exec {shlex.join([*redux, 'run', file, *asked.overrides])} --runs-dir {runs_dir}"


def _is_redux(folder: Path) -> bool:
    project = folder / "pyproject.toml"
    return project.is_file() and tomllib.loads(project.read_text()).get("project", {}).get("name") == "redux-vlm"


def _check(asked: Submission, job: Mapping[str, Any]) -> None:
    if not (PurePosixPath(asked.runs_dir).is_absolute() or asked.runs_dir.startswith("~/")):
        raise ValueError(
            f"--runs-dir: got {asked.runs_dir}, allowed: a path on the cluster from the root on, or '~/…', as the "
            "working folder of a job is deleted after it"
        )
    if asked.id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", asked.id):
        raise ValueError(f"--id: got {asked.id}, allowed: letters, digits, dots, _ and -, a letter or digit first")
    sets = (job.get("data") or {}).get("sets") or {}
    named = {"checkpoints": job.get("checkpoints")} | {f"data.sets.{name}": url for name, url in sets.items()}
    for where, url in named.items():
        if url and "://" not in url and not PurePosixPath(url).is_absolute():
            raise ValueError(
                f"{where}: got {url}, allowed: a URL or a path from the root on, as the folder in which the job runs "
                "has no data and is deleted after it"
            )
    for where, text in {"overrides": " ".join(asked.overrides), str(asked.job): asked.job.read_text()}.items():
        if PASSWORD.search(text):
            raise ValueError(
                f"{where}: got a URL with a password, allowed: one without, as others see what is submitted"
            )


def _environment(names: Sequence[str], grace_s: float) -> dict[str, str]:
    """What the job has besides the cluster's environment."""
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
        STOP: str(math.ceil(grace_s) + MARGIN_S),
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # a run sets variables too; those that --env names stay
        **{name: os.environ[name] for name in names},
    }


def _submit(client: JobSubmissionClient, asked: Submission, command: str, runtime_env: dict[str, Any]) -> int:
    """Submit a job as often as it takes and is allowed; returns an exit code."""
    code = 0
    for number in range(1, asked.retries + 2):
        one = _try(client, asked, number, command, runtime_env)
        if not (asked.wait or asked.retries):
            break
        try:
            ended = follow(client, one, show)
        except KeyboardInterrupt:
            return goes_on(one, asked.address)
        except RuntimeError as error:
            if UNKNOWN not in str(error) or number > asked.retries:
                raise
            print(f"{one} is lost: the cluster has forgotten it, as after the death of its head", flush=True)
            continue
        print(line(ended), flush=True)
        code = exit_code(ended)
        if ended.status != JobStatus.FAILED or code == EXIT_MISUSE:
            break
    return code


def _try(client: JobSubmissionClient, asked: Submission, number: int, command: str, runtime_env: dict[str, Any]) -> str:
    """Submit a try, or find it submitted where the id was given; returns its id."""
    known = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
    one = _id(asked, number, known)
    if one not in known:
        living = [id for id, job in known.items() if run_of(job) == asked.name and not job.status.is_terminal()]
        if living:
            raise _taken(asked.name, living[0], known[living[0]].status)
        try:
            client.submit_job(
                entrypoint=command, submission_id=one, runtime_env=runtime_env, metadata={RUN: asked.name}
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            if asked.id is None:  # someone was faster
                raise _taken(asked.name, one, client.get_job_status(one)) from None
        else:
            of = f", try {number} of {asked.retries + 1}" if asked.retries else ""
            print(f"{one} is submitted{of}; redux jobs logs {one} -f --address {asked.address}", flush=True)
            return one
    found = client.get_job_info(one)
    if run_of(found) != asked.name:
        raise ValueError(f"--id: got {one}, which is {run_of(found) or 'another job'}, allowed: an id of {asked.name}")
    print(line(found), flush=True)
    return one


def _id(asked: Submission, number: int, known: Mapping[str, Any]) -> str:
    """The id of a try: what is asked for and a number; or the first such of the run's name that is free."""
    if asked.id is not None:
        return asked.id if number == 1 else f"{asked.id}-{number}"
    one, count = asked.name, 1
    while one in known and (known[one].status.is_terminal() or run_of(known[one]) != asked.name):
        count += 1
        one = f"{asked.name}-{count}"
    if one in known:
        raise _taken(asked.name, one, known[one].status)
    return one


def _taken(name: str, one: str, status: JobStatus) -> ValueError:
    return ValueError(
        f"{name}: {one} is {status}, allowed: one submission of a run at a time; another by name=…, or "
        f"redux jobs stop {one}"
    )
