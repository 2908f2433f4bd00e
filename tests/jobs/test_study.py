"""A study's jobs are what a user would write by hand, share what they can, and each mistake is told before any runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import study
from jobs.study import Study

FILE = Path(__file__).parents[2] / "jobs" / "reproduce" / "mini.yaml"


def load(tmp_path: Path, **changes: Any) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(FILE.read_text()) | changes, sort_keys=False))
    return study.load(path)


def test_variants_go_on_from_what_the_shared_run_leaves(tmp_path: Path) -> None:
    mini = study.load(FILE)
    jobs = study.jobs(mini, tmp_path)
    shared = jobs.pop(study.SHARED)
    assert list(shared.train) == ["tower", "pretrain", "instruct"], "its tokenizer knows the words of all stages"
    assert list(jobs) == [f"{variant}-{seed}" for seed in mini.seeds for variant in mini.variants]
    for job in jobs.values():
        assert list(job.train) == ["instruct"]
        assert job.model.checkpoint == str(tmp_path / "shared" / "checkpoints" / "pretrain" / "model")
        assert job.data.source is None
        assert job.data.sets == {name: str(tmp_path / "shared" / "shards" / name) for name in shared.made}
        assert job.train["instruct"] == shared.train["instruct"]
        assert job.evaluate == shared.evaluate


def test_variants_differ_in_what_they_say_and_in_nothing_else(tmp_path: Path) -> None:
    mini = study.load(FILE)
    jobs = study.jobs(mini, tmp_path)
    plain = jobs["llava-0"]
    assert (plain.model.vmtc, plain.model.cmai, plain.model.reduction) == (None, None, None)
    methods = {name: jobs[f"{name}-0"].model.methods for name in mini.variants}
    assert [name for name, each in methods.items() if each["vmtc"]] == ["vmtc", "both"]
    assert [name for name, each in methods.items() if each["cmai"]] == ["cmai", "both"]
    assert [name for name, each in methods.items() if each["reduction"]] == ["spd", "random", "prumerge"]
    for variant in mini.variants:
        assert jobs[f"{variant}-0"].seed == 0
        assert jobs[f"{variant}-1"].seed == 1
        assert jobs[f"{variant}-1"].model == jobs[f"{variant}-0"].model


def test_without_shared_stages_each_run_is_the_whole_job(tmp_path: Path) -> None:
    jobs = study.jobs(load(tmp_path, shared=[], seeds=[3]), tmp_path)
    assert study.SHARED not in jobs
    for job in jobs.values():
        assert list(job.train) == ["tower", "pretrain", "instruct"]
        assert job.seed == 3
        assert job.model.checkpoint is None
        assert job.data.source == "easy-vqa"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"variants": {"a": {"model.vmtc.ratio": 2}}}, r"variants\.a: .*ratio: got 2"),
        ({"variants": {"a": {"model.vmtc.ration": 0.5}}}, r"variants\.a: .*unknown key, did you mean 'ratio'"),
        ({"variants": {}}, "variants: got {}"),
        ({"variants": {"../a": {}}}, r"variants.*: key '\.\./a'"),
        ({"seeds": [1, 1]}, r"seeds: got \[1, 1\], allowed: each once"),
        ({"shared": ["pretrain"]}, "shared: got pretrain, allowed: the first of the stages tower, pretrain, instruct"),
        ({"shared": ["tower", "pretrain", "instruct"]}, "shared: got .*, allowed: the first of the stages .*, not all"),
        ({"job": {"name": "x"}}, "job: got a name, allowed: none"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_variant(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        load(tmp_path, **changes)
    assert "\n" not in str(error.value)
