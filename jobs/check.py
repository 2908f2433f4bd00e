"""Check a job before it runs: all that would fail or go wrong silently, and what the job will take (`redux check`).

Nothing is trained, no weights are read and Ray is not started. Problems are collected, so that one call lists them all.
"""

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.utils import logging as transformers_logging

from jobs import document, model_parts, ownership, resolve
from jobs.check_text import (
    format_bytes,
    format_evaluation,
    format_inspection,
    format_memory,
    format_overlap,
    format_steps,
)
from jobs.dry_run import load_job, open_stages
from jobs.layout import locate_job_checkpoints
from jobs.schema import Job
from pipelines.core import storage
from pipelines.core.failures import classify_error
from pipelines.core.words import pluralize
from pipelines.data.held_out import select_held_out
from pipelines.data.images import ImageFolder, OutsideError
from pipelines.data.options import SetSource
from pipelines.data.records import has_image
from pipelines.data.shard_index import Shards, is_finished
from pipelines.data.shard_writer import admit_record
from pipelines.data.sources.opened import RecordSource
from pipelines.evaluation import evaluate
from pipelines.evaluation.overlap import EvaluationImages, find_overlap
from pipelines.evaluation.tasks import count_new_tokens
from pipelines.training import inspection as inspections
from pipelines.training import lora, metrics, trackers
from pipelines.training.driver import check_writable
from pipelines.training.inspection import SetInspection
from pipelines.training.memory import (
    MemoryEstimate,
    ModelShape,
    build_shape,
    count_queued_bytes,
    count_tower_tokens,
    plan_memory,
)
from pipelines.training.plan import StageWork
from pipelines.training.step_trace import Device, SampleShape
from redux.conversation import IMAGE_TOKEN
from redux.loading import UnmappedWeightsError

MAX_MEASURED_PROMPTS = 100
"""Longest prompts of a task, by characters, whose tokens are counted."""

MAX_NAMED_IMAGES = 3
"""Missing images that a problem names."""

MAX_READ_RECORDS = 1000
"""First records of a set in another form, which are checked before its samples are drawn."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of `redux check`, see its help.

    Args:
        job: job file.
        overrides: values to replace.
        runs_dir: folder of the run folders.
        samples: samples of each set.
        seed: seed of the draw.
        workers: number of workers; None for that of the job.
        gpu_memory: memory of a GPU in GiB; None for that of this machine.
        tokens_per_s: tokens per second of all workers; None for those of the run.
        price: price of a GPU-hour.
    """

    job: Path
    overrides: Sequence[str]
    runs_dir: Path
    samples: int
    seed: int
    workers: int | None
    gpu_memory: float | None
    tokens_per_s: float | None
    price: float | None


@dataclass
class ProblemList:
    """Problems that were found so far, each a line.

    Args:
        keys: key of the job that cannot be used, by line; "" for a problem that leaves all keys usable.
    """

    keys: dict[str, str] = field(default_factory=dict)

    def add(self, line: str, broken_key: str = "") -> None:
        """Add a problem, once."""
        self.keys.setdefault(" ".join(line.split()), broken_key)

    def breaks(self, key: str) -> bool:
        """Return True if a problem makes a key of the job unusable."""
        return key in self.keys.values()

    @contextmanager
    def collect(self, broken_key: str = "", prefix: str = "") -> Iterator[None]:
        """Add an error within the block, and go on after it.

        Args:
            broken_key: key that cannot be used after an error.
            prefix: beginning of the lines, if they do not have it.
        """
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            problems = getattr(error, "problems", None) or [classify_error(error).text or str(error)]
            for problem in problems:
                self.add(problem if problem.startswith(prefix) else f"{prefix}{problem}", broken_key)


def check_job(options: CheckOptions) -> None:
    """Check a job and print what it will take.

    Raises:
        JobError: there are problems; it has a line for each.
    """
    transformers_logging.disable_progress_bar()
    job = load_job(options.job, options.overrides)
    folder = (options.runs_dir / job.name).resolve()
    problems = ProblemList()
    _check_preparations(job, folder, problems)
    usable = _drop_unusable(job, problems)
    if usable is not None:
        with problems.collect():
            _check_stages(usable, folder, options, problems)
    if problems.keys:
        print(pluralize(len(problems.keys), "problem"))
        raise document.JobError(*problems.keys)
    print("no problems found")


# --- paths, packages, permissions ------------------------------------------------------------------------------------


def _check_preparations(job: Job, folder: Path, problems: ProblemList) -> None:
    """Check everything that needs no sample."""
    for name, url in job.data.sets.items():
        with problems.collect(f"data.sets.{name}", prefix=f"data.sets.{name}: "):
            if name not in job.data.make and not is_finished(url):  # Data in another form
                _check_source(f"data.sets.{name}", SetSource(source=url), problems)
            elif name not in job.data.make:
                _check_set(job, name, storage.make_absolute(url))
    for name, source in job.data.make.items():
        with problems.collect(f"data.make.{name}"):
            _check_source(f"data.make.{name}", source, problems)
    with problems.collect("trackers"):
        trackers.check_trackers(job.trackers)
    for name, stage in job.train.items():
        with problems.collect("train"):
            if stage.lora:
                lora.require_peft(f"train.{name}.lora")
        with problems.collect("train"):
            resolve.check_image_backend(name, stage)
    for name, task in job.evaluation_tasks.items():
        if task.held_out:
            continue  # Its questions are samples of a set, which are checked there
        with problems.collect(f"evaluate.tasks.{name}", prefix=f"evaluate.tasks.{name}"):
            evaluate.check_task(name, resolve.resolve_task(task))
    with problems.collect("model"):
        try:
            model_parts.check_weights(replace(job, model=model_parts.locate_parts(job.model)), folder)
        except UnmappedWeightsError as error:  # A job may be checked on a smaller machine than it runs on
            print(f"note: the names of the weights were not checked: {error}")
    with problems.collect():
        ownership.FolderOwnership.from_folder(folder, job).find_changes()
    with problems.collect():
        _check_folder(folder)
    with problems.collect():
        checkpoints = locate_job_checkpoints(job, folder)
        if job.checkpoints and not storage.is_local(checkpoints):
            check_writable(checkpoints)
        elif job.checkpoints:
            _check_folder(Path(checkpoints))


def _check_set(job: Job, name: str, url: str) -> None:
    samples = len(Shards(url))
    if not samples:
        raise ValueError(f"{url} has no samples, allowed: at least one")
    if job.data.hold_out and any(name in stage.mixture for stage in job.train.values()):
        select_held_out(samples, job.data.hold_out, name)


def _check_folder(folder: Path) -> None:
    """Check that a folder can be made and written; ValueError if not."""
    parent = _find_existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"{folder}: cannot be written, because {parent} {_describe_access(parent)}, allowed: another folder"
        )


def _find_existing_parent(path: Path) -> Path:
    """Find the path itself or the nearest folder above it that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def _describe_access(path: Path) -> str:
    return "gives no permission" if path.is_dir() else "is not a folder"


def _check_source(key: str, source: SetSource, problems: ProblemList) -> None:
    """Check the records of a set that the job makes, and that their images are in the folder."""
    try:
        record_source = RecordSource(source)
        # The first part alone, since a source may have any size.
        source_records = list(itertools.islice(record_source, MAX_READ_RECORDS))
    except ValueError as error:
        raise ValueError(f"{key}.source: {error}" if key.startswith("data.make.") else f"{key}: {error}") from None
    admitted = [admit_record(source_record, source) for source_record in source_records]
    rejections = [rejection for record, rejection, _ in admitted if record is None and rejection]
    if len(rejections) > source.max_bad_fraction * len(source_records):
        first_rejection = rejections[0]
        problems.add(
            f"{key}: {len(rejections)} of {len(source_records)} records of {source.source} are rejected, allowed: a "
            f"share of max_bad_fraction, {source.max_bad_fraction:g}; the first: {first_rejection.reason}: "
            f"{first_rejection.field}: got {first_rejection.value}",
            broken_key=key,
        )
    images = ImageFolder(storage.make_absolute(record_source.images))
    # Images in the source are read with the samples.
    named = [
        str(record["image"])
        for source_record, (record, _, _) in zip(source_records, admitted, strict=True)
        if source_record.image is None and record is not None and has_image(record)
    ]
    missing = [path for path in named if not _has_image(images, path)]
    if missing and len(missing) > source.max_bad_fraction * len(source_records):
        examples = ", ".join(map(repr, missing[:MAX_NAMED_IMAGES]))
        problems.add(
            f"{key}.images: {len(missing)} of {len(named)} images are not in {images.url}: {examples}, "
            f"allowed: the folder from which the paths of the records start"
        )


def _has_image(images: ImageFolder, path: str) -> bool:
    if not images.is_local:
        return True  # Found by the samples, which are fewer
    try:
        images.read(path)
    except (FileNotFoundError, OutsideError):
        return False
    return True


def _drop_unusable(job: Job, problems: ProblemList) -> Job | None:
    """Return the job with the stages whose sets can be read, and the tasks that can; None if no stage is left."""
    broken = {
        name
        for name in job.data.set_names
        if problems.breaks(f"data.sets.{name}") or problems.breaks(f"data.make.{name}")
    }
    train = {name: stage for name, stage in job.train.items() if not broken & stage.mixture.keys()}
    tasks = {name: task for name, task in job.evaluation_tasks.items() if not problems.breaks(f"evaluate.tasks.{name}")}
    # Without these nothing can be encoded or counted.
    if not train or any(map(problems.breaks, ("model", "train", "trackers"))):
        return None
    try:
        sets = {name: url for name, url in job.data.sets.items() if name not in broken}
        make = {name: source for name, source in job.data.make.items() if name not in broken}
        data = replace(job.data, sets=sets, make=make)
        evaluated = replace(job.evaluate, tasks=tasks) if job.evaluate and tasks else None
        return replace(job, data=data, train=train, evaluate=evaluated)
    except ValueError:
        return None


# --- samples, steps, memory ------------------------------------------------------------------------------------------


def _check_stages(job: Job, folder: Path, options: CheckOptions, problems: ProblemList) -> None:
    """Check the samples of each stage, and print what it will take."""
    job = resolve.resolve_job(job, folder)
    with open_stages(job, folder) as stages:
        config = _build_config(job, folder, stages) if job.model.has_pretrained_language else None
        if config is not None:
            _print_template_notes(config, stages)
        device, capacity = _find_device(job, options)
        all_sets: list[SetInspection] = []
        sizes = {}
        for name, work in stages.items():
            features = work.plan.open_features(dict(work.reader.sources))
            shape = build_shape(work.plan, None if work.plan.stage.objective == "contrastive" else config, features)
            sizes[name] = shape
            tower_tokens = count_tower_tokens(shape)
            stage_sets = [
                inspections.inspect_set(work, source, options.samples, options.seed, tower_tokens)
                for source in work.reader.sources
            ]
            all_sets += stage_sets
            for inspected in stage_sets:
                for line in inspections.list_problems(inspected, work.plan):
                    problems.add(line)
            # Samples are checked by their images; memory is that of what training reads.
            training = work._replace(reader=replace(work.reader, features=features))
            _print_stage(training, shape, stage_sets, options, device, capacity, problems)
        for line in inspections.list_image_problems(all_sets):
            problems.add(line)
        _check_evaluation(job, stages, sizes, options, problems)
        _check_disk(job, folder, sizes, problems)


def _build_config(job: Job, folder: Path, stages: dict[str, StageWork]) -> Any:
    """Build the configuration of the pretrained model, with the tokens of its tokenizer."""
    from transformers import AutoTokenizer

    config = model_parts.read_job_config(job, folder)
    # Contrastive stages have another one, and come first.
    tokenizer = AutoTokenizer.from_pretrained(list(stages.values())[-1].plan.tokenizer)
    config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(tokenizer))
    config.has_chat_template = bool(tokenizer.chat_template)
    return config


def _print_template_notes(config: Any, stages: dict[str, StageWork]) -> None:
    """Print a note for each stage whose template differs from that of the model from which training starts."""
    for name, work in stages.items():
        template = work.plan.template
        if work.plan.stage.objective != "language" or template == "plain":
            continue
        if config.conversation_template not in (None, "plain", template):
            print(f"note: {name} trains template {template}, the model was trained with {config.conversation_template}")
        elif config.conversation_template is None and template != "chat" and config.has_chat_template:
            print(f"note: {name} trains template {template}, the language model has a chat template: template: chat")


def _find_device(job: Job, options: CheckOptions) -> tuple[Device, int | None]:
    """Find the device of the workers and its memory in bytes; None if that is unknown."""
    if options.gpu_memory:
        return "cuda", int(options.gpu_memory * 2**30)
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_properties(0).total_memory
    if job.model.has_pretrained_language:
        return "cuda", None
    return "cpu", psutil.virtual_memory().total


def _count_workers(work: StageWork, options: CheckOptions, device: Device) -> int:
    configured = work.plan.workers[1] if work.plan.workers else None
    local = torch.cuda.device_count() if device == "cuda" else (os.cpu_count() or 1)
    return work.plan.stage.count_usable_workers(options.workers or configured or max(local, 1))


def _print_stage(
    work: StageWork,
    shape: ModelShape,
    stage_sets: list[SetInspection],
    options: CheckOptions,
    device: Device,
    capacity: int | None,
    problems: ProblemList,
) -> None:
    """Print the samples, the steps and the memory of a stage."""
    plan = work.plan
    workers = _count_workers(work, options, device)
    # A stage that has run here tells its speed.
    rate = options.tokens_per_s
    if rate is None and metrics.read_last_step(plan.run, plan.name):
        rate = metrics.compute_tokens_per_s(plan.run, plan.name)
    template = f", template {plan.template}" if plan.stage.objective == "language" else ""
    print(f"\n{plan.name}: {plan.stage.objective}{template}, {pluralize(workers, 'worker')}")
    for inspected in stage_sets:
        print(format_inspection(inspected, plan.stage.max_length))
    tokens = work.steps * plan.stage.global_batch_size * _mean_tokens(work, stage_sets)
    print(format_steps(work.steps, plan.stage.global_batch_size, tokens, rate, workers, options.price))
    sample_shapes = [sample_shape for inspected in stage_sets for sample_shape in inspected.shapes]
    if sample_shapes:
        _print_memory(work, shape, sample_shapes, workers, device, capacity, problems)


def _print_memory(
    work: StageWork,
    shape: ModelShape,
    sample_shapes: list[SampleShape],
    workers: int,
    device: Device,
    capacity: int | None,
    problems: ProblemList,
) -> None:
    """Print the memory of a worker, and the largest micro-batch that fits."""
    stage = work.plan.stage
    # Workers on CPUs share the memory of the machine.
    memory_per_worker = capacity // workers if capacity and device == "cpu" else capacity
    estimate, find_largest = plan_memory(shape, sample_shapes, workers, device, _is_fused(work, device))
    largest = None
    if memory_per_worker:
        largest = find_largest(memory_per_worker)
        if not largest or largest < stage.micro_batch_size:
            _add_memory_problem(work, estimate, memory_per_worker, largest, problems)
    print(
        format_memory(
            estimate,
            device,
            memory_per_worker,
            micro_batch_size=stage.micro_batch_size,
            largest=largest,
            samples_per_worker=stage.global_batch_size // workers,
            queued=count_queued_bytes(work, workers),
        )
    )


def _is_fused(work: StageWork, device: Device) -> bool:
    return device == "cuda" and work.plan.kernels != "plain"


def _add_memory_problem(
    work: StageWork, estimate: MemoryEstimate, memory_per_worker: int, largest: int | None, problems: ProblemList
) -> None:
    name = work.plan.name
    if largest:
        advice = f"train.{name}.micro_batch_size={largest}"
    else:
        advice = "more workers, zero_stage 3, activation_checkpointing, lora or offloading"
    problems.add(
        f"train.{name}.micro_batch_size: got {work.plan.stage.micro_batch_size}, which needs "
        f"{format_bytes(estimate.total)} of {format_bytes(memory_per_worker)} on each worker, allowed: {advice}"
    )


def _mean_tokens(work: StageWork, stage_sets: list[SetInspection]) -> float:
    """Return the mean tokens of a sample of the stage, over its mixture."""
    order = work.reader.order
    weights = order.weights or order.samples
    weighted = sum(weight * inspected.mean_tokens for weight, inspected in zip(weights, stage_sets, strict=True))
    return weighted / sum(weights)


def _check_evaluation(
    job: Job,
    stages: dict[str, StageWork],
    shapes: dict[str, ModelShape],
    options: CheckOptions,
    problems: ProblemList,
) -> None:
    """Look for the evaluation questions in the training sets, and print the memory of the evaluation."""
    if job.evaluate is None:
        return
    sets = {name: shards for work in stages.values() for name, shards in work.reader.sources.items()}
    prompts: dict[str, list[str]] = {}
    print()
    for task, settings in job.evaluate.tasks.items():
        if settings.held_out:
            continue  # By its definition not trained on
        with problems.collect():
            questions = EvaluationImages.from_task(task, settings)
            prompts[task] = questions.prompts
            for name, shards in sets.items():
                overlap = find_overlap(shards, task, questions, options.seed)
                print(format_overlap(overlap, name, len(shards)))
                if overlap.pairs:
                    problems.add(
                        f"evaluate.tasks.{task}: {len(overlap.pairs)} of its {overlap.questions} questions are in the "
                        f"training set {name}, with the same image ({overlap.example}), allowed: questions that are "
                        "not trained on"
                    )
                if overlap.copies:
                    problems.add(
                        f"evaluate.tasks.{task}: {len(overlap.copies)} of its questions are among {overlap.drawn} "
                        f"drawn samples of the training set {name}, with the same image in another format or size "
                        f"({overlap.copy_example}), allowed: questions that are not trained on"
                    )
    # The model of the last stage answers; its memory follows from the longest prompts.
    *_, last = stages
    tokenizer = stages[last].reader.get_tokenizer()
    for task, texts in prompts.items():
        longest = sorted(texts, key=len)[-MAX_MEASURED_PROMPTS:]
        tokens = max(len(tokenizer(text)["input_ids"]) for text in longest)
        tokens += count_new_tokens(task, job.evaluate.tasks[task])
        print(format_evaluation(task, shapes[last].measure_cache(tokens), tokens, job.evaluate.batch_size))


def _check_disk(job: Job, folder: Path, shapes: dict[str, ModelShape], problems: ProblemList) -> None:
    """Compare the bytes of checkpoints and models with the free disk space."""
    checkpoints = locate_job_checkpoints(job, folder)
    needed = 0
    for name, stage in job.train.items():
        shape = shapes[name]
        # Weights in fp32 and two moments; the next checkpoint is written before an old one is deleted.
        num_checkpoints = stage.save_total_limit + stage.save_best_limit + 1
        needed += 12 * shape.num_trained * num_checkpoints + shape.num_elements * (
            2 if stage.precision == "bf16" else 4
        )
    where = f"checkpoints and models need about {format_bytes(needed)}"
    if not storage.is_local(checkpoints):
        print(f"\ndisk: {where} in {checkpoints}")
        return
    parent = _find_existing_parent(Path(checkpoints))
    free = shutil.disk_usage(parent).free
    print(f"\ndisk: {where}, {format_bytes(free)} are free in {parent}")
    if needed > free:
        problems.add(
            f"checkpoints: {where}, but {parent} has {format_bytes(free)} free, allowed: a folder or URL with more "
            "space, or a smaller save_total_limit"
        )
