"""The heads that alone get CMAI are chosen on training samples, once, and written into the job of the run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import redux
from jobs import decisive_heads
from jobs.decisive_heads import HEADS_FILE, choose_heads, read_examples
from jobs.schema import Job
from jobs.study import DecisiveHeads
from pipelines.core import cluster
from pipelines.data import easy_vqa
from pipelines.data.options import Data
from pipelines.evaluation.tasks import Evaluate
from redux.architecture import ModelSettings
from redux.heads import select_heads
from redux.settings import CMAI

SETTINGS = DecisiveHeads(variants=("few",), share=0.25, data="half_shown", samples=3)


@pytest.fixture
def job(parts: dict[str, str], tmp_path: Path) -> Job:
    """A job that evaluates a tiny model with CMAI."""
    folder = tmp_path / "model"
    llava, tokenizer = redux.assemble(parts["tower"], parts["language"])
    llava.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = ModelSettings(checkpoint=str(folder), cmai=CMAI(gamma_max=0.4, heads="each"))
    return Job(name="few", data=Data(source=None), model=model, evaluate=Evaluate())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checkpoints whose heads were measured, by this process in place of a worker of Ray."""
    checkpoints = []

    class Task:
        def remote(self, checkpoint: str, examples: list[Any]) -> Any:
            checkpoints.append(checkpoint)
            return decisive_heads._measure(checkpoint, examples)

    monkeypatch.setattr(ray, "remote", lambda **options: lambda function: Task())
    monkeypatch.setattr(ray, "get", lambda result: result)
    monkeypatch.setattr(cluster, "count_gpus", lambda: 0)
    return checkpoints


def test_heads_are_measured_once_and_restrict_cmai_alone(job: Job, measured: list[str], tmp_path: Path) -> None:
    chosen = choose_heads(job, tmp_path / "run", SETTINGS)
    found = json.loads((tmp_path / "run" / HEADS_FILE).read_text())
    heads = select_heads(torch.tensor(found["importance"]), 0.25)
    assert len(heads) == round(torch.tensor(found["importance"]).numel() / 4)
    assert isinstance(job.model.cmai, CMAI)
    assert chosen == replace(job, model=replace(job.model, cmai=replace(job.model.cmai, heads=heads)))
    assert choose_heads(job, tmp_path / "run", SETTINGS) == chosen
    assert measured == [job.model.checkpoint], "a resumed run reads the file"
    choose_heads(job, tmp_path / "run", replace(SETTINGS, samples=2))
    assert len(measured) == 2, "other settings choose other heads"


def test_a_model_that_cannot_be_measured_is_one_line(job: Job, measured: list[str], tmp_path: Path) -> None:
    wrong = replace(job, model=replace(job.model, checkpoint=str(tmp_path)))
    with pytest.raises(ValueError, match=r"^decisive_heads: .*") as error:
        choose_heads(wrong, tmp_path / "run", SETTINGS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_examples_are_training_samples_with_taught_instructions(job: Job) -> None:
    examples = list(read_examples(job, replace(SETTINGS, samples=20)))
    records = easy_vqa.EASY_VQA_SETS["half_shown"]()
    test_images = {
        (easy_vqa.PACKAGE_IMAGES / str(question.image)).read_bytes() for question in easy_vqa.draw_questions()
    }
    assert len(examples) == 20
    prompts = {turn["value"].replace("<image>\n", "") for record in records for turn in record["conversations"]}
    for prompt, image, answer in examples:
        assert image
        assert image not in test_images
        assert {prompt, answer} <= prompts
