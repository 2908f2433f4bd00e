"""The command itself, on a job of the smallest size: real Ray, real DeepSpeed workers, all of easy-VQA."""

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

from pipelines.evaluation import tasks
from pipelines.training import ledger, metrics

pytestmark = pytest.mark.integration

JOB = """
name: tiny
num_workers: 2
data:
  source: easy-vqa
  samples_per_shard: 1500
  sets: {talk: TALK}
  make: {talk: {json: TALK.json, samples_per_shard: 3}}
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
    data: {conversations: 3, talk: 1}
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


ALONE = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


@pytest.fixture(scope="module")
def job(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that also trains on a set that it makes of a file of records, of text alone."""
    path = tmp_path_factory.mktemp("job") / "tiny.yaml"
    talk = [{"id": n, "conversations": [turn("human", f"is {n} odd?"), turn("gpt", "yes")]} for n in range(1, 21, 2)]
    (path.parent / "talk.json").write_text(json.dumps(talk))
    path.write_text(JOB.replace("TALK", str(path.parent / "talk")))
    return path


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


@pytest.fixture(scope="module")
def finished(job: Path, ray_cluster: Any) -> tuple[Path, str]:
    """A run to its end on a Ray that was already there: (run folder, what it printed).

    Its first start is refused before the first shard, and the corrected command has other settings than that.
    """
    address = ray_cluster.get_runtime_context().gcs_address
    shown: Any = {"env": {**os.environ, "RAY_ADDRESS": address}, "text": True, "capture_output": True}
    wrong = [f"checkpoints={job}/nowhere", "train.tower.epochs=9", "seed=5"]
    failed = subprocess.run([*command(job, "whole"), *wrong], **shown)
    assert failed.returncode == 2, failed.stderr
    assert not (job.parent / "whole" / "tiny" / "shards").exists()
    done = subprocess.run(command(job, "whole"), **shown)
    assert done.returncode == 0, done.stderr
    return job.parent / "whole" / "tiny", done.stdout + done.stderr


def command(job: Path, into: str) -> list[str]:
    return [sys.executable, "-m", "jobs.command", "run", str(job), "--runs-dir", str(job.parent / into)]


def verify(folder: Path, run: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "jobs.command", "shards", "verify", str(folder), "--consumed", str(run)]
    return subprocess.run(words, text=True, capture_output=True)


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
    asked = tasks.load_questions("easy_vqa", tasks.TaskSettings(limit=50))
    assert scores["easy_vqa.questions"] == len(asked)
    assert 0 <= scores["easy_vqa.accuracy"] <= 1
    assert scores["wall_s"] > 0
    assert len((run / "answers" / "easy_vqa.jsonl").read_text().splitlines()) == len(asked)
    assert (run / "report.html").stat().st_size > 10_000
    assert list((run / "tensorboard" / "instruct").glob("events.*"))
    assert (run / "checkpoints" / "instruct" / "model" / "model.safetensors").exists()
    for bar in ("shards captions", "tower", "instruct", "evaluate"):
        assert re.search(rf"{bar}: 100%", printed), f"no finished progress bar {bar!r}"


def test_a_run_is_proven_to_have_used_each_sample_once(finished: tuple[Path, str], job: Path) -> None:
    """Batches of 16 with 4 of a set of 10: two epochs of it in five steps, and 60 are done."""
    run, _ = finished
    assert verify(job.parent / "talk", run).stdout == (
        "instruct: 60 steps used 240 samples of talk: each of its 10 once in each of 24 epochs, 0 once in the epoch "
        "that is not finished; 0 replaced\n"
    )
    assert "tower: 2 steps used 16 samples of captions" in verify(run / "shards" / "captions", run).stdout
    assert "did not train on it, allowed: " in verify(job.parent, run).stderr


def test_a_run_that_used_a_sample_twice_is_found_out(finished: tuple[Path, str], job: Path, tmp_path: Path) -> None:
    run, _ = finished
    for name in ("job.yaml", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path)
    lines = list(map(json.loads, (run / "consumed.jsonl").read_text().splitlines()))
    twice = lines[-1]["samples"]["talk"]
    twice[0] = twice[1]
    (tmp_path / "consumed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = verify(job.parent / "talk", tmp_path)
    assert found.returncode == 2
    assert f"epoch 23: 1 samples were repeated: {twice[0]}" in found.stdout
    (tmp_path / "consumed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    assert "stage instruct ends with step 59, metrics.jsonl with 60" in verify(job.parent / "talk", tmp_path).stdout


def test_a_ray_that_was_there_goes_on(finished: tuple[Path, str], ray_cluster: Any) -> None:
    assert ray_cluster.get(ray_cluster.put(1)) == 1


def test_a_part_without_a_rate_stays_as_it_was(finished: tuple[Path, str]) -> None:
    from transformers import CLIPModel

    from redux.model import ReduxForConditionalGeneration

    run, _ = finished
    before = CLIPModel.from_pretrained(run / "checkpoints" / "tower" / "model").vision_model.state_dict()
    after = ReduxForConditionalGeneration.from_pretrained(run / "checkpoints" / "instruct" / "model").model.vision_tower
    assert all(tensor.equal(before[name]) for name, tensor in after.state_dict().items())


def test_any_checkpoint_becomes_a_model(finished: tuple[Path, str], tmp_path: Path) -> None:
    from redux.model import ReduxForConditionalGeneration

    run, _ = finished
    made = ReduxForConditionalGeneration.from_pretrained(run / "checkpoints" / "instruct" / "model").state_dict()
    for step, same in ((60, True), (56, False)):
        assert export(run, tmp_path / str(step), "--step", str(step)).returncode == 0
        model = ReduxForConditionalGeneration.from_pretrained(tmp_path / str(step)).state_dict()
        assert all(tensor.equal(made[name]) for name, tensor in model.items()) == same
    refused = export(run, tmp_path / "none", "--step", "7")
    assert refused.returncode == 2
    assert refused.stderr == "redux: step: got 7, allowed: 56, 60\n"
    assert not (tmp_path / "none").exists()


def export(run: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.command", "export", str(run), "--out", str(out), *words]
    return subprocess.run(command, text=True, capture_output=True)


def test_a_second_run_says_so_and_does_nothing(finished: tuple[Path, str], job: Path) -> None:
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = subprocess.run(command(job, "whole"), text=True, capture_output=True, check=True)
    assert "finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_another_job_under_the_same_name_is_refused(finished: tuple[Path, str], job: Path) -> None:
    refused = subprocess.run([*command(job, "whole"), "seed=1"], text=True, capture_output=True)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "seed" in refused.stderr


def test_a_run_that_is_killed_and_then_stopped_goes_on_to_the_same_end(finished: tuple[Path, str], job: Path) -> None:
    """First SIGKILL of the driver; then SIGTERM to its group, as of `timeout`, which makes a checkpoint in its grace.

    Each leaves no process.
    """
    run = job.parent / "cut" / "tiny"
    assert stopped(job, after=10, by=signal.SIGKILL) == -signal.SIGKILL
    assert stopped(job, after=30, by=signal.SIGTERM) == 130
    before = ledger.read_ledger(run).account
    assert 0 < before.lost_steps <= 2 * 7 - 1, "one interval, and what was done while one was being written"
    last = metrics.read_last_step(run, "instruct")
    assert (run / "checkpoints" / "instruct" / f"step-{last:06d}" / "manifest.json").exists()

    ended = subprocess.run(command(job, "cut"), env=ALONE, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    undisturbed, _ = finished
    assert ledger.read_ledger(run).account.lost_steps == before.lost_steps, "the checkpoint in the grace lost nothing"
    assert losses(run) == losses(undisturbed)
    assert (run / "answers" / "easy_vqa.jsonl").read_text() == (undisturbed / "answers" / "easy_vqa.jsonl").read_text()
    assert (run / "consumed.jsonl").read_text() == (undisturbed / "consumed.jsonl").read_text()


def stopped(job: Path, after: int, by: signal.Signals) -> int:
    """Exit code of a run that gets a signal after a step of the last stage; when it is gone, so are its processes."""
    shown = {**ALONE, "TQDM_MININTERVAL": "0.1"}  # as on a terminal
    process = subprocess.Popen(command(job, "cut"), env=shown, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stderr
    seen = b""
    while not any(int(step) >= after for step in re.findall(rb"instruct:[^\r]*\| (\d+)/60 ", seen)):
        part = os.read(process.stderr.fileno(), 4096)
        assert part, f"ended too early:\n{seen.decode()}"
        seen += part
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    if by == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, by)
    code = process.wait(timeout=60)
    # after a command that was killed, Ray's agents notice the end of the rest after a minute; else it ends them
    _, alive = psutil.wait_procs(started, timeout=120 if by == signal.SIGKILL else 0)
    assert not alive
    process.stderr.close()
    return code


def test_a_model_that_is_there_is_only_evaluated(finished: tuple[Path, str], ray_cluster: Any, tmp_path: Path) -> None:
    run, _ = finished
    path = tmp_path / "asked.yaml"
    path.write_text(
        "name: asked\n"
        "data: {source: null}\n"
        f"model: {{checkpoint: {run}/checkpoints/instruct/model, vmtc: null, cmai: {{gamma_max: 0.3}}}}\n"
        "evaluate: {tasks: {instructions: {limit: 2, max_new_tokens: 8}}}\n"
    )
    address = ray_cluster.get_runtime_context().gcs_address
    subprocess.run(
        [sys.executable, "-m", "jobs.command", "run", str(path), "--runs-dir", str(tmp_path)],
        env={**os.environ, "RAY_ADDRESS": address}, check=True, capture_output=True,
    )  # fmt: skip
    answers = list(map(json.loads, (tmp_path / "asked" / "answers" / "instructions.jsonl").read_text().splitlines()))
    assert len({answer["id"] for answer in answers}) == 32
    scores = json.loads((tmp_path / "asked" / "metrics.json").read_text())
    assert scores["instructions.questions"] == 32
    assert {"instructions.strict", "instructions.loose", "instructions.both"} <= scores.keys()
    assert (tmp_path / "asked" / "report.html").exists()
    assert not (tmp_path / "asked" / "checkpoints").exists()


def test_a_trained_model_asked_with_no_other_key_scores_as_its_run(
    finished: tuple[Path, str], ray_cluster: Any, tmp_path: Path
) -> None:
    """By a job, and by Python; asked as LLaVA is, which it was not trained as, it is refused."""
    from pipelines.data import easy_vqa
    from redux.answering import load

    run, _ = finished
    model = run / "checkpoints" / "instruct" / "model"
    path = tmp_path / "again.yaml"
    task = "{tasks: {easy_vqa: {limit: 50, max_new_tokens: 2}}}"
    path.write_text(f"name: again\ndata: {{source: null}}\nmodel: {{checkpoint: {model}}}\nevaluate: {task}\n")
    words = [sys.executable, "-m", "jobs.command", "run", str(path), "--runs-dir", str(tmp_path)]
    refused = subprocess.run([*words, "evaluate.template=vicuna_v1"], text=True, capture_output=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "redux: evaluate.template: got vicuna_v1, allowed: vicuna_bare, with which the model was trained"
    )
    assert not (tmp_path / "again").exists()

    address = ray_cluster.get_runtime_context().gcs_address
    subprocess.run(words, env={**os.environ, "RAY_ADDRESS": address}, check=True, capture_output=True)
    again = tmp_path / "again"
    scores, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (again, run))
    for name in ("easy_vqa.questions", "easy_vqa.accuracy"):
        assert scores[name] == expected[name]
    answers = (run / "answers" / "easy_vqa.jsonl").read_text()
    assert (again / "answers" / "easy_vqa.jsonl").read_text() == answers

    rows = [json.loads(line) for line in answers.splitlines()]
    questions = {question.id: question for question in tasks.load_questions("easy_vqa", tasks.TaskSettings(limit=50))}
    images = [(Path(easy_vqa.PACKAGE_IMAGES) / str(questions[row["id"]].image)).read_bytes() for row in rows]
    told = load(model)([row["prompt"] for row in rows], images, max_new_tokens=2)
    assert told.texts == [row["response"] for row in rows]
