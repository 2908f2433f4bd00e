"""`redux shards features` by the command line, and runs with the features it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.jobs.command_line import CommandResult, run_command

pytestmark = pytest.mark.integration

STEPS = 3


@pytest.fixture(scope="module")
def job(parts: dict[str, str], ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job on the pretrained parts with a frozen tower, and its set of twelve records, of which four have no image."""
    folder = tmp_path_factory.mktemp("features")
    noise = np.random.default_rng(0)
    records = []
    for number in range(12):
        question, record = f"what is {number}?", {}
        if number % 3:
            Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
            question, record = f"<image>\n{question}", {"image": f"{number}.png"}
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
        records.append({"id": str(number), "conversations": turns, **record})
    (folder / "talk.json").write_text(json.dumps(records))
    made = run_command("shards", "make", "--source", folder / "talk.json", "--out", folder / "talk")
    assert made.code == 0, made.err
    stage = {
        "objective": "language",
        "data": "talk",
        "steps": STEPS,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "zero_stage": 3,
        "learning_rate": {"projector": 1e-3, "language": 1e-3},
    }
    text = {
        "name": "images",
        "num_workers": 2,
        "data": {"source": None, "sets": {"talk": str(folder / "talk")}},
        "model": {part: parts[part] for part in ("tower", "language")},
        "train": {"instruct": stage},
        "report": {},
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(text))
    return path


@pytest.fixture(scope="module")
def run(job: Path) -> Callable[..., CommandResult]:
    """Function that runs the job with overrides."""

    def run(*overrides: str) -> CommandResult:
        return run_command("run", job, *overrides, "--runs-dir", job.parent / "runs")

    return run


def read_losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_features_is_the_run_with_images(job: Path, run: Callable[..., CommandResult]) -> None:
    """Bit for bit, because micro-batches have one sample each."""
    runs, features = job.parent / "runs", job.parent / "talk-features"
    done = run()
    assert done.code == 0, done.err
    command = ("shards", "features", job.parent / "talk", "--model", runs / "images", "--out", features)
    written = run_command(*command)
    assert written.code == 0, written.err
    assert "features of 8 images, 8 x 32 values in fp32, 1056 bytes for each" in written.out
    assert run_command(*command).code == 0
    other = run_command(*command, "--image-aspect-ratio", "crop")
    assert other.code == 2
    assert "contains features of another set, tower or form of images" in other.err

    trained = run("name=features", f"data.features.talk={features}")
    assert trained.code == 0, trained.err
    assert len(read_losses(runs / "features")) == STEPS
    assert read_losses(runs / "features") == read_losses(runs / "images")

    # Before Ray starts, and in the worker that has loaded the tower.
    early = run("name=early", f"data.features.talk={features}", "train.instruct.precision=bf16")
    assert early.code == 2
    assert "data.features.talk: got features with precision fp32, allowed for train.instruct: bf16" in early.err
    refused = run("name=refused", f"data.features.talk={features}", "model.vmtc.iterations=1")
    assert refused.code == 2
    assert "features of another tower or other settings of vmtc" in refused.err.strip().splitlines()[-1]
