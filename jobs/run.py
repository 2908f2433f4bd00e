"""Run a job step by step, from images to report. Finished steps are skipped.

runs/NAME/job.yaml        resolved job; jobs/claims.py decides which settings may still change
runs/NAME/progress.jsonl  {"step", "wall_s"} of each finished step; the next start reads it
runs/NAME/shards/SET/     captions, conversations, shown, formats: those of them that a stage uses
runs/NAME/tokenizer/      trained on the training sets, for a model that is built from sizes
runs/NAME/assembled/      for a model from pretrained parts: these and a projector as one model, with its tokenizer
runs/NAME/scores.json     scores of the evaluation; metrics.json repeats them
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
from pipelines.data import easy_vqa, shard_index, shard_writer
from pipelines.data import records as check
from pipelines.data.options import SetSource, ShardOptions
from pipelines.evaluation import evaluate, tasks
from pipelines.report import run_report
from pipelines.training import driver, ledger, lora, trackers
from pipelines.training.plan import StagePlan
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
    allow_changes: bool = False,
    until: str | None = None,
    watch: driver.StopCallback | None = None,
    patience_s: float = 0,
) -> None:
    """Run the unfinished steps of a job in its run folder.

    Args:
        job: the job as loaded.
        folder: run folder.
        allow_changes: continue even if finished steps used other settings, or checkpoints have other data or another
            model.
        until: last step to run; None runs all.
        watch: called during training, see `pipelines.training.driver`.
        patience_s: seconds to wait for another process that works on this run.

    Raises:
        ValueError: the job cannot run here, settings changed that finished steps used, or another process works on
            this run.
    """
    started_at = time.monotonic()
    folder = folder.resolve()
    job = resolve_job(job, folder)
    group = driver.WorkerGroup()
    work = list_steps(job, folder, allow_changes, watch, group)
    if until:
        names = list(work)
        work = {name: work[name] for name in names[: names.index(until) + 1]}
    finished = f"{job.name} is finished; its {until or 'report'}: {folder / ('' if until else 'report.html')}"
    changes = claims.Claim.from_folder(folder, job).find_changes(allow_changes)
    if not changes and not work.keys() - _list_finished(folder):
        print(finished)
        return
    claims.make_folder(folder)
    with run_lock(folder, patience_s):
        # another process may have worked on this run until now, so its progress is read again
        claims.Claim.from_folder(folder, job).enforce(allow_changes)
        done = _list_finished(folder)
        remaining = {name: step for name, step in work.items() if name not in done}
        if not remaining:
            print(finished)
            return
        if done:
            print(f"{job.name} continues with {next(iter(remaining))}; finished: {', '.join(done)}")
        _check_stored_images(job, folder)
        if job.checkpoints and job.train.keys() & remaining.keys():
            driver.check_writable(locate_checkpoints(job, folder))
        jsonl.drop_partial_line(folder / PROGRESS)
        with cluster.open_session(), group:
            _check_resources(job, remaining)
            _start_workers_early(job, folder, allow_changes, list(remaining), group)
            for name, step in remaining.items():
                interrupts.raise_if_interrupted()
                step()
                ended_at = time.monotonic()
                jsonl.append(folder / PROGRESS, [{"step": name, "wall_s": ended_at - started_at}])
                started_at = ended_at
    if until is None:
        _write_metrics(folder)
        print(f"{job.name} is finished; its report: {folder / 'report.html'}")


def _check_resources(job: Job, steps_left: Collection[str]) -> None:
    """Check that a Ray of this machine alone has the CPUs and GPUs of all unfinished steps; they would wait forever.

    This runs before the first step, so that nothing is refused after hours of work.

    Raises:
        ValueError: resources are missing; the text names numbers that fit.
    """
    if not cluster.is_private():
        return
    max_processes = cluster.count_model_processes(job.gpu_share)
    trains = bool(job.train.keys() & set(steps_left))
    fewest = job.worker_range[0] if trains and job.worker_range else 1
    actors = job.evaluate.num_actors if job.evaluate and "evaluate" in steps_left else 1
    advice = []
    if fewest > max_processes:
        advice.append(f"num_workers={count_shared_workers(job.train.values(), max_processes)}")
    if isinstance(actors, int) and actors > max_processes:
        advice.append(f"evaluate.num_actors={max_processes}")
    if not advice:
        return
    resource, per_process = ("GPU", job.gpu_share) if cluster.count_gpus() else ("CPU", 1)
    needed = max(fewest, actors if isinstance(actors, int) else 1) * per_process
    available = ray.cluster_resources().get(resource, 0)
    raise ValueError(f"{job.name}: needs {needed:g} {resource}s, found {available:g}; set {' '.join(advice)}, or auto")


def _start_workers_early(
    job: Job, folder: Path, allow_changes: bool, remaining: Sequence[str], group: driver.WorkerGroup
) -> None:
    """Start the workers of the first stage, if steps before it are left: they import their libraries meanwhile.

    Not in a cluster, where others may use the workers' resources until then.
    """
    plans = plan_stages(job, folder, allow_changes)
    first_stage = next((name for name in remaining if name in plans), None)
    if first_stage not in (None, remaining[0]) and cluster.is_private():
        group.start_early(plans[first_stage])


@contextmanager
def run_lock(folder: Path, patience_s: float = 0) -> Iterator[None]:
    """Lock a run folder against other processes.

    Args:
        folder: run folder.
        patience_s: seconds to wait for a process that holds the lock.

    Raises:
        ValueError: another process still holds the lock.
    """
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
            raise ValueError(f"{folder}: another process works on this run, allowed: one at a time") from None
        yield


def list_steps(
    job: Job,
    folder: Path,
    allow_changes: bool = False,
    watch: driver.StopCallback | None = None,
    group: driver.WorkerGroup | None = None,
) -> dict[str, Callable[[], None]]:
    """List the steps of a job by name, in order: shards, assemble, each training stage, evaluate, report.

    Args:
        job: the job, resolved.
        folder: run folder.
        allow_changes, watch: as for `run`.
        group: workers that train all stages. None starts new ones for each.

    Raises:
        ValueError: pretrained parts of the model cannot be read or do not fit together.
    """
    sets, result = locate_sets(job, folder), {}
    stages = plan_stages(job, folder, allow_changes)
    if job.generated_sets or job.data.make or not job.model.is_pretrained:
        templates = [TEMPLATES[plan.template] for plan in stages.values()]
        result["shards"] = lambda: _make_shards(job, sets, folder / TOKENIZER, templates)
    _check_weights(job, folder)
    if job.model.is_pretrained and job.train:
        result["assemble"] = lambda: _assemble(job, folder / ASSEMBLED)
    last = list(stages)[-1] if stages else ""
    plans = list(stages.values())
    for number, plan in enumerate(plans, start=1):
        result[plan.name] = functools.partial(
            driver.train_stage, plan, should_stop=watch, group=group, later=plans[number:] if group else ()
        )
    settings = job.evaluate
    if settings is None:
        result["report"] = lambda: _write_report(folder, [])
        return result
    evaluated = _choose_evaluated_model(job, settings, stages)

    def run_evaluation() -> None:
        started_at = time.monotonic()
        _write_json(folder / SCORES, evaluate.evaluate(evaluated, folder, settings, job.gpu_share))
        ledger.append_event(folder, "evaluate", last, wall_s=time.monotonic() - started_at)

    def report_examples() -> None:
        _write_report(folder, evaluate.collect_examples(evaluated, folder, job.report.examples))

    return {**result, "evaluate": run_evaluation, "report": report_examples}


def _check_weights(job: Job, folder: Path) -> None:
    """Check that the checkpoint or the parts have all weights and a tokenizer, without reading the weights.

    Raises:
        ValueError: something is missing.
    """
    model = job.model
    if not model.is_pretrained or _find_assembled(job, folder):
        return
    try:
        if not model.checkpoint:
            pretrained.check_parts(str(model.tower), str(model.language), model.gguf_file)
        elif job.train or answering.is_llava(model.checkpoint):
            build_config(model)
            pretrained.check_checkpoint(model.checkpoint)
        else:
            pretrained.check_checkpoint(model.checkpoint, AutoModelForImageTextToText)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def _check_stored_images(job: Job, folder: Path) -> None:
    """Check that images stored as squares have the size and aspect ratio that the stages read.

    Sets that the job still has to make are checked as well.

    Raises:
        ValueError: a stage reads other images.
    """
    prepared = {
        name: shard_index.Shards(url).prepared_format
        for name, url in job.data.sets.items()
        if name not in job.data.make
    } | {
        name: (source.image_size, source.image_aspect_ratio)
        for name, source in job.data.make.items()
        if source.image_size
    }
    if any(prepared.values()):
        for plan in plan_stages(job, folder).values():
            for name in plan.stage.mixture:
                plan.check_prepared(name, prepared.get(name))


def _choose_evaluated_model(
    job: Job, settings: tasks.Evaluate, stages: dict[str, StagePlan]
) -> evaluate.EvaluatedModel:
    """Choose the model to evaluate: the result of the last stage, or model.checkpoint if there is no stage."""
    options = {name: getattr(settings, name) for name in ("template", "image_aspect_ratio", "allow_mismatch")}
    options["kernels"] = job.model.kernels
    if stages:
        return evaluate.EvaluatedModel(model=list(stages.values())[-1].result, **options)
    assert job.model.checkpoint
    return evaluate.EvaluatedModel(model=job.model.checkpoint, methods=job.model.methods, **options)


def plan_stages(job: Job, folder: Path, allow_changes: bool = False) -> dict[str, StagePlan]:
    """Plan the stages of a job, by name and in order. Each stage starts from the model of the one before.

    Raises:
        ValueError: pretrained parts of the model cannot be read or do not fit together.
    """
    sets, result = locate_sets(job, folder), dict[str, StagePlan]()
    if not job.train:
        return result
    image_size, image_tokens = _measure_image(job, folder)
    tokenizer = folder / (ASSEMBLED if job.model.is_pretrained else TOKENIZER)
    start = str(tokenizer) if job.model.is_pretrained else None
    for name, stage in job.train.items():
        result[name] = StagePlan(
            name=name,
            stage=stage,
            model=None if job.model.is_pretrained else job.model,
            seed=job.seed,
            workers=job.worker_range,
            gpu_share=job.gpu_share,
            kernels=job.model.kernels,
            run=folder,
            checkpoints=locate_checkpoints(job, folder),
            sets={name: sets[name] for name in stage.mixture},
            max_bad_fraction=job.data.max_bad_fraction,
            tokenizer=tokenizer,
            start=start,
            image_size=image_size,
            image_tokens=image_tokens,
            recovery=job.recovery,
            job=schema.dump(job),
            job_name=job.name,
            trackers=tuple(job.trackers),
            allow_changes=allow_changes,
        )
        start = result[name].result
    return result


def resolve_job(job: Job, folder: Path) -> Job:
    """Resolve a job: absolute paths, and templates and aspect ratios as the model was trained.

    Everything that can be checked is checked here, before days of training.

    Args:
        job: the job as loaded.
        folder: run folder; parts that were assembled there are not searched elsewhere.

    Raises:
        ValueError: a set or a benchmark file cannot be used, a package is missing, or the evaluation contradicts the
            training of the model.
    """
    sets = {name: storage.make_absolute(url) for name, url in job.data.sets.items()}
    for name, url in sets.items():
        if name not in job.data.make and not len(shard_index.Shards(url)):
            raise ValueError(f"data.sets.{name}: {url} has no samples, allowed: at least one")
    trackers.check_trackers(job.trackers)
    for name, stage in job.train.items():
        if stage.lora:
            lora.require_peft(f"train.{name}.lora")
        if stage.image_backend == "fast" and find_spec("simplejpeg") is None:
            raise ValueError(
                f"train.{name}.image_backend: got fast, allowed: exact, or the package simplejpeg: "
                + write_install_command("fast")
            )
    job = _resolve_formats(job, folder)
    return replace(
        job,
        checkpoints=job.checkpoints and storage.make_absolute(job.checkpoints),
        data=replace(
            job.data, sets=sets, make={name: _resolve_source(name, source) for name, source in job.data.make.items()}
        ),
        evaluate=job.evaluate and replace(job.evaluate, tasks=_resolve_tasks(job.evaluate)),
        model=_locate_parts(job.model),
    )


def _resolve_formats(job: Job, folder: Path) -> Job:
    """Resolve the template and the aspect ratio of each stage and of the evaluation."""
    assembled = _find_assembled(job, folder)
    start = str(assembled) if assembled else _absolute_folder(job.model.checkpoint)
    saved = answering.read_config(start) if start and (job.train or answering.is_llava(start)) else {}
    trained = {"template": saved.get("conversation_template"), "image_aspect_ratio": saved.get("image_aspect_ratio")}
    train = {name: stage.resolve_format(**trained) for name, stage in job.train.items()}
    settings = job.evaluate
    if settings and (saved or train):
        last = list(train.values())[-1] if train else None
        if last:
            saved = {"conversation_template": last.template, "image_aspect_ratio": last.image_aspect_ratio}
        try:
            template, image_aspect_ratio = answering.resolve_format(
                saved, settings.template, settings.image_aspect_ratio, settings.allow_mismatch
            )
        except ValueError as error:
            raise ValueError(f"evaluate.{error}") from None
        settings = replace(settings, template=template, image_aspect_ratio=image_aspect_ratio)
    return replace(job, train=train, evaluate=settings)


def _resolve_source(name: str, source: SetSource) -> SetSource:
    """Make the paths of a source absolute; ValueError if its records do not exist."""
    url = storage.make_absolute(source.json)
    if not storage.exists(url):
        raise ValueError(f"data.make.{name}.json: {url} does not exist, allowed: a JSON file of records")
    return replace(source, json=url, images=storage.make_absolute(source.images))


def _resolve_tasks(settings: tasks.Evaluate) -> dict[tasks.TaskName, tasks.TaskSettings]:
    """Make the paths of all tasks absolute and check their files."""
    result = dict(settings.tasks)
    for name, task in settings.tasks.items():
        result[name] = replace(
            task,
            files=tuple(map(storage.make_absolute, task.files)),
            images=task.images and storage.make_absolute(task.images),
        )
        evaluate.check_task(name, result[name])
    return result


def _absolute_folder(part: T) -> T | str:
    """Make a folder's path absolute; anything else, such as a hub id, stays as it is."""
    return storage.make_absolute(part) if isinstance(part, str) and Path(part).is_dir() else part


def _find_assembled(job: Job, folder: Path) -> Path | None:
    """Find the assembled model of this job's parts in the run folder; None if there is none."""
    return claims.find_assembled(folder, replace(job, model=_locate_parts(job.model)))


def _locate_parts(model: ModelSettings) -> ModelSettings:
    """Make the folders of a model's parts absolute."""
    return replace(
        model,
        tower=_absolute_folder(model.tower),
        language=_absolute_folder(model.language),
        checkpoint=_absolute_folder(model.checkpoint),
    )


def _measure_image(job: Job, folder: Path) -> tuple[int, int]:
    """Return the side of an image in pixels, and the number of its tokens that reach the language model."""
    model = job.model
    if isinstance(model.tower, TowerSizes):
        return model.tower.image_size, count_image_tokens(model)
    try:
        # once the model is assembled, its parts are no longer needed
        assembled = _find_assembled(job, folder)
        config = ReduxConfig.from_pretrained(assembled) if assembled else build_config(model)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None
    return config.vision_config.image_size, config.image_seq_length


def build_config(model: ModelSettings) -> ReduxConfig:
    """Build the configuration of a pretrained model or of pretrained parts; ValueError if they do not fit together."""
    if model.checkpoint:
        return pretrained.configure_checkpoint(model.checkpoint, **model.methods)
    assert isinstance(model.tower, str)
    assert isinstance(model.language, str)
    return pretrained.configure_assembly(model.tower, model.language, gguf_file=model.gguf_file, **model.methods)


def _list_finished(folder: Path) -> list[str]:
    return [entry["step"] for entry in jsonl.read(folder / PROGRESS)]


def _write_metrics(folder: Path) -> None:
    """Write metrics.json: scores, and wall-clock seconds of each finished step and of all."""
    times = {f"wall_s.{entry['step']}": entry["wall_s"] for entry in jsonl.read(folder / PROGRESS)}
    scores = json.loads((folder / SCORES).read_text()) if (folder / SCORES).exists() else {}
    _write_json(folder / "metrics.json", {**scores, "wall_s": sum(times.values()), **times})


def _write_report(folder: Path, examples: Sequence[evaluate.Example]) -> None:
    _write_metrics(folder)
    run_report.write_report(folder, examples)


def _write_json(path: Path, values: dict[str, float]) -> None:
    storage.write(str(path), (json.dumps(values, indent=2) + "\n").encode())


def _make_shards(job: Job, sets: dict[str, str], tokenizer: Path, templates: Sequence[Template]) -> None:
    """Make the sets of the job and, for a model that is built from sizes, a tokenizer."""
    for name, source in job.data.make.items():
        options = ShardOptions(**{field.name: getattr(source, field.name) for field in fields(ShardOptions)})
        shard_writer.make_shards(
            check.parse_records(storage.read(source.json), source.json), source.images, sets[name], options
        )
    records = {name: easy_vqa.EASY_VQA_SETS[name]() for name in job.generated_sets}
    options = ShardOptions(samples_per_shard=job.data.samples_per_shard)
    for name, set_records in records.items():
        shard_writer.make_shards(set_records, str(easy_vqa.PACKAGE_IMAGES), sets[name], options)
    if not isinstance(job.model.language, LanguageSizes):
        return
    mixed = {name for stage in job.train.values() for name in stage.mixture}
    other_records = (
        record
        for name in sorted(mixed - records.keys())
        for record in shard_index.Shards(sets[name]).iterate_records()
        if check.find_rejection(record, None) is None
    )
    texts = (
        "".join(piece for piece, _ in template.split_spans(record["conversations"]))
        for record in itertools.chain(*records.values(), other_records)
        for template in templates
    )
    with failures.locate_errors(tokenizer):
        train_word_tokenizer(texts, job.model.language.max_position_embeddings).save_pretrained(tokenizer)


def _assemble(job: Job, folder: Path) -> None:
    """Assemble the initial model and its tokenizer in a folder that exists only when complete."""
    if folder.exists():
        return
    is_half = all(stage.precision == "bf16" for stage in job.train.values())
    torch.manual_seed(job.seed)
    model, tokenizer = _load_or_assemble(job.model, torch.bfloat16 if is_half else torch.float32)
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with failures.locate_errors(folder):
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, folder)
    except BaseException:  # such as a full disk or a signal
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _load_or_assemble(
    model: ModelSettings, dtype: torch.dtype
) -> tuple[ReduxForConditionalGeneration, PreTrainedTokenizerBase]:
    if model.checkpoint:
        with local_copy(model.checkpoint, label="checkpoint") as folder:
            llava = ReduxForConditionalGeneration.from_pretrained(folder, dtype=dtype, **model.methods)
            return llava, AutoTokenizer.from_pretrained(folder)
    assert isinstance(model.tower, str)
    assert isinstance(model.language, str)
    return pretrained.assemble(model.tower, model.language, gguf_file=model.gguf_file, **model.methods, dtype=dtype)
