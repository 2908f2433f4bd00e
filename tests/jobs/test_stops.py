"""The command stopped by signals at several moments: its exit code, lost steps, and leftover processes and files."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from ray._common.test_utils import wait_for_condition

from pipelines.training import metrics
from pipelines.training.files import MANIFEST
from tests.jobs.stops import Receiver, StoppedCommand, reset_signals, start_command

pytestmark = pytest.mark.integration

JOB: dict[str, Any] = {
    "name": "tiny",
    "num_workers": 1,
    "model": {
        "tower": {
            "image_size": 32,
            "patch_size": 16,
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
        "language": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
        "vmtc": None,
    },
    "train": {
        "instruct": {
            "objective": "language",
            "data": {"talk": 1},
            "template": "vicuna_bare",
            "steps": 2000,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "learning_rate": {"projector": 1e-3, "language": 1e-3},
            "save_steps": 1500,
        }
    },
    "evaluate": {"tasks": {"easy_vqa": {"limit": 600, "max_new_tokens": 16}}, "batch_size": 8},
    "report": {"examples": 0},
}

STEP = r"instruct:[^\r]*\| [1-9]\d*/2000 \[[^\r]*loss"
SEARCH = {
    "name": "tiny",
    "num_trials": 1,
    "space": {"train.instruct.learning_rate.projector": {"low": 0.001, "high": 0.01}},
    "objectives": {"loss": "min"},
}

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of text alone, so that little is made before its steps, of which there are many."""
    folder = tmp_path_factory.mktemp("stops")
    records = [
        {"id": number, "conversations": [make_turn("human", f"is {number} odd?"), make_turn("gpt", "yes")]}
        for number in range(1, 41, 2)
    ]
    (folder / "talk.json").write_text(json.dumps(records))
    make = {"talk": {"source": str(folder / "talk.json"), "samples_per_shard": 5}}
    data = {"source": None, "sets": {"talk": str(folder / "talk")}, "make": make}
    (folder / "tiny.yaml").write_text(json.dumps({**JOB, "data": data}))
    searched_job = {name: value for name, value in {**JOB, "data": data, "evaluate": None}.items() if name != "name"}
    (folder / "search.yaml").write_text(json.dumps({**SEARCH, "job": searched_job}))
    return folder / "tiny.yaml"


def make_turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


def stop(
    job: Path,
    runs: Path,
    event: str,
    *numbers: signal.Signals,
    to: Receiver = "command",
    words: tuple[str, ...] = (),
    **env: str,
) -> StoppedCommand:
    """Start the job, send signals when the event appears in the output, and list what is left.

    Args:
        job: job file.
        runs: folder of runs.
        event: pattern of the output.
        numbers: the signals; all but the first are sent after the message about a second signal.
        to: receiver of the signals.
        words: further words of the command.
        env: further variables.
    """
    with start_command(["run", str(job), "--runs-dir", str(runs), *words], env) as command:
        command.wait_for(event)
        for number in numbers[:1]:
            command.send(number, to)
        for number in numbers[1:]:
            command.wait_for("a second signal stops at once")
            command.send(number, to)
        return command.wait_for_end()


def assert_stopped(stopped: StoppedCommand, run: Path, incomplete: int = 0) -> None:
    """Check exit code, message, and leftover processes and files.

    Args:
        stopped: the command.
        run: its run folder.
        incomplete: allowed number of incomplete checkpoints, which the next start removes. After a second signal there
            may be two: one that is being committed, and the one of the stop that is being uploaded.
    """
    assert stopped.code == 130, stopped.output
    assert "Traceback" not in stopped.output
    assert stopped.output.count("redux: interrupted; the same command continues from the last checkpoint\n") == 1
    assert stopped.processes == []
    # torch and Ray each keep a folder for all processes of a user.
    assert [path for path in stopped.files if not re.fullmatch(r"torchinductor_[^/]*|ray", path)] == []
    leftovers = r"\.(partial|tmp)|/\.placement_group$|/\.probe$"
    unfinished = [path for path in run.rglob("*") if re.search(leftovers, str(path))]
    assert unfinished == []
    partial = [path for path in (run / "checkpoints").glob("*/step-*") if not (path / MANIFEST).exists()]
    assert len(partial) <= incomplete


def count_lost_steps(run: Path) -> int:
    """Count the steps that were recorded after the newest checkpoint."""
    saved = [path for path in (run / "checkpoints/instruct").glob("step-*") if (path / MANIFEST).exists()]
    newest = max((int(path.name.removeprefix("step-")) for path in saved), default=0)
    return metrics.read_last_step(run, "instruct") - newest


def test_a_signal_during_imports_ends_the_command(job: Path, tmp_path: Path) -> None:
    """Nothing has to be saved yet. Python prints what it imports."""
    stopped = stop(job, tmp_path, r"torch\._C", TERM, to="group", PYTHONPROFILEIMPORTTIME="1")
    assert_stopped(stopped, tmp_path / "tiny")


def test_a_signal_during_the_start_of_ray_leaves_no_process(job: Path, tmp_path: Path) -> None:
    assert_stopped(stop(job, tmp_path, "starting Ray", INT, to="group"), tmp_path / "tiny")


@pytest.mark.slow
def test_a_stop_at_any_moment_loses_no_step_and_leaves_nothing(job: Path, tmp_path: Path) -> None:
    """In one run folder, so that each start resumes where the one before was stopped."""
    run = tmp_path / "tiny"
    moments: list[tuple[str, signal.Signals, Receiver]] = [
        ("shards talk", TERM, "command"),
        ("starting workers", TERM, "group"),
        ("loading model", HUP, "command"),
        ("first batch", TERM, "group"),
        (STEP, INT, "command"),
        (STEP, INT, "group"),
        (STEP, TERM, "command"),
        (STEP, TERM, "group"),
        (STEP, TERM, "all"),
        (STEP, HUP, "group"),
    ]
    for event, number, to in moments:
        before = metrics.read_last_step(run, "instruct") if run.exists() else 0
        assert_stopped(stop(job, tmp_path, event, number, to=to), run)
        assert count_lost_steps(run) == 0, (event, number, to)
        assert metrics.read_last_step(run, "instruct") >= before


@pytest.mark.slow
@pytest.mark.parametrize("number", [INT, TERM])
def test_a_second_signal_stops_at_once(job: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Also during the upload of a checkpoint, as after every step here: an incomplete checkpoint does not count."""
    run = tmp_path / "tiny"
    words = ("train.instruct.save_steps=1",)
    assert_stopped(stop(job, tmp_path, STEP, number, number, to="group", words=words), run, incomplete=2)
    assert_stopped(stop(job, tmp_path, STEP, number, words=words), run)
    assert count_lost_steps(run) == 0


@pytest.mark.slow
def test_a_stop_of_an_evaluation_keeps_its_answers(job: Path, tmp_path: Path) -> None:
    words = ("train.instruct.steps=5",)
    answers = tmp_path / "tiny/answers/.easy_vqa.jsonl"
    for event, number in ((r"evaluate:[^\r]*loading model", TERM), (r"evaluate:[^\r]*\| [1-9]\d*/\d+", INT)):
        assert_stopped(stop(job, tmp_path, event, number, to="group", words=words), tmp_path / "tiny")
    answered = [json.loads(line) for line in answers.read_text().splitlines()]
    assert answered
    with start_command(["run", str(job), "--runs-dir", str(tmp_path), *words]) as command:
        progress = command.wait_for(r"evaluate:[^\r]*\| (\d+)/\d+")
        assert int(progress[1]) >= len(answered), "answered questions are not asked again"


@pytest.mark.slow
def test_a_stop_of_a_search_loses_no_step_of_its_trials(job: Path, tmp_path: Path) -> None:
    trial = tmp_path / "tiny/trials/0000"
    with start_command(["run", str(job.parent / "search.yaml"), "--runs-dir", str(tmp_path)]) as command:
        command.wait_for("search:")
        wait_for_condition(lambda: trial.exists() and metrics.read_last_step(trial, "instruct") > 0, timeout=240)
        command.send(TERM, "group")
        stopped = command.wait_for_end()
    assert_stopped(stopped, trial)
    assert count_lost_steps(trial) == 0


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint(job: Path, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and output fails from then on."""
    run = tmp_path / "tiny"
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))  # a bar of no width shows nothing
    code = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    words = [sys.executable, "-m", "jobs.command", "run", str(job), "--runs-dir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env=environment,
        preexec_fn=reset_signals,
    )
    os.close(terminal)
    output = ""
    while not re.search(STEP, output):
        output += os.read(controller, 4096).decode(errors="replace")
    os.close(controller)
    assert process.wait(timeout=120) == 130
    assert count_lost_steps(run) == 0
