"""A job from images to report, step by step; what is finished is not done again.

runs/NAME/job.yaml        the job as resolved; another job under the same name is refused
runs/NAME/progress.jsonl  {"step", "wall_s"} of each finished step: what a second run goes by
runs/NAME/shards/SET/     captions, conversations, test
runs/NAME/tokenizer/      learned from the training sets
runs/NAME/scores.json     the evaluation's, which metrics.json takes up
"""

import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from jobs import schema
from jobs.schema import Job
from pipelines import cluster, easy_vqa, evaluate, report, shards, storage, train
from pipelines import records as check
from redux.conversation import TEMPLATES, word_tokenizer

JOB = "job.yaml"
PROGRESS = "progress.jsonl"
SCORES = "scores.json"


def run(job: Job, folder: Path) -> None:
    """Do what is left of the job in its run folder.  ValueError where the folder holds another job."""
    clock = time.monotonic()
    folder = folder.resolve()
    job = _located(job)
    _claim(job, folder)
    done = _finished(folder)
    left = {name: step for name, step in steps(job, folder).items() if name not in done}
    if not left:
        print(f"{job.name} is finished; its report: {folder / 'report.html'}")
        return
    if done:
        print(f"{job.name} goes on with {next(iter(left))}; finished: {', '.join(done)}")
    with cluster.session():
        for name, step in left.items():
            step()
            now = time.monotonic()
            with (folder / PROGRESS).open("a") as file:
                file.write(json.dumps({"step": name, "wall_s": now - clock}) + "\n")
            clock = now
    _summarise(folder)
    print(f"{job.name} is finished; its report: {folder / 'report.html'}")


def steps(job: Job, folder: Path) -> dict[str, Callable[[], None]]:
    """The steps of a job by name, in order: shards, each training stage, evaluation, report."""
    sets, tokenizer = locations(job, folder), folder / "tokenizer"
    test = sets["test"]
    result: dict[str, Callable[[], None]] = {"shards": lambda: _shards(job, sets, tokenizer)}
    start: Path | None = None
    for name, stage in job.train.items():
        plan = train.Plan(
            name=name,
            stage=stage,
            model=job.model,
            seed=job.seed,
            workers=job.workers,
            run=folder,
            sets={name: sets[name] for name in stage.mixture},
            tolerance=job.data.tolerance,
            tokenizer=tokenizer,
            start=start,
        )
        result[name] = functools.partial(train.fit, plan)
        start, last = plan.result, stage
    assert start is not None  # the schema asks for a stage
    model: Path = start

    def answer() -> None:
        _write(folder / SCORES, evaluate.evaluate(model, test, folder, job.evaluate, last.template, last.fit))

    def describe() -> None:
        _summarise(folder)
        report.write(folder, evaluate.examples(model, test, folder / evaluate.FILE, job.report.examples, last.fit))

    return {**result, "evaluate": answer, "report": describe}


def _located(job: Job) -> Job:
    """The job with its sets' paths from the root on.  ValueError where a set is missing or empty."""
    sets = {name: storage.absolute(url) for name, url in job.data.sets.items()}
    for name, url in sets.items():
        if not len(shards.Shards(url)):
            raise ValueError(f"data.sets.{name}: {url} has no samples, allowed: at least one")
    return replace(job, data=replace(job.data, sets=sets))


def locations(job: Job, folder: Path) -> dict[str, str]:
    """Where each set of shards lies: those that the job makes, and those that it names."""
    return {name: str(folder / "shards" / name) for name in easy_vqa.SETS} | job.data.sets


def _claim(job: Job, folder: Path) -> None:
    """Write the resolved job; ValueError where the folder holds one that says anything else."""
    path, resolved = folder / JOB, schema.dump(job)
    if path.exists():
        before, now = (yaml.safe_load(text) for text in (path.read_text(), resolved))
        for key, old, new in _differences(before, now):
            if key != "data.tolerance":  # more may be tolerated after all
                raise ValueError(
                    f"{path}: this run was started with {key} = {old!r}, not {new!r}; "
                    "give the job another name, or the run another folder by --into"
                )
        if before != now:
            _put(path, resolved)
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _put(path, resolved)
        except OSError as error:
            raise ValueError(f"{folder}: no run folder can be made here: {error.strerror}") from None


def _differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif before != now:
        yield path, before, now


def _finished(folder: Path) -> list[str]:
    return [entry["step"] for entry in _progress(folder)]


def _progress(folder: Path) -> list[dict]:
    path = folder / PROGRESS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _summarise(folder: Path) -> None:
    """metrics.json: the scores, and wall-clock seconds by step and in all, of the runs that finished the steps."""
    times = {f"wall_s.{entry['step']}": entry["wall_s"] for entry in _progress(folder)}
    scores = json.loads((folder / SCORES).read_text())
    _write(folder / "metrics.json", {**scores, "wall_s": sum(times.values()), **times})


def _write(path: Path, values: dict[str, float]) -> None:
    _put(path, json.dumps(values, indent=2) + "\n")


def _put(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _shards(job: Job, sets: dict[str, str], tokenizer: Path) -> None:
    """Captions and conversations of the training images, conversations of the test images; and the tokenizer."""
    records = {name: given() for name, given in easy_vqa.SETS.items()}
    making = shards.Making(samples_per_shard=job.data.samples_per_shard)
    for name, given in records.items():
        shards.make(given, str(easy_vqa.FOLDER), sets[name], making)
    templates = [TEMPLATES[stage.template] for stage in job.train.values()]
    mixed = {name for stage in job.train.values() for name in stage.mixture}
    others = (
        record
        for name in sorted(mixed - records.keys())
        for record in shards.Shards(sets[name]).records()
        if check.fault({"id": name, **record}, None) is None
    )
    texts = (
        "".join(piece for piece, _ in template.spans(record["conversations"]))
        for record in itertools.chain(records["captions"], records["conversations"], others)
        for template in templates
    )
    word_tokenizer(texts, job.model.language.max_position_embeddings).save_pretrained(tokenizer)
