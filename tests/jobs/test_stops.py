"""The command stopped by each signal at each moment: its exit code, what it loses, and what it leaves behind."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import checkpoint, metrics
from tests.jobs.stops import Command, Stopped, started

JOB: dict[str, Any] = {
    "name": "tiny",
    "workers": 1,
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
            "global_batch": 4,
            "micro_batch": 4,
            "learning_rate": {"projector": 1e-3, "language": 1e-3},
            "checkpoint_every": 1500,
        }
    },
    "evaluate": {"tasks": {"easy_vqa": {"limit": 600, "max_new_tokens": 16}}, "batch": 8},
    "report": {"examples": 0},
}

STEP = r"instruct:[^\r]*\| [1-9]\d*/2000 \[[^\r]*loss"
SEARCH = {
    "name": "tiny",
    "trials": 1,
    "space": {"train.instruct.learning_rate.projector": {"low": 0.001, "high": 0.01}},
    "objectives": {"loss": "min"},
}

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of text alone, so that little is made before its steps, of which there are many."""
    folder = tmp_path_factory.mktemp("stops")
    records = [{"id": n, "conversations": [turn("human", f"is {n} odd?"), turn("gpt", "yes")]} for n in range(1, 41, 2)]
    (folder / "talk.json").write_text(json.dumps(records))
    made = {"talk": {"json": str(folder / "talk.json"), "samples_per_shard": 5}}
    data = {"source": None, "sets": {"talk": str(folder / "talk")}, "make": made}
    (folder / "tiny.yaml").write_text(json.dumps({**JOB, "data": data}))
    whole = {name: value for name, value in {**JOB, "data": data, "evaluate": None}.items() if name != "name"}
    (folder / "search.yaml").write_text(json.dumps({**SEARCH, "job": whole}))
    return folder / "tiny.yaml"


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


def stop(
    job: Path, into: Path, event: str, *numbers: signal.Signals, group: bool = False, words: tuple[str, ...] = (), **env: str
) -> Stopped:
    """Start the job, send these signals when the event is seen, and look at what is left."""
    with started(["run", str(job), "--into", str(into), *words], env, attentive) as command:
        command.wait_for(event)
        for number in numbers[:1]:
            command.send(number, group)
        for number in numbers[1:]:
            command.wait_for("a second signal stops at once")
            command.send(number, group)
        return command.end()


def attentive() -> None:
    """A suite in the background ignores Ctrl-C and hands that on, as nohup does with SIGHUP."""
    for number in (INT, TERM, HUP):
        signal.signal(number, signal.SIG_DFL)


def assert_stopped(stopped: Stopped, run: Path) -> None:
    assert stopped.code == 130, stopped.shown
    assert "Traceback" not in stopped.shown
    assert stopped.shown.rstrip().endswith("the same command goes on from the last checkpoint"), stopped.shown
    assert stopped.processes == []
    # torch and Ray keep a folder each for all processes of a user
    assert [path for path in stopped.files if not re.fullmatch(r"torchinductor_[^/]*|ray", path)] == []
    unfinished = [path for path in run.rglob("*") if re.search(r"\.(partial|tmp)|/\.held$|/\.probe$", str(path))]
    assert unfinished == []
    for folder in (run / "checkpoints").glob("*/step-*"):
        assert (folder / checkpoint.MANIFEST).exists(), "a checkpoint is whole or not there"


def lost(run: Path) -> int:
    """Steps that were recorded after the newest checkpoint."""
    saved = [path for path in (run / "checkpoints/instruct").glob("step-*") if (path / checkpoint.MANIFEST).exists()]
    newest = max((int(path.name.removeprefix("step-")) for path in saved), default=0)
    return metrics.steps(run, "instruct") - newest


@pytest.mark.parametrize(
    ("event", "number", "group"),
    [("starting Ray", TERM, True), (STEP, TERM, True), (STEP, HUP, False)],
    ids=["term-group-ray", "term-group-step", "hup-step"],
)
def test_a_stop_loses_no_step_and_leaves_nothing(
    job: Path, tmp_path: Path, event: str, number: signal.Signals, group: bool
) -> None:
    assert_stopped(stop(job, tmp_path, event, number, group=group), tmp_path / "tiny")
    assert lost(tmp_path / "tiny") == 0
