"""Settings of a run folder are fixed by its finished and started steps alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from jobs import schema
from jobs.ownership import FolderOwnership
from jobs.run import _list_finished, run
from jobs.schema import Job
from pipelines.core import jsonl
from pipelines.evaluation import evaluate
from pipelines.evaluation.answer_files import ANSWERS_FOLDER, PROVENANCE_FILE
from pipelines.training.files import ASSEMBLED_FOLDER, JOB_FILE, PROGRESS_FILE

QUICKSTART = Path(__file__).parents[2] / "jobs" / "recipes" / "quickstart.yaml"
"""Stages: tower, pretrain, instruct."""

PREPARED = ("shards", "assemble")
TRAINED = (*PREPARED, "tower", "pretrain", "instruct")
FINISHED = (*TRAINED, "evaluate", "report")

Begin = Callable[..., Path]


def load(*overrides: str) -> Job:
    return schema.load(QUICKSTART, ["evaluate.tasks={easy_vqa: {}}", *overrides])  # as it is when it has been resolved


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    """Make the folder of a run with finished and started steps."""

    def begin(finished: tuple[str, ...] = (), begun: tuple[str, ...] = ()) -> Path:
        FolderOwnership.from_folder(tmp_path, load()).enforce()
        (tmp_path / PROGRESS_FILE).write_text(
            "".join(json.dumps({"step": name, "wall_s": 1}) + "\n" for name in finished)
        )
        stages = [name for name in (*finished, *begun) if name in ("tower", "pretrain", "instruct")]
        (tmp_path / "metrics.jsonl").write_text("".join(f'{{"stage": "{name}", "step": 1}}\n' for name in stages))
        (tmp_path / ANSWERS_FOLDER).mkdir()
        (tmp_path / ANSWERS_FOLDER / PROVENANCE_FILE).write_text("{}")
        if "evaluate" in (*finished, *begun):
            (tmp_path / ANSWERS_FOLDER / ".easy_vqa.jsonl").write_text('{"id": "1"}\n')
        if "assemble" in finished:
            (tmp_path / ASSEMBLED_FOLDER).mkdir()
        return tmp_path

    return begin


def finished(folder: Path) -> list[str]:
    return [entry["step"] for entry in jsonl.read(folder / PROGRESS_FILE)]


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("seed=1", ("shards",)),
        ("data.samples_per_shard=7", ("assemble",)),
        ("model.vmtc=null", ()),
        ("model.kernels=plain", PREPARED),
        ("checkpoints=s3://bucket/runs", PREPARED),
        ("train.tower.epochs=7", PREPARED),
        ("train.instruct.template=vicuna_v1", ("assemble",)),
        ("train.instruct.data=captions", ("assemble",)),
        ("train.pretrain.precision=bf16", ("shards",)),
        ("evaluate=null", PREPARED),
    ],
)
def test_all_settings_may_change_before_the_first_step(begin: Begin, override: str, kept: tuple[str, ...]) -> None:
    """Prepared files that do not depend on the setting stay."""
    folder = begin(PREPARED)
    FolderOwnership.from_folder(folder, load(override)).enforce()
    assert schema.load(folder / JOB_FILE) == load(override)
    assert tuple(finished(folder)) == kept
    assert (folder / ASSEMBLED_FOLDER).exists() == ("assemble" in kept)


@pytest.mark.parametrize(
    ("done", "begun", "override", "use"),
    [
        (PREPARED, ("tower",), "seed=1", "tower"),
        (PREPARED, ("tower",), "train.tower.beta2=0.5", "tower"),
        (PREPARED, ("tower",), "checkpoints=s3://bucket/runs", "tower"),
        ((*PREPARED, "tower"), (), "train.instruct.template=vicuna_v1", "tower"),
        ((*PREPARED, "tower"), (), "train.instruct.precision=bf16", "tower"),
        ((*PREPARED, "tower"), ("pretrain",), "train.pretrain.epochs=7", "pretrain"),
        (TRAINED, ("evaluate",), "evaluate.tasks.easy_vqa.max_new_tokens=7", "evaluate"),
        (FINISHED, (), "evaluate=null", "evaluate"),
        (FINISHED, (), "model.cmai.gamma_max=0.7", "tower"),
    ],
)
def test_a_setting_that_a_step_has_used_is_fixed(
    begin: Begin, done: tuple[str, ...], begun: tuple[str, ...], override: str, use: str
) -> None:
    folder = begin(done, begun)
    before = (folder / JOB_FILE).read_text()
    with pytest.raises(
        ValueError, match=f"{override.partition('=')[0]} = .*, and {use} depends on it; .*--allow-changes"
    ):
        FolderOwnership.from_folder(folder, load(override)).enforce()
    assert (folder / JOB_FILE).read_text() == before
    FolderOwnership.from_folder(folder, load(override)).enforce(allow_changes=True)
    assert schema.load(folder / JOB_FILE) == load(override)
    assert tuple(finished(folder)) == done, "steps with the old setting are not repeated"


@pytest.mark.parametrize(
    ("done", "override"),
    [
        ((*PREPARED, "tower"), "train.pretrain.epochs=7"),
        ((*PREPARED, "tower"), "train.instruct.learning_rate={projector: 1}"),
        (TRAINED, "evaluate.tasks.easy_vqa.max_new_tokens=7"),
        (TRAINED, "evaluate=null"),
        *((FINISHED, free) for free in (
            "num_workers=[1, 2]", "recovery.restarts=9", "trackers=[]", "data.max_bad_fraction=0.5", "gpu_share=1",
            "model.kernels=plain", "evaluate.batch_size=7", "evaluate.num_actors=7",
        )),
    ],
)  # fmt: skip
def test_other_settings_may_change_during_a_run(begin: Begin, done: tuple[str, ...], override: str) -> None:
    folder = begin(done)
    FolderOwnership.from_folder(folder, load(override)).enforce()
    assert schema.load(folder / JOB_FILE) == load(override)
    assert tuple(finished(folder)) == done
    assert (folder / ASSEMBLED_FOLDER).exists()


def test_a_changed_report_is_written_again(begin: Begin) -> None:
    folder = begin(FINISHED)
    FolderOwnership.from_folder(folder, load("report.examples=3")).enforce()
    assert tuple(finished(folder)) == FINISHED[:-1]


def test_changed_questions_of_users_are_asked_by_a_finished_run(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(FINISHED)
    assert _list_finished(load(), folder) == list(FINISHED)
    monkeypatch.setattr(evaluate, "has_new_questions", lambda *_: True)
    assert _list_finished(load(), folder) == list(TRAINED)
    assert _list_finished(load("evaluate=null"), folder) == list(FINISHED)


def test_an_older_job_file_gets_the_default_of_a_new_setting(begin: Begin) -> None:
    path = begin(FINISHED) / JOB_FILE
    now = path.read_text()
    path.write_text(now.replace("gpu_share: 1.0\n", ""))
    assert path.read_text() != now
    FolderOwnership.from_folder(path.parent, load()).enforce()
    assert path.read_text() == now


def test_a_run_without_ray_fixes_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the Ray that tests share may run in this process
    for seed in (0, 1):
        with pytest.raises(ValueError, match=r"127\.0\.0\.1:1"):
            run(load(f"seed={seed}"), tmp_path / "run")
    assert schema.load(tmp_path / "run" / JOB_FILE).seed == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"a: [", "line 1, column 5: "), (b"\xff", "'utf-8' codec can't decode"), (b"name: \x00", "not plain YAML: ")],
)
def test_a_damaged_job_in_the_folder_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / JOB_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path / JOB_FILE}: {problem}"):
        FolderOwnership.from_folder(tmp_path, load())


@pytest.mark.parametrize("content", ["train: 3", "- 1", ""])
def test_a_job_in_the_folder_that_is_no_job_has_no_stages(tmp_path: Path, content: str) -> None:
    (tmp_path / JOB_FILE).write_text(content)
    assert FolderOwnership.from_folder(tmp_path, load()).stages[0] == []
