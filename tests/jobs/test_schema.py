"""Shipped job files load, are equal after writing and reading, and begin with a comment; wrong values are refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import document, schema, search, study
from jobs.run import list_phases
from pipelines.search.trials import Trials

FOLDER = Path(__file__).parents[2] / "jobs" / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
STUDIES = [path for path in FILES if "variants" in document.read_tree(path)]
SEARCHES = [path for path in FILES if "space" in document.read_tree(path)]
SHIPPED = [path for path in FILES if path not in STUDIES + SEARCHES]
NAMES = {
    "quickstart",
    "evaluate",
    "one-gpu",
    *(f"llava-1.5-{size}{method}" for size in ("7b", "13b") for method in ("", "-redux")),
}


def test_jobs_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} == NAMES
    assert {path.stem for path in STUDIES} == {"mini", "smollm2", "smollm2-cpu", "smollm2-pilot", "training-free"}
    assert {path.stem for path in SEARCHES} == {"laptop", "llava-1.5-7b"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_job_is_equal_after_writing_and_reading(path: Path, tmp_path: Path) -> None:
    job = schema.load(path)
    resolved = tmp_path / "job.yaml"
    resolved.write_text(schema.dump(job))
    assert schema.load(resolved) == job
    assert schema.dump(schema.load(resolved)) == schema.dump(job)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_job_begins_with_a_comment_and_has_the_name_of_its_file(path: Path) -> None:
    assert path.read_text().startswith("# ")
    assert schema.load(path).name == path.stem


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_study_begins_with_a_comment_and_makes_jobs(path: Path, tmp_path: Path) -> None:
    assert path.read_text().startswith("# ")
    loaded = study.load(path)
    assert loaded.name == path.stem
    seeds = {study.SHARED: 1} | {variant: len(loaded.list_seeds(variant)) for variant in loaded.variants}
    evaluated = sum(seeds[applied.variant] for applied in loaded.applied.values())
    trained = sum(seeds.values()) - (not loaded.shared)
    assert len(study.list_jobs(loaded, tmp_path)) == trained + evaluated


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_search_begins_with_a_comment_and_draws_jobs(
    path: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    """All jobs keep the limits. Pretrained parts are replaced by small ones, since there is no hub."""
    assert path.read_text().startswith("# ")
    pretrained = isinstance(document.read_tree(path)["job"]["model"]["tower"], str)
    loaded = search.load(path, [f"job.model.{part}={folder}" for part, folder in parts.items()] if pretrained else [])
    assert loaded.name == path.stem
    jobs, written = search.TrialJobs(loaded), tmp_path / search.SEARCH_FILE
    written.write_text(document.write(loaded))
    assert search.load(written) == loaded
    trials = Trials(replace(loaded, max_concurrent_trials=loaded.num_trials), loaded.name, tmp_path, jobs.forecast)
    for number in range(len(loaded.references) + 12):
        trial = trials.next_trial(str(number))
        assert trial
        assert jobs.build(trial.values, str(number)).name == f"{path.stem}-{number}"


def test_the_numbers_of_a_job_are_checked() -> None:
    for override in ("num_workers=0", "seed=-1", "name=../up", "train={}", "nmae=a", "num_workers=true"):
        with pytest.raises(ValueError, match=r"^[^\n]+$(?!\n)"):
            schema.load(FOLDER / "quickstart.yaml", [override])


def test_the_name_of_a_stage_cannot_leave_the_run_folder() -> None:
    with pytest.raises(ValueError, match="train"):
        schema.load(FOLDER / "quickstart.yaml", ["train={../up: {}}"])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.instruct.template=plain", "train.instruct.template: got plain, allowed: "),
        ("train.tower.micro_batch_size=1", "train.tower.micro_batch_size: got 1, allowed: at least 2"),
        ("train.instruct.zero_stage=4", "train.instruct.zero_stage: got 4, allowed: 0, 1, 2 or 3"),
        ("seed=4294967296", "seed: got 4294967296, allowed: a whole number from 0 to 4294967295"),
        ("num_workers=3", "train.tower.global_batch_size: got 64, allowed: a multiple of 96"),
        ("model.vmtc.stages=99", "model.vmtc.stages: got 99, allowed: 1 to 4"),
        ("model.vmtc.ratio=0.999", "model.vmtc.ratio: got 0.999, allowed: one that leaves at least 1 of 64"),
        (
            "model.language.hidden_size=20",
            "model.language.num_attention_heads: got 4, allowed: one that gives heads of",
        ),
        (
            "train.tower.data=caption",
            "train.tower.data: got caption, allowed: captions, conversations, shown, half_shown, formats, "
            "half_formats, those of",
        ),
        (
            "train.instruct.data={conversations: 0}",
            'train.instruct.data: got {"conversations": 0}, allowed: text or a mapping of names to a number >',
        ),
        ("train.instruct.data={}", "train.instruct.data: got {}, allowed: "),
        ("train.instruct.steps=9", "train.instruct.epochs: got 6.0, and steps 9, allowed: one of the two"),
        ("train.instruct.epochs=null", "train.instruct.epochs: got None, and steps None, allowed: one of the two"),
        (
            "data.sets={formats: a}",
            "data.sets: got formats, allowed: other names than captions, conversations, shown, half_shown, formats",
        ),
        ("data.max_bad_fraction=2", "data.max_bad_fraction: got 2, allowed: a number from 0 to 1"),
        (
            "train.instruct.template=chat",
            "train.instruct.template: got chat, allowed for a model built from sizes: plain, vicuna_v1, vicuna_bare",
        ),
        ("model.language.max_position_embeddings=32", "model.language.max_position_embeddings: got 32, allowed: more"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_path(override: str, line: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(line)}[^\n]*$"):
        schema.load(FOLDER / "quickstart.yaml", [override])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.vmtc.token=3", "model.vmtc.token: unknown key, did you mean 'tokens'?"),
        ("model.cmai.gama=1", "model.cmai.gama: unknown key, "),
        ("model.vmtc.tokens=x", "model.vmtc.tokens: got 'x', allowed: "),
        ("model.vmtc=3", "model.vmtc: got 3, allowed: a section with the keys "),
    ],
)
def test_one_mistake_in_a_section_that_may_be_something_else_is_one_problem(override: str, line: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(line)}[^\n]*$") as caught:
        schema.load(FOLDER / "quickstart.yaml", [override])
    assert "more)" not in str(caught.value)


@pytest.mark.parametrize("change", [{"shuffle": "window"}, {"data": {"captions": 1, "conversations": 1}}])
def test_group_by_length_requires_one_set_and_a_full_shuffle(change: dict) -> None:
    overrides = [f"train.instruct.{key}={json.dumps(value)}" for key, value in {"group_by_length": 2, **change}.items()]
    with pytest.raises(
        ValueError, match=r"train.instruct.group_by_length: got 2 with shuffle \w+ and \d sets, allowed: "
    ):
        schema.load(FOLDER / "quickstart.yaml", overrides)
    schema.load(FOLDER / "quickstart.yaml", overrides[:1])


@pytest.mark.parametrize("name", schema.OTHER_PHASES)
def test_a_stage_cannot_take_the_name_of_another_step(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text((FOLDER / "quickstart.yaml").read_text().replace("  pretrain:", f"  {name}:"))
    with pytest.raises(ValueError, match=f"train: got a stage {name}, allowed: any other name"):
        schema.load(path)


def test_refused_names_of_stages_are_the_names_of_other_steps(parts: dict[str, str], tmp_path: Path) -> None:
    pretrained = [f"model.{part}={folder}" for part, folder in parts.items()]
    jobs = [
        schema.load(FOLDER / "quickstart.yaml"),
        schema.load(FOLDER / "quickstart.yaml", ["data.hold_out=0.01", "evaluate={}"]),
        schema.load(FOLDER / "quickstart.yaml", ["evaluate=null"]),
        schema.load(FOLDER / "llava-1.5-7b.yaml", pretrained),
    ]
    found = [tuple(name for name in list_phases(job, tmp_path) if name not in job.train) for job in jobs]
    assert found == [
        ("shards", "evaluate", "report"),
        ("shards", "questions", "evaluate", "report"),
        ("shards", "report"),
        ("assemble", "report"),
    ]
    assert {name for names in found for name in names} == set(schema.OTHER_PHASES)
