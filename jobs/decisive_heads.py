"""CMAI for the few heads of a trained language model that decide most, in runs of a study.

Heads are chosen by their importance for answers that follow instructions (`redux.heads`), on training samples and
before the run. So no question of the evaluation has a part in the choice.

runs/NAME/VARIANT-SEED/heads.json  {"settings", "checkpoint", "heads", "importance"}: numbers of the chosen heads, and
                                   the importance of all heads by layer

Cost: the model is loaded once more, and reads and differentiates each sample once.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray

from jobs.schema import Job
from jobs.study import DecisiveHeads
from pipelines.core import cluster, failures, storage
from pipelines.data.easy_vqa import EASY_VQA_SETS, PACKAGE_IMAGES
from pipelines.data.shard_index import Shards
from pipelines.evaluation.tasks import spread_evenly
from redux import answering
from redux.answering import TrainedLlava
from redux.benchmarks.custom import read_first_question
from redux.heads import encode_example, measure_head_importance, select_heads
from redux.settings import CMAI

HEADS_FILE = "heads.json"

Example = tuple[str, bytes | None, str]
"""Prompt, image and answer."""


def choose_heads(job: Job, folder: Path, settings: DecisiveHeads) -> Job:
    """Restrict the CMAI of a job to the decisive heads of its checkpoint, which are measured once and then kept.

    Args:
        job: job that starts from a trained model, or evaluates one.
        folder: run folder.
        settings: number and source of the heads.

    Raises:
        ValueError: the set cannot be read, or the model is no LLaVA.
    """
    assert isinstance(job.model.cmai, CMAI)
    checkpoint = str(job.model.checkpoint)
    source = {"settings": json.loads(json.dumps(asdict(settings))), "checkpoint": checkpoint}
    path = folder / HEADS_FILE
    stored = json.loads(path.read_text()) if path.exists() else {}
    # A resumed run has the same heads, also if rounding on another device would rank them differently.
    if {name: stored.get(name) for name in source} != source:
        print(f"{job.name}: measuring the heads of {checkpoint} on {settings.samples} samples of {settings.data}")
        examples = list(read_examples(job, settings))
        gpus = job.gpu_share if cluster.count_gpus() else 0
        importance, problem = ray.get(ray.remote(num_gpus=gpus)(_measure).remote(checkpoint, examples))
        if problem:
            raise ValueError(f"decisive_heads: {problem}")
        stored = source | {"heads": list(select_heads(importance, settings.share)), "importance": importance.tolist()}
        folder.mkdir(parents=True, exist_ok=True)
        storage.write(str(path), json.dumps(stored).encode())
    return replace(job, model=replace(job.model, cmai=replace(job.model.cmai, heads=tuple(stored["heads"]))))


def read_examples(job: Job, settings: DecisiveHeads) -> Iterator[Example]:
    """Read the first question and answer of evenly spaced samples of a training set.

    Raises:
        ValueError: the set cannot be read.
    """
    if settings.data in job.data.sets:
        shards = Shards(job.data.sets[settings.data])
        samples = shards.read_samples(spread_evenly(len(shards), settings.samples))
        for sample in samples:
            yield _make_example(sample.id, sample.record, sample.image or None)
        return
    # The records of easy-VQA are in its package, also if no stage of the study trains on this set.
    records = EASY_VQA_SETS[settings.data]()
    for position in spread_evenly(len(records), settings.samples):
        record = records[position]
        image = (PACKAGE_IMAGES / record["image"]).read_bytes() if "image" in record else None
        yield _make_example(f"{settings.data} {position}", record, image)


def _make_example(location: str, record: Mapping[str, Any], image: bytes | None) -> Example:
    fields = read_first_question(location, record)
    return fields["question"], image, fields["answer"]


def _measure(checkpoint: str, examples: list[Example]) -> tuple[Any, str]:
    """Measure the importance of all heads without CMAI, on a worker of Ray; returns it, or an error in words.

    The error is a value, not an exception, as Ray would wrap it in a traceback.
    """
    try:
        answerer = answering.load(checkpoint, cmai=None)
        if not isinstance(answerer, TrainedLlava):
            raise ValueError(f"got {checkpoint}, allowed: a LLaVA")
        inputs = (encode_example(answerer, *example) for example in examples)
        return measure_head_importance(answerer.model, inputs), ""
    except (OSError, ValueError, ImportError) as error:
        return None, failures.classify_error(error).text
