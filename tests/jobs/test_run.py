"""The command itself, on a job of the smallest size: real Ray, real DeepSpeed workers, all images of easy-VQA."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import run as run_module
from pipelines.evaluation import tasks
from pipelines.training import ledger, metrics
from pipelines.training.files import PROGRESS_FILE
from tests.jobs.command_line import CommandResult, run_command
from tests.worker_forks import WITH_FORKS

pytestmark = pytest.mark.integration

JOB = """
name: tiny
num_workers: 2
data:
  source: easy-vqa
  samples_per_shard: 1500
  sets: {talk: TALK}
  make: {talk: {source: TALK.json, samples_per_shard: 3}}
model:
  tower:
    image_size: 64
    patch_size: 16
    hidden_size: 16
    num_hidden_layers: 4
    num_attention_heads: 2
    intermediate_size: 16
  language: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 16}
train:
  tower:
    objective: contrastive
    data: captions
    epochs: 0.004
    global_batch_size: 8
    micro_batch_size: 4
    learning_rate: {tower: 1e-3}
  instruct:
    objective: language
    data: {captions: 3, talk: 1}
    template: vicuna_bare
    steps: 60
    global_batch_size: 16
    micro_batch_size: 4
    learning_rate: {projector: 1e-3, language: 1e-3}
    save_steps: 7
    max_rounds: 3
evaluate: {tasks: {easy_vqa: {limit: 50, max_new_tokens: 2}}, batch_size: 250}
report: {examples: 2}
"""


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
"""Environment of a command that starts a private Ray."""


@pytest.fixture(scope="module")
def job(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that also trains on a set that it makes of a file of records, of text alone."""
    path = tmp_path_factory.mktemp("job") / "tiny.yaml"
    talk = [
        {"id": number, "conversations": [make_turn("human", f"is {number} odd?"), make_turn("gpt", "yes")]}
        for number in range(1, 21, 2)
    ]
    (path.parent / "talk.json").write_text(json.dumps(talk))
    path.write_text(JOB.replace("TALK", str(path.parent / "talk")))
    return path


def make_turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


@pytest.fixture(scope="module")
def finished(job: Path, ray_cluster: Any) -> tuple[Path, str]:
    """A run to its end, in its own process, on a Ray that was already there: (run folder, output).

    Its first start is refused before the first shard, and the corrected command has other settings than that.
    """
    words = list_words(job, "whole")
    refused = run_command(*words, f"checkpoints={job}/nowhere", "train.tower.epochs=9", "seed=5")
    assert refused.code == 2, refused.err
    assert not (job.parent / "whole" / "tiny" / "shards").exists()
    address = ray_cluster.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-m", "jobs.command", *words],
        env={**os.environ, "RAY_ADDRESS": address},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return job.parent / "whole" / "tiny", done.stdout + done.stderr


def list_words(job: Path, runs: str) -> list[str]:
    """List the words of the command that runs the job in this folder of runs."""
    return ["run", str(job), "--runs-dir", str(job.parent / runs)]


def verify(shards: Path, run: Path) -> CommandResult:
    return run_command("shards", "verify", shards, "--consumed", run)


def losses(run: Path) -> list[tuple[str, int, float]]:
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(entry["stage"], entry["step"], entry["loss"]) for entry in entries]


def test_a_run_leaves_everything_in_its_folder(finished: tuple[Path, str]) -> None:
    run, printed = finished
    assert [(stage, step) for stage, step, _ in losses(run)] == [
        *(("tower", step) for step in (1, 2)),
        *(("instruct", step) for step in range(1, 61)),
    ]
    scores = json.loads((run / "metrics.json").read_text())
    questions = tasks.load_questions("easy_vqa", tasks.TaskSettings(limit=50))
    assert scores["easy_vqa.questions"] == len(questions)
    assert 0 <= scores["easy_vqa.accuracy"] <= 1
    assert scores["wall_s"] > 0
    assert len((run / "answers" / "easy_vqa.jsonl").read_text().splitlines()) == len(questions)
    assert (run / "report.html").stat().st_size > 10_000
    launch = json.loads((run / "environment.jsonl").read_text())
    assert {"evaluate", "report"} <= set(launch["steps"])
    assert launch["cpu"]
    for stage in ("instruct", "evaluate"):
        assert list((run / "tensorboard" / stage).glob("events.*"))
    assert (run / "checkpoints" / "instruct" / "model" / "model.safetensors").exists()
    for bar in ("shards captions", "tower", "instruct", "evaluate"):
        assert re.search(rf"{bar}: 100%", printed), f"no finished progress bar {bar!r}"
    assert not re.search(r"\w+\.cc:\d+: ", printed), "a line of Ray's C++ side"


def test_a_run_ends_with_its_scores_and_the_path_of_its_report(finished: tuple[Path, str]) -> None:
    run, printed = finished
    accuracy = json.loads((run / "metrics.json").read_text())["easy_vqa.accuracy"]
    assert f"is finished; its report: {run / 'report.html'}" in printed
    assert re.search(
        rf"    easy-VQA, accuracy: {100 * accuracy:.1f} % \(95 % interval [\d.]+ to [\d.]+ %\), \d+ questions", printed
    )


def test_the_seconds_of_an_interrupted_step_count(tmp_path: Path) -> None:
    """The wall time is that of all launches of the command."""
    progress = tmp_path / PROGRESS_FILE

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_module._run_phases({"tower": interrupt}, progress, 0)
    run_module._run_phases({"tower": lambda: None}, progress, 0)
    run_module._write_metrics(tmp_path)
    first, second = map(json.loads, progress.read_text().splitlines())
    assert (first["interrupted"], second["step"]) == ("tower", "tower")
    seconds = first["wall_s"] + second["wall_s"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"wall_s": seconds, "wall_s.tower": seconds}


def test_each_sample_is_used_once_per_epoch(finished: tuple[Path, str], job: Path) -> None:
    """Batches of 16 with 4 of a set of 10: two epochs of it in five steps, and 60 are done."""
    run, _ = finished
    assert verify(job.parent / "talk", run).out == (
        "instruct: 60 steps used 240 samples of talk: each of its 10 once in each of 24 epochs, 0 once in the epoch "
        "that is not finished; 0 replaced\n"
    )
    assert "tower: 2 steps used 16 samples of captions" in verify(run / "shards" / "captions", run).out
    assert "did not train on it, allowed: " in verify(job.parent, run).err


def test_a_repeated_sample_and_a_missing_step_are_found(finished: tuple[Path, str], job: Path, tmp_path: Path) -> None:
    run, _ = finished
    for name in ("job.yaml", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path)
    lines = list(map(json.loads, (run / "consumed.jsonl").read_text().splitlines()))
    twice = lines[-1]["samples"]["talk"]
    twice[0] = twice[1]
    (tmp_path / "consumed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = verify(job.parent / "talk", tmp_path)
    assert found.code == 2
    assert f"epoch 23: 1 samples were repeated: {twice[0]}" in found.out
    (tmp_path / "consumed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    assert "stage instruct ends with step 59, metrics.jsonl with 60" in verify(job.parent / "talk", tmp_path).out


def test_a_named_ray_outlives_the_command(finished: tuple[Path, str], ray_cluster: Any) -> None:
    assert ray_cluster.get(ray_cluster.put(1)) == 1


def test_a_part_without_a_learning_rate_is_unchanged(finished: tuple[Path, str]) -> None:
    from transformers import CLIPModel

    from redux.model import ReduxForConditionalGeneration

    run, _ = finished
    before = CLIPModel.from_pretrained(run / "checkpoints" / "tower" / "model").vision_model.state_dict()
    after = ReduxForConditionalGeneration.from_pretrained(run / "checkpoints" / "instruct" / "model").model.vision_tower
    assert all(tensor.equal(before[name]) for name, tensor in after.state_dict().items())


def test_any_checkpoint_can_be_exported_as_a_model(finished: tuple[Path, str], tmp_path: Path) -> None:
    from redux.model import ReduxForConditionalGeneration

    run, _ = finished
    made = ReduxForConditionalGeneration.from_pretrained(run / "checkpoints" / "instruct" / "model").state_dict()
    for step, same in ((60, True), (56, False)):
        exported = run_command("export", run, "--out", tmp_path / str(step), "--step", step)
        assert exported.code == 0, exported.err
        model = ReduxForConditionalGeneration.from_pretrained(tmp_path / str(step)).state_dict()
        assert all(tensor.equal(made[name]) for name, tensor in model.items()) == same
    refused = run_command("export", run, "--out", tmp_path / "none", "--step", 7)
    assert (refused.code, refused.err) == (2, "redux: step: got 7, allowed: 56, 60\n")
    assert not (tmp_path / "none").exists()


def test_a_second_run_prints_that_it_is_finished_and_changes_nothing(finished: tuple[Path, str], job: Path) -> None:
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = run_command(*list_words(job, "whole"))
    assert again.code == 0
    assert "finished" in again.out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_another_job_under_the_same_name_is_refused(finished: tuple[Path, str], job: Path) -> None:
    refused = run_command(*list_words(job, "whole"), "seed=1")
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert "seed" in refused.err


def test_a_run_that_is_killed_and_then_stopped_resumes_to_the_same_end(finished: tuple[Path, str], job: Path) -> None:
    """First SIGKILL of the driver; then SIGTERM to its group, as of `timeout`, which makes a checkpoint in its grace.

    Each leaves no process. The last start is in this process. The evaluation is left out: the model is the same. So are
    the shards, which are those of the other run.
    """
    run, words = job.parent / "cut" / "tiny", [*list_words(job, "cut"), "evaluate=null"]
    copy_shards(finished[0], run)
    assert start_and_stop(words, after=10, by=signal.SIGKILL) == -signal.SIGKILL
    assert start_and_stop(words, after=30, by=signal.SIGTERM) == 130
    before = ledger.read_ledger(run).account
    assert 0 < before.lost_steps <= 2 * 7 - 1, "one interval, and the steps during the upload of a checkpoint"
    last = metrics.read_last_step(run, "instruct")
    assert (run / "checkpoints" / "instruct" / f"step-{last:06d}" / "manifest.json").exists()

    resumed = run_command(*words)
    assert resumed.code == 0, resumed.err
    undisturbed, _ = finished
    assert ledger.read_ledger(run).account.lost_steps == before.lost_steps, "the checkpoint in the grace lost nothing"
    assert losses(run) == losses(undisturbed)
    assert (run / "consumed.jsonl").read_text() == (undisturbed / "consumed.jsonl").read_text()
    model = Path("checkpoints", "instruct", "model", "model.safetensors")
    assert (run / model).read_bytes() == (undisturbed / model).read_bytes()


def copy_shards(source: Path, run: Path) -> None:
    """Make a run folder that has finished the first step of another one."""
    for name in ("shards", "tokenizer"):
        shutil.copytree(source / name, run / name)
    first, *_ = (source / PROGRESS_FILE).read_text().splitlines(keepends=True)
    assert json.loads(first)["step"] == "shards"
    (run / PROGRESS_FILE).write_text(first)


def start_and_stop(words: list[str], after: int, by: signal.Signals) -> int:
    """Exit code of a run that gets a signal after a step of the last stage; its processes end with it."""
    # Bars as on a terminal; and Ray's agents end 5 s after the others, by default after a minute.
    environment = {**ENVIRONMENT, "TQDM_MININTERVAL": "0.1", "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    process = subprocess.Popen(
        [*WITH_FORKS, "jobs.command", *words], env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stderr
    output = b""
    while not any(int(step) >= after for step in re.findall(rb"instruct:[^\r]*\| (\d+)/60 ", output)):
        part = os.read(process.stderr.fileno(), 4096)
        assert part, f"ended too early:\n{output.decode()}"
        output += part
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    if by == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, by)
    code = process.wait(timeout=60)
    # A killed command cannot end Ray's agents; they notice the end of the other processes themselves.
    _, alive = psutil.wait_procs(children, timeout=120 if by == signal.SIGKILL else 0)
    assert not alive
    process.stderr.close()
    return code


def test_a_model_in_a_folder_is_only_evaluated(finished: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = finished
    path = tmp_path / "asked.yaml"
    path.write_text(
        "name: asked\n"
        "data: {source: null}\n"
        f"model: {{checkpoint: {run}/checkpoints/instruct/model, vmtc: null, cmai: {{gamma_max: 0.3}}}}\n"
        "evaluate: {tasks: {instructions: {limit: 2, max_new_tokens: 8}}}\n"
    )
    evaluated = run_command("run", path, "--runs-dir", tmp_path)
    assert evaluated.code == 0, evaluated.err
    answers = list(map(json.loads, (tmp_path / "asked" / "answers" / "instructions.jsonl").read_text().splitlines()))
    assert len({answer["id"] for answer in answers}) == 32
    scores = json.loads((tmp_path / "asked" / "metrics.json").read_text())
    assert scores["instructions.questions"] == 32
    assert {"instructions.strict", "instructions.loose", "instructions.both"} <= scores.keys()
    page = (tmp_path / "asked" / "report.html").read_text()
    assert "Instructions, followed (strict)" in page
    assert "Kept and merged patches" not in page, "this model keeps all patches"
    assert not (tmp_path / "asked" / "checkpoints").exists()


def test_a_trained_model_is_not_evaluated_with_another_template(finished: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = finished
    path = tmp_path / "again.yaml"
    model = run / "checkpoints" / "instruct" / "model"
    path.write_text(f"name: again\ndata: {{source: null}}\nmodel: {{checkpoint: {model}}}\nevaluate: {{}}\n")
    refused = run_command("run", path, "--runs-dir", tmp_path, "evaluate.template=vicuna_v1")
    assert refused.code == 2
    assert refused.err.startswith(
        "redux: evaluate.template: got vicuna_v1, allowed: vicuna_bare, with which the model was trained"
    )
    assert not (tmp_path / "again").exists()


def test_a_trained_model_gives_the_answers_of_its_run_in_python(finished: tuple[Path, str]) -> None:
    """Template and image preparation come from the model. test_recipe.py shows the same for a job."""
    from pipelines.data import easy_vqa
    from redux.answering import load

    run, _ = finished
    rows = list(map(json.loads, (run / "answers" / "easy_vqa.jsonl").read_text().splitlines()))
    questions = {question.id: question for question in tasks.load_questions("easy_vqa", tasks.TaskSettings(limit=50))}
    images = [(Path(easy_vqa.PACKAGE_IMAGES) / str(questions[row["id"]].image)).read_bytes() for row in rows]
    answers = load(run / "checkpoints" / "instruct" / "model")(
        [row["prompt"] for row in rows], images, max_new_tokens=2
    )
    assert answers.texts == [row["response"] for row in rows]
