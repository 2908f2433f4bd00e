"""A job from images to report, step by step; what is finished is not done again.

runs/NAME/job.yaml        the job as resolved; jobs/claims.py says which settings may still change
runs/NAME/progress.jsonl  {"step", "wall_s"} of each finished step: what a second run goes by
runs/NAME/shards/SET/     captions, conversations, test
runs/NAME/tokenizer/      learned from the training sets, where a model starts from nothing
runs/NAME/assembled/      where it starts from pretrained parts: they and a projector as one model, with its tokenizer
runs/NAME/scores.json     the evaluation's, which metrics.json takes up
"""

import fcntl
import functools
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import ray
import tenacity
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerBase

from jobs import claims, schema
from jobs.claims import ASSEMBLED, PROGRESS
from jobs.layout import locate_checkpoints, locate_sets
from jobs.schema import Job
from pipelines.core import cluster, failures, interrupts, jsonl, storage
from pipelines.data import easy_vqa, shards
from pipelines.data import records as check
from pipelines.data.options import Making, Source
from pipelines.evaluation import evaluate, tasks
from pipelines.report import run_report
from pipelines.training import driver, ledger, lora, trackers
from pipelines.training.plan import Plan
from pipelines.training.stage import count_shared_workers
from redux import answering, pretrained
from redux.architecture import LanguageSizes, ModelSettings, TowerSizes, count_image_tokens
from redux.configuration import ReduxConfig
from redux.conversation import TEMPLATES, Template, train_word_tokenizer
from redux.extras import write_install_command
from redux.hub import local_copy
from redux.model import ReduxForConditionalGeneration

T = TypeVar("T")

SCORES = "scores.json"
TOKENIZER = "tokenizer"
LOCK = ".lock"


def run(
    job: Job,
    folder: Path,
    changed: bool = False,
    until: str | None = None,
    watch: driver.Watch | None = None,
    patience_s: float = 0,
) -> None:
    """Do what is left of the job in its run folder.

    until: the last step to do; None is the last of all.
    watch: hears how each stage gets on.
    patience_s: for another process that works on this run, before that is a ValueError.
    changed: go on although steps were done with other settings, or checkpoints are of other data or another model;
    otherwise that is a ValueError.
    """
    clock = time.monotonic()
    folder = folder.resolve()
    job = located(job, folder)
    work = steps(job, folder, changed, watch)
    if until:
        names = list(work)
        work = {name: work[name] for name in names[: names.index(until) + 1]}
    finished = f"{job.name} is finished; its {until or 'report'}: {folder / ('' if until else 'report.html')}"
    if not claims.Claim.of(folder, job).find_changes(changed) and not work.keys() - _finished(folder):
        print(finished)
        return
    claims.make_folder(folder)
    with alone(folder, patience_s):
        # another process may have worked on this run until now, so what it did is read again
        claims.Claim.of(folder, job).enforce(changed)
        done = _finished(folder)
        left = {name: step for name, step in work.items() if name not in done}
        if not left:
            print(finished)
            return
        if done:
            print(f"{job.name} goes on with {next(iter(left))}; finished: {', '.join(done)}")
        _check_sets(job, folder)
        if job.checkpoints and job.train.keys() & left.keys():
            driver.probe(locate_checkpoints(job, folder))
        jsonl.mend(folder / PROGRESS)
        with cluster.session():
            _check_resources(job, left)
            for name, step in left.items():
                interrupts.check()
                step()
                now = time.monotonic()
                jsonl.append(folder / PROGRESS, [{"step": name, "wall_s": now - clock}])
                clock = now
    if until is None:
        _summarise(folder)
        print(f"{job.name} is finished; its report: {folder / 'report.html'}")


def _check_resources(job: Job, steps_left: Collection[str]) -> None:
    """ValueError where Ray runs on this machine alone and has not what the steps left need: they would wait for ever.

    The error says which numbers fit.  All is checked before the first step, so nothing is refused after hours.
    """
    if not cluster.is_own():
        return
    places = cluster.count_places(job.gpu_share)
    trains = bool(job.train.keys() & set(steps_left))
    fewest = job.worker_range[0] if trains and job.worker_range else 1
    actors = job.evaluate.num_actors if job.evaluate and "evaluate" in steps_left else 1
    advice = []
    if fewest > places:
        advice.append(f"num_workers={count_shared_workers(job.train.values(), places)}")
    if isinstance(actors, int) and actors > places:
        advice.append(f"evaluate.num_actors={places}")
    if not advice:
        return
    kind, wanted = ("GPU", job.gpu_share) if cluster.gpus() else ("CPU", 1)
    needed = max(fewest, actors if isinstance(actors, int) else 1) * wanted
    found = ray.cluster_resources().get(kind, 0)
    raise ValueError(f"{job.name}: needs {needed:g} {kind}s, found {found:g}; set {' '.join(advice)}, or auto in place")


@contextmanager
def alone(folder: Path, patience_s: float = 0) -> Iterator[None]:
    """ValueError where another process works on this run: each would undo what the other does."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(BlockingIOError),
        stop=tenacity.stop_after_delay(patience_s),
        wait=tenacity.wait_fixed(0.5),
        reraise=True,
    )
    with (folder / LOCK).open("w") as file:
        try:
            retrying(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is at this run, allowed: one at a time") from None
        yield


def steps(
    job: Job, folder: Path, changed: bool = False, watch: driver.Watch | None = None
) -> dict[str, Callable[[], None]]:
    """The steps of a job by name, in order: shards, parts put together, each training stage, evaluation, report.

    ValueError where the model's pretrained parts cannot be read or do not go together.
    """
    sets, result = locate_sets(job, folder), {}
    stages = plans(job, folder, changed)
    if job.made or job.data.make or not job.model.is_pretrained:
        templates = [TEMPLATES[plan.template] for plan in stages.values()]
        result["shards"] = lambda: _shards(job, sets, folder / TOKENIZER, templates)
    _check_weights(job, folder)
    if job.model.is_pretrained and job.train:
        result["assemble"] = lambda: _assemble(job, folder / ASSEMBLED)
    last = list(stages)[-1] if stages else ""
    result |= {name: functools.partial(driver.train_stage, plan, watch=watch) for name, plan in stages.items()}
    settings = job.evaluate
    if settings is None:
        result["report"] = lambda: _report(folder, [])
        return result
    subject = _subject(job, settings, stages)

    def answer() -> None:
        clock = time.monotonic()
        _write(folder / SCORES, evaluate.evaluate(subject, folder, settings, job.gpu_share))
        ledger.note(folder, "evaluate", last, wall_s=time.monotonic() - clock)

    def describe() -> None:
        _report(folder, evaluate.examples(subject, folder, job.report.examples))

    return {**result, "evaluate": answer, "report": describe}


def _check_weights(job: Job, folder: Path) -> None:
    """ValueError where what the job starts from lacks weights or a tokenizer; weights are not read."""
    model = job.model
    if not model.is_pretrained or _find_assembled(job, folder):
        return
    try:
        if not model.checkpoint:
            pretrained.check_parts(str(model.tower), str(model.language), model.gguf_file)
        elif job.train or answering.is_llava(model.checkpoint):
            configured(model)
            pretrained.check_checkpoint(model.checkpoint)
        else:
            pretrained.check_checkpoint(model.checkpoint, AutoModelForImageTextToText)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def _check_sets(job: Job, folder: Path) -> None:
    """ValueError where images of a set, also of one that is still to be made, are not as a stage reads them."""
    prepared = {
        name: shards.Shards(url).prepared for name, url in job.data.sets.items() if name not in job.data.make
    } | {
        name: (source.image_size, source.image_aspect_ratio)
        for name, source in job.data.make.items()
        if source.image_size
    }
    if any(prepared.values()):
        for plan in plans(job, folder).values():
            for name in plan.stage.mixture:
                plan.check_prepared(name, prepared.get(name))


def _subject(job: Job, settings: tasks.Evaluate, stages: dict[str, Plan]) -> evaluate.Subject:
    """Who is evaluated: what the last stage made, or without one the checkpoint."""
    asked = {name: getattr(settings, name) for name in ("template", "image_aspect_ratio", "allow_mismatch")}
    if stages:
        return evaluate.Subject(model=list(stages.values())[-1].result, **asked)
    assert job.model.checkpoint
    return evaluate.Subject(model=job.model.checkpoint, methods=job.model.methods, **asked)


def plans(job: Job, folder: Path, changed: bool = False) -> dict[str, Plan]:
    """What the workers of each stage are told, by name and in order; each begins with the model of the one before.

    ValueError where the model's pretrained parts cannot be read or do not go together.
    """
    sets, result = locate_sets(job, folder), dict[str, Plan]()
    if not job.train:
        return result
    image_size, image_tokens = _image(job, folder)
    tokenizer = folder / (ASSEMBLED if job.model.is_pretrained else TOKENIZER)
    start = str(tokenizer) if job.model.is_pretrained else None
    for name, stage in job.train.items():
        result[name] = Plan(
            name=name,
            stage=stage,
            model=None if job.model.is_pretrained else job.model,
            seed=job.seed,
            workers=job.worker_range,
            gpu_share=job.gpu_share,
            run=folder,
            checkpoints=locate_checkpoints(job, folder),
            sets={name: sets[name] for name in stage.mixture},
            tolerance=job.data.max_bad_fraction,
            tokenizer=tokenizer,
            start=start,
            image_size=image_size,
            image_tokens=image_tokens,
            recovery=job.recovery,
            job=schema.dump(job),
            title=job.name,
            trackers=tuple(job.trackers),
            changed=changed,
        )
        start = result[name].result
    return result


def located(job: Job, folder: Path) -> Job:
    """Return the job with its paths from the root on, and with templates and image fits as the model was trained.

    folder: of the run; what it holds already is not looked for elsewhere.
    ValueError where a set or the files of a benchmark cannot be used, a package is missing that the job needs, or the
    model was trained in another way than it is to be asked: better now than after days of training.
    """
    sets = {name: storage.absolute(url) for name, url in job.data.sets.items()}
    for name, url in sets.items():
        if name not in job.data.make and not len(shards.Shards(url)):
            raise ValueError(f"data.sets.{name}: {url} has no samples, allowed: at least one")
    trackers.require(job.trackers)
    for name, stage in job.train.items():
        if stage.lora:
            lora.require(f"train.{name}.lora")
        if stage.image_backend == "fast" and find_spec("simplejpeg") is None:
            raise ValueError(
                f"train.{name}.image_backend: got fast, allowed: exact, or the package simplejpeg: "
                + write_install_command("fast")
            )
    job = _with_format(job, folder)
    return replace(
        job,
        checkpoints=job.checkpoints and storage.absolute(job.checkpoints),
        data=replace(job.data, sets=sets, make={name: _readable(name, each) for name, each in job.data.make.items()}),
        evaluate=job.evaluate and replace(job.evaluate, tasks=_asked(job.evaluate)),
        model=_locate_parts(job.model),
    )


def _with_format(job: Job, folder: Path) -> Job:
    """Return the job with the template and image fit of each stage and of the evaluation decided."""
    assembled = _find_assembled(job, folder)
    start = str(assembled) if assembled else _path(job.model.checkpoint)
    saved = answering.read_config(start) if start and (job.train or answering.is_llava(start)) else {}
    trained = {"template": saved.get("conversation_template"), "image_aspect_ratio": saved.get("image_aspect_ratio")}
    train = {name: stage.resolve_format(**trained) for name, stage in job.train.items()}
    asked = job.evaluate
    if asked and (saved or train):
        last = list(train.values())[-1] if train else None
        if last:
            saved = {"conversation_template": last.template, "image_aspect_ratio": last.image_aspect_ratio}
        try:
            template, image_aspect_ratio = answering.resolve_format(
                saved, asked.template, asked.image_aspect_ratio, asked.allow_mismatch
            )
        except ValueError as error:
            raise ValueError(f"evaluate.{error}") from None
        asked = replace(asked, template=template, image_aspect_ratio=image_aspect_ratio)
    return replace(job, train=train, evaluate=asked)


def _readable(name: str, source: Source) -> Source:
    """With its paths from the root on; ValueError where there are no records."""
    url = storage.absolute(source.json)
    if not storage.exists(url):
        raise ValueError(f"data.make.{name}.json: {url} is not there, allowed: a JSON file of records")
    return replace(source, json=url, images=storage.absolute(source.images))


def _asked(settings: tasks.Evaluate) -> dict[tasks.Name, tasks.Asking]:
    """The tasks, their files looked at once."""
    result = dict(settings.tasks)
    for name, asking in settings.tasks.items():
        result[name] = replace(
            asking,
            files=tuple(map(storage.absolute, asking.files)),
            images=asking.images and storage.absolute(asking.images),
        )
        evaluate.check(name, result[name])
    return result


def _path(part: T) -> T | str:
    """A folder from the root on; anything else, such as a hub id, as it is."""
    return storage.absolute(part) if isinstance(part, str) and Path(part).is_dir() else part


def _find_assembled(job: Job, folder: Path) -> Path | None:
    """Return the folder of the model that a job starts from, None where there is none of this job's parts."""
    return claims.find_assembled(folder, replace(job, model=_locate_parts(job.model)))


def _locate_parts(model: ModelSettings) -> ModelSettings:
    """Return a model whose folders are written from the root on."""
    return replace(model, tower=_path(model.tower), language=_path(model.language), checkpoint=_path(model.checkpoint))


def _image(job: Job, folder: Path) -> tuple[int, int]:
    """Pixels of an image's side, and tokens of it that reach the language model."""
    model = job.model
    if isinstance(model.tower, TowerSizes):
        return model.tower.image_size, count_image_tokens(model)
    try:
        # once it is there, what it was made of is no longer needed
        whole = _find_assembled(job, folder)
        config = ReduxConfig.from_pretrained(whole) if whole else configured(model)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None
    return config.vision_config.image_size, config.image_seq_length


def configured(model: ModelSettings) -> ReduxConfig:
    """What the pretrained model, or the parts of one, will be; ValueError where that cannot be."""
    if model.checkpoint:
        return pretrained.configure_checkpoint(model.checkpoint, **model.methods)
    assert isinstance(model.tower, str)
    assert isinstance(model.language, str)
    return pretrained.configure_assembly(model.tower, model.language, gguf_file=model.gguf_file, **model.methods)


def _finished(folder: Path) -> list[str]:
    return [entry["step"] for entry in jsonl.read(folder / PROGRESS)]


def _summarise(folder: Path) -> None:
    """metrics.json: the scores, and wall-clock seconds by step and in all, of the runs that finished the steps."""
    times = {f"wall_s.{entry['step']}": entry["wall_s"] for entry in jsonl.read(folder / PROGRESS)}
    scores = json.loads((folder / SCORES).read_text()) if (folder / SCORES).exists() else {}
    _write(folder / "metrics.json", {**scores, "wall_s": sum(times.values()), **times})


def _report(folder: Path, examples: Sequence[evaluate.Example]) -> None:
    _summarise(folder)
    run_report.write(folder, examples)


def _write(path: Path, values: dict[str, float]) -> None:
    claims.write_atomically(path, json.dumps(values, indent=2) + "\n")


def _shards(job: Job, sets: dict[str, str], tokenizer: Path, templates: Sequence[Template]) -> None:
    """The sets that the job makes; and, for a model that starts from nothing, a tokenizer."""
    for name, source in job.data.make.items():
        making = Making(**{each.name: getattr(source, each.name) for each in fields(Making)})
        shards.make(check.read(storage.read(source.json), source.json), source.images, sets[name], making)
    records = {name: easy_vqa.SETS[name]() for name in job.made}
    making = Making(samples_per_shard=job.data.samples_per_shard)
    for name, given in records.items():
        shards.make(given, str(easy_vqa.FOLDER), sets[name], making)
    if not isinstance(job.model.language, LanguageSizes):
        return
    mixed = {name for stage in job.train.values() for name in stage.mixture}
    others = (
        record
        for name in sorted(mixed - records.keys())
        for record in shards.Shards(sets[name]).records()
        if check.find_fault(record, None) is None
    )
    texts = (
        "".join(piece for piece, _ in template.split_spans(record["conversations"]))
        for record in itertools.chain(*records.values(), others)
        for template in templates
    )
    with failures.locate_errors(tokenizer):
        train_word_tokenizer(texts, job.model.language.max_position_embeddings).save_pretrained(tokenizer)


def _assemble(job: Job, folder: Path) -> None:
    """The model to start from, and its tokenizer, in a folder that is there whole or not at all."""
    if folder.exists():
        return
    half = all(stage.precision == "bf16" for stage in job.train.values())
    torch.manual_seed(job.seed)
    whole, tokenizer = _assembled(job.model, torch.bfloat16 if half else torch.float32)
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with failures.locate_errors(folder):
            whole.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, folder)
    except BaseException:  # a disk that is full, or a signal
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _assembled(
    model: ModelSettings, dtype: torch.dtype
) -> tuple[ReduxForConditionalGeneration, PreTrainedTokenizerBase]:
    if model.checkpoint:
        with local_copy(model.checkpoint, label="checkpoint") as folder:
            whole = ReduxForConditionalGeneration.from_pretrained(folder, dtype=dtype, **model.methods)
            return whole, AutoTokenizer.from_pretrained(folder)
    assert isinstance(model.tower, str)
    assert isinstance(model.language, str)
    return pretrained.assemble(model.tower, model.language, gguf_file=model.gguf_file, **model.methods, dtype=dtype)
