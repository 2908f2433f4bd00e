"""The jobs of a study equal jobs that a user writes, and share stages; mistakes are refused before a run."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import command, run, study, tables
from jobs.schema import Job
from jobs.study import Study
from pipelines.core import cluster, jsonl

FILE = Path(__file__).parents[2] / "jobs" / "recipes" / "reproduce" / "mini.yaml"


def load(tmp_path: Path, **changes: Any) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(FILE.read_text()) | changes, sort_keys=False))
    return study.load(path)


def test_variants_start_from_the_result_of_the_shared_run(tmp_path: Path) -> None:
    mini = study.load(FILE)
    jobs = study.list_jobs(mini, tmp_path)
    shared = jobs.pop(study.SHARED)
    assert list(shared.train) == ["tower", "pretrain", "instruct"], "its tokenizer knows the words of all stages"
    assert list(jobs) == [f"{variant}-{seed}" for seed in mini.seeds for variant in mini.variants]
    for job in jobs.values():
        assert list(job.train) == ["instruct"]
        assert job.model.checkpoint == str(tmp_path / "shared" / "checkpoints" / "pretrain" / "model")
        assert job.data.source is None
        assert job.data.sets == {name: str(tmp_path / "shared" / "shards" / name) for name in shared.generated_sets}
        assert job.train["instruct"] == shared.train["instruct"]
        assert job.evaluate == shared.evaluate


def test_variants_differ_in_their_settings_alone(tmp_path: Path) -> None:
    mini = study.load(FILE)
    jobs = study.list_jobs(mini, tmp_path)
    plain = jobs["llava-0"]
    assert (plain.model.vmtc, plain.model.cmai, plain.model.reduction) == (None, None, "checkpoint")
    methods = {name: jobs[f"{name}-0"].model.methods for name in mini.variants}
    assert [name for name, settings in methods.items() if settings.get("vmtc")] == ["vmtc", "both"]
    assert [name for name, settings in methods.items() if settings.get("cmai")] == ["cmai", "both"]
    assert [name for name, settings in methods.items() if settings.get("reduction")] == ["spd", "random", "prumerge"]
    for variant in mini.variants:
        assert jobs[f"{variant}-0"].name == f"mini-{variant}-0", "names of checkpoints and trackers tell studies apart"
        assert jobs[f"{variant}-0"].seed == 0
        assert jobs[f"{variant}-1"].seed == 1
        assert jobs[f"{variant}-1"].model == jobs[f"{variant}-0"].model


def test_without_shared_stages_every_run_has_all_stages(tmp_path: Path) -> None:
    jobs = study.list_jobs(load(tmp_path, shared=[], seeds=[3]), tmp_path)
    assert study.SHARED not in jobs
    for job in jobs.values():
        assert list(job.train) == ["tower", "pretrain", "instruct"]
        assert job.seed == 3
        assert job.model.checkpoint is None
        assert job.data.source == "easy-vqa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {"model.vmtc.ratio": 2}}}, r"variants\.a: .*ratio: got 2"),
        ({"variants": {"a": {"model.vmtc.ration": 0.5}}}, r"variants\.a: .*unknown key, did you mean 'ratio'"),
        ({"variants": {}}, "variants: got {}"),
        ({"variants": {"../a": {}}}, r"variants.*: key '\.\./a'"),
        ({"seeds": [1, 1]}, r"seeds: got \[1, 1\], allowed: each once"),
        ({"shared": ["pretrain"]}, "shared: got pretrain, allowed: the first of the stages tower, pretrain, instruct"),
        ({"shared": ["tower", "pretrain", "instruct"]}, "shared: got .*, allowed: the first of the stages .*, not all"),
        (
            {"shared": ["tower"]},
            "shared: got tower, allowed: tower, pretrain, because the others start from the whole model",
        ),
        ({"job": {"name": "x"}}, "job: got a name, allowed: none"),
        ({"job": {"train": 5}}, r"job\.train: got 5, allowed: a section of stages"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_variant(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, **changes)
    assert "\n" not in str(error.value)


SOURCED = """
name: sourced
job:
  data: {source: null, sets: {mine: mine.jsonl}}
  model: {checkpoint: model}
  train:
    pretrain: &stage
      {objective: language, data: mine, steps: 2, global_batch_size: 4, micro_batch_size: 4,
       learning_rate: {projector: 1e-3}}
    instruct: *stage
variants: {a: {}, b: {seed: 5}}
"""


@pytest.mark.parametrize("shared", [[], ["pretrain"]])
def test_data_in_another_form_is_made_into_one_set_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"conversations": turns}))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(yaml.safe_load(SOURCED) | {"shared": shared}, sort_keys=False))
    jobs: dict[str, Job] = {}
    monkeypatch.setattr(run, "run", lambda job, folder, *_, **__: jobs.update({folder.name: job}))
    monkeypatch.setattr(cluster, "open_session", nullcontext)
    monkeypatch.setattr(tables, "write_tables", lambda *_: None)
    study.run_study(study.load(tmp_path / "study.yaml"), tmp_path / "runs")
    assert list(jobs) == [*(["shared"] if shared else []), "a-0", "b-0"]
    made = tmp_path / "runs" / ("shared/shards" if shared else "shards") / "mine"
    for name, job in jobs.items():
        assert job.data.sets == {"mine": str(made)}
        # The shared run makes the set, or else the first run, and the others find it finished.
        makes_set = name == "shared" or not shared
        assert {n: source.source for n, source in job.data.make.items()} == (
            {"mine": str(tmp_path / "mine.jsonl")} if makes_set else {}
        )


def test_the_tables_of_a_share_have_the_runs_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tmp_path, variants={"a": {}, "b": {}}, shared=[], seeds=[0])
    tabled: list[list[str]] = []
    monkeypatch.setattr(run, "run", lambda job, folder, *_, **__: folder.mkdir())
    monkeypatch.setattr(cluster, "open_session", nullcontext)
    monkeypatch.setattr(tables, "write_tables", lambda runs, *_: tabled.append([path.name for path in runs]))
    for number in (2, 1):
        study.run_study(loaded, tmp_path / "runs", share=study.Share(number, 2))
    assert tabled == [["b-0"], ["a-0", "b-0"]]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(ValueError, match=r"runs/mini: no run folder can be made here: Not a directory$"):
        study.run_study(study.load(FILE), tmp_path / "runs" / "mini")


TINY = """
name: tiny
shared: [pretrain]
seeds: [0, 1]
job:
  data: {samples_per_shard: 2000}
  model:
    tower:
      {image_size: 16, patch_size: 8, num_hidden_layers: 3, hidden_size: 16, num_attention_heads: 2,
       intermediate_size: 16}
    language: {num_hidden_layers: 2, hidden_size: 16, num_attention_heads: 2, intermediate_size: 16}
    vmtc: null
    cmai: null
  train:
    pretrain: &stage
      {objective: language, data: captions, template: plain, steps: 2, global_batch_size: 4, micro_batch_size: 4,
       learning_rate: {projector: 1e-3}}
    instruct: {<<: *stage, data: conversations, template: vicuna_bare}
  evaluate: {tasks: {instructions: {limit: 2, max_new_tokens: 4}}}
variants:
  llava: {}
  random: {model.reduction: {method: random, ratio: 0.5}}
"""


@pytest.mark.slow
def test_a_study_trains_shared_stages_once_and_resumes(
    tmp_path: Path, ray_cluster: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    words = ["run", str(path), "--runs-dir", str(tmp_path / "runs")]
    assert command.main(words) == 0
    folder = tmp_path / "runs" / "tiny"
    runs = [f"{variant}-{seed}" for seed in (0, 1) for variant in ("llava", "random")]
    for name in runs:
        assert [line["step"] for line in jsonl.read(folder / name / "progress.jsonl")] == [
            "assemble", "instruct", "evaluate", "report",
        ]  # fmt: skip
        assert (folder / name / "report.html").exists()
    assert [line["step"] for line in jsonl.read(folder / "shared" / "progress.jsonl")] == ["shards", "pretrain"]
    tables = (folder / "tables.md").read_text()
    assert "| LLaVA-1.5 | 2 seeds" in tables
    assert "shared" not in tables
    before = {name: (folder / name / "metrics.jsonl").stat().st_mtime_ns for name in [*runs[1:], "shared"]}
    shutil.rmtree(folder / runs[0])
    capfd.readouterr()
    assert command.main(words) == 0
    assert (folder / runs[0] / "report.html").exists()
    assert before == {name: (folder / name / "metrics.jsonl").stat().st_mtime_ns for name in before}
    assert "tiny is finished; its tables: " in capfd.readouterr().out
