"""Run a job phase by phase, from images to report. Finished phases are skipped.

runs/NAME/job.yaml        resolved job; jobs/ownership.py decides which settings may still change
runs/NAME/progress.jsonl  {"step", "wall_s"} of each finished phase, which the next start reads; {"interrupted",
                           "wall_s"} of one that did not finish
runs/NAME/shards/SET/     sets of easy-VQA, those of them that a stage uses
runs/NAME/held_out/TASK/  questions of held-out samples, for tasks with `held_out`
runs/NAME/tokenizer/      trained on the training sets, for a model that is built from sizes; for a tower that is built
                          from sizes beside a pretrained language model, on the captions of its stages
runs/NAME/assembled/      for a model from pretrained parts: these and a projector as one model, with its tokenizer
runs/NAME/scores.json     scores of the evaluation; metrics.json repeats them
"""

import fcntl
import functools
import itertools
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tenacity
from transformers import PreTrainedTokenizerFast

from jobs import model_parts, ownership, report, schema
from jobs.asking import describe_asking
from jobs.layout import locate_job_checkpoints, locate_sets, locate_tasks
from jobs.resolve import resolve_job
from jobs.resources import find_shortage
from jobs.schema import Job
from pipelines.core import cluster, failures, interrupts, jsonl, storage
from pipelines.data import easy_vqa, quarantine, records, shard_index, shard_writer
from pipelines.data.options import ShardOptions
from pipelines.data.sources.opened import RecordSource
from pipelines.evaluation import evaluate, tasks
from pipelines.evaluation.held_out_questions import write_held_out_questions
from pipelines.report.environment import record_environment
from pipelines.report.run_report import REPORT_FILE
from pipelines.report.scores import describe_scores
from pipelines.training import driver, ledger
from pipelines.training.files import ASSEMBLED_FOLDER, PROGRESS_FILE, RESULT_FILE, SCORES_FILE
from pipelines.training.plan import StagePlan
from pipelines.training.stage import DEFAULT_TEMPLATE, count_shared_workers
from redux.architecture import LanguageSizes
from redux.conversation import CLIP_MAX_LENGTH, TEMPLATES, train_word_tokenizer

TOKENIZER = "tokenizer"
LOCK = ".lock"


def run(
    job: Job,
    folder: Path,
    allow_changes: bool = False,
    until: str | None = None,
    should_stop: driver.StopCallback | None = None,
    lock_timeout_s: float = 0,
) -> None:
    """Run the unfinished phases of a job in its run folder.

    Args:
        job: the job as loaded.
        folder: run folder.
        allow_changes: continue even if finished phases used other settings, or checkpoints have other data or another
            model.
        until: last phase to run; None runs all.
        should_stop: called during training, see `pipelines.training.driver`.
        lock_timeout_s: seconds to wait for another process that works on this run.

    Raises:
        ValueError: the job cannot run here, settings changed that finished phases used, or another process works on
            this run.
    """
    started_at = time.monotonic()
    folder = folder.resolve()
    job = resolve_job(job, folder)
    group = driver.WorkerGroup()
    phases = list_phases(job, folder, allow_changes, should_stop, group)
    if until:
        names = list(phases)
        phases = {name: phases[name] for name in names[: names.index(until) + 1]}
    # Read first without the lock and without Ray: to repeat the command of a finished run costs seconds.
    changes = ownership.FolderOwnership.from_folder(folder, job).find_changes(allow_changes)
    if not changes and not phases.keys() - _list_finished(job, folder):
        print(_describe_result(job, folder, until))
        return
    ownership.make_folder(folder)
    with run_lock(folder, lock_timeout_s):
        # Another process may have worked on this run until now, so its progress is read again.
        ownership.FolderOwnership.from_folder(folder, job).enforce(allow_changes)
        finished_phases = _list_finished(job, folder)
        remaining = {name: phase for name, phase in phases.items() if name not in finished_phases}
        if not remaining:
            print(_describe_result(job, folder, until))
            return
        if finished_phases:
            print(f"{job.name} continues with {next(iter(remaining))}; finished: {', '.join(finished_phases)}")
        # All that can fail for a mistake of the user fails before Ray starts.
        _check_stored_images(job, folder)
        _check_features(job, folder)
        if job.checkpoints and job.train.keys() & remaining.keys():
            driver.check_writable(locate_job_checkpoints(job, folder))
        jsonl.drop_partial_line(folder / PROGRESS_FILE)
        with cluster.open_session(), group:
            _check_resources(job, remaining)
            record_environment(folder, list(remaining))
            _start_workers_early(job, folder, allow_changes, list(remaining), group)
            _run_phases(remaining, folder / PROGRESS_FILE, started_at)
    if until is None:
        _write_metrics(folder)
        print(_describe_result(job, folder, until))


def _describe_result(job: Job, folder: Path, until: str | None) -> str:
    """Describe a finished run: its scores, its report and how to ask its model, or the phase with which it ends."""
    if until:
        return f"{job.name} has finished {until}: {folder}"
    lines = [
        f"{job.name} is finished; its report: {folder / REPORT_FILE}",
        *(f"    {line}" for line in describe_scores(folder)),
        describe_asking(job, folder),
    ]
    return "\n".join(lines)


def _run_phases(phases: Mapping[str, Callable[[], None]], progress: Path, started_at: float) -> None:
    """Run phases in order, and append each with its wall-clock seconds to the progress.

    Args:
        phases: functions by name of the phase.
        progress: file of finished phases.
        started_at: monotonic time from which the first phase counts, because preparations belong to it.
    """
    for name, phase in phases.items():
        # A library may have swallowed the exception of a signal that came during the phase before.
        interrupts.raise_if_interrupted()
        key = "interrupted"
        try:
            phase()
            key = "step"
        finally:
            ended_at = time.monotonic()
            with suppress(OSError):  # A full disk has ended the phase, and its error says more
                jsonl.append(progress, [{key: name, "wall_s": ended_at - started_at}])
        started_at = ended_at


def _check_resources(job: Job, remaining_phases: Collection[str]) -> None:
    """Check that a Ray of this machine alone has the CPUs and GPUs of all unfinished phases; they would wait forever.

    This runs before the first phase, so that nothing is refused after hours of work.

    Raises:
        ValueError: resources are missing; the text names numbers that fit.
    """
    # Counts that the job leaves open are chosen later, so that they fit.
    workers = actors = 0
    if job.train.keys() & set(remaining_phases):
        workers, _ = job.worker_range or (1, 1)
    if job.evaluate and "evaluate" in remaining_phases:
        actors = 1 if job.evaluate.num_actors == "auto" else job.evaluate.num_actors
    shortage = find_shortage(job, workers, actors)
    if shortage is None:
        return
    max_processes = cluster.count_model_processes(job.gpu_share)
    advice = []
    if workers > max_processes:
        advice.append(f"num_workers={count_shared_workers(job.train.values(), max_processes)}")
    if actors > max_processes:
        advice.append(f"evaluate.num_actors={max_processes}")
    hint = f"; set {' '.join(advice)}, or auto" if advice else ""
    raise ValueError(f"{job.name}: needs {shortage.needed:g} {shortage.resource}s, found {shortage.available:g}{hint}")


def _start_workers_early(
    job: Job, folder: Path, allow_changes: bool, remaining: Sequence[str], group: driver.WorkerGroup
) -> None:
    """Start the workers of the first stage, if phases before it are left: they import their libraries meanwhile.

    Not in a cluster, where others may use the workers' resources until then.
    """
    plans = plan_stages(job, folder, allow_changes)
    first_stage = next((name for name in remaining if name in plans), None)
    if first_stage not in (None, remaining[0]) and cluster.is_private():
        group.start_early(plans[first_stage])


@contextmanager
def run_lock(folder: Path, lock_timeout_s: float = 0) -> Iterator[None]:
    """Lock a run folder against other processes.

    Args:
        folder: run folder.
        lock_timeout_s: seconds to wait for a process that holds the lock.

    Raises:
        ValueError: another process still holds the lock.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(BlockingIOError),
        stop=tenacity.stop_after_delay(lock_timeout_s),
        wait=tenacity.wait_fixed(0.5),
        reraise=True,
    )
    with (folder / LOCK).open("w") as file:
        # The kernel releases the lock of a process that was killed, so no stale lock can remain.
        try:
            retrying(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process works on this run, allowed: one at a time") from None
        yield


def list_phases(
    job: Job,
    folder: Path,
    allow_changes: bool = False,
    should_stop: driver.StopCallback | None = None,
    group: driver.WorkerGroup | None = None,
) -> dict[str, Callable[[], None]]:
    """List the phases of a job by name, in their order.

    They are shards, questions, the stages that train a tower alone, assemble, the other stages, evaluate and report.

    Args:
        job: the job, resolved.
        folder: run folder.
        allow_changes, should_stop: as for `run`.
        group: workers that train all stages. None starts new ones for each.

    Raises:
        ValueError: pretrained parts of the model cannot be read or do not fit together.
    """
    sets, result = locate_sets(job, folder), {}
    stages = plan_stages(job, folder, allow_changes)
    if job.generated_sets or job.data.make or not job.model.is_pretrained:
        result["shards"] = lambda: _make_shards(job, sets, folder / TOKENIZER)
    if any(task.held_out for task in job.evaluation_tasks.values()):
        # Before training, so that samples which are not questions are noticed early.
        result["questions"] = lambda: _write_questions(job, sets, folder)
    model_parts.check_weights(job, folder)
    model_parts.check_stage_packing(job, folder)
    last = list(stages)[-1] if stages else ""  # The ledger names the stage before an evaluation
    # Parts are joined before the first language stage; before it, contrastive stages may train the tower.
    trains_parts = job.model.has_pretrained_language
    towers = [plan for plan in stages.values() if trains_parts and plan.stage.objective == "contrastive"]
    plans = [plan for plan in stages.values() if plan not in towers]
    result |= _list_stages(towers, should_stop, group)
    if trains_parts and job.train:
        trained = towers[-1].result if towers else None
        result["assemble"] = lambda: model_parts.assemble_parts(job, folder / ASSEMBLED_FOLDER, trained)
    result |= _list_stages(plans, should_stop, group)
    settings = job.evaluate

    def run_evaluation(settings: tasks.Evaluate) -> None:
        settings = replace(settings, tasks=locate_tasks(job, folder))
        started_at = time.monotonic()
        evaluated = report.choose_evaluated_model(job, folder)
        _write_json(folder / SCORES_FILE, evaluate.evaluate(evaluated, folder, settings, job.gpu_share))
        ledger.append_event(folder, "evaluate", last, wall_s=time.monotonic() - started_at)

    if settings is not None:
        result["evaluate"] = functools.partial(run_evaluation, settings)
    result["report"] = lambda: _write_report(job, folder)
    return result


def _list_stages(
    plans: Sequence[StagePlan], should_stop: driver.StopCallback | None, group: driver.WorkerGroup | None
) -> dict[str, Callable[[], None]]:
    """List the phases of stages that the same workers can train one after the other."""
    # Workers stay for the later stages, which then start without loading torch again.
    return {
        plan.name: functools.partial(
            driver.train_stage, plan, should_stop=should_stop, group=group, later=plans[number:] if group else ()
        )
        for number, plan in enumerate(plans, start=1)
    }


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
    # Plans read the configuration of a pretrained model, so they are built only if a set needs them.
    if any(prepared.values()):
        for plan in plan_stages(job, folder).values():
            for name in plan.stage.mixture:
                plan.check_prepared(name, prepared.get(name))


def _check_features(job: Job, folder: Path) -> None:
    """Check the stored features that stages read in place of images; ValueError if they do not fit."""
    if job.data.features:
        for plan in plan_stages(job, folder).values():
            plan.open_features(plan.open_sources() if plan.features else {})


def plan_stages(job: Job, folder: Path, allow_changes: bool = False) -> dict[str, StagePlan]:
    """Plan the stages of a job, by name and in order. Each stage starts from the model of the one before.

    Raises:
        ValueError: pretrained parts of the model cannot be read or do not fit together.
    """
    sets, result = locate_sets(job, folder), dict[str, StagePlan]()
    if not job.train:
        return result
    image_size, image_tokens = model_parts.measure_image(job, folder)
    assembled = folder / ASSEMBLED_FOLDER
    start: str | None = None
    is_joined = False
    for name, stage in job.train.items():
        # A tower from sizes is trained alone, with captions, until it is joined with a pretrained language model.
        if job.model.has_pretrained_language and stage.objective == "language" and not is_joined:
            start, is_joined = str(assembled), True
        result[name] = StagePlan(
            name=name,
            stage=stage,
            model=None if is_joined else job.model,
            seed=job.seed,
            workers=job.worker_range,
            gpu_share=job.gpu_share,
            kernels=job.model.kernels,
            run=folder,
            checkpoints=locate_job_checkpoints(job, folder),
            sets={name: sets[name] for name in stage.mixture},
            max_bad_fraction=job.data.max_bad_fraction,
            hold_out=job.data.hold_out,
            features={name: url for name, url in job.data.features.items() if name in stage.mixture},
            tokenizer=assembled if is_joined else folder / TOKENIZER,
            start=start,
            image_size=image_size,
            image_tokens=image_tokens,
            recovery=job.recovery,
            job=schema.dump(job),
            job_name=job.name,
            trackers=tuple(job.trackers),
            allow_changes=allow_changes,
        )
        # A path that does not exist yet: the stage before writes it.
        start = result[name].result
    return result


def _list_finished(job: Job, folder: Path) -> list[str]:
    """List the finished phases; without evaluation and report, if a file of own questions has changed since then."""
    finished = [entry["step"] for entry in jsonl.read(folder / PROGRESS_FILE) if "step" in entry]
    if "evaluate" in finished and job.evaluate and evaluate.has_new_questions(folder, job.evaluate):
        return [phase for phase in finished if phase not in ("evaluate", "report")]
    return finished


def _write_metrics(folder: Path) -> None:
    """Write metrics.json: scores, and wall-clock seconds of each phase and of all, of all launches together."""
    times: dict[str, float] = {}
    for entry in jsonl.read(folder / PROGRESS_FILE):
        name = f"wall_s.{entry.get('step') or entry['interrupted']}"
        times[name] = times.get(name, 0.0) + entry["wall_s"]
    _write_json(folder / RESULT_FILE, {**_read_scores(folder), "wall_s": sum(times.values()), **times})


def _write_report(job: Job, folder: Path) -> None:
    _write_metrics(folder)
    written = report.write_report(job, folder)
    if job.evaluate and (folder / SCORES_FILE).exists():
        report.send_to_trackers(job, folder, _read_scores(folder), written)


def _read_scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / SCORES_FILE).read_text()) if (folder / SCORES_FILE).exists() else {}


def _write_json(path: Path, values: dict[str, float]) -> None:
    storage.write(str(path), (json.dumps(values, indent=2) + "\n").encode())


def _write_questions(job: Job, sets: Mapping[str, str], folder: Path) -> None:
    """Write the questions of all tasks of held-out samples, and check them like other files of questions."""
    located = locate_tasks(job, folder)
    for name, task in job.evaluation_tasks.items():
        if task.held_out:
            file = Path(str(located[name].file))
            with failures.locate_errors(file):
                write_held_out_questions(sets[task.held_out], job.data.hold_out, task.held_out, file)
            evaluate.check_task(name, located[name])


def _make_shards(job: Job, sets: dict[str, str], tokenizer: Path) -> None:
    """Make the sets of the job and, for a model or a tower that is built from sizes, a tokenizer."""
    for name, source in job.data.make.items():
        options = ShardOptions(**{field.name: getattr(source, field.name) for field in fields(ShardOptions)})
        record_source = RecordSource(source)
        try:
            shard_writer.make_shards(record_source, record_source.images, sets[name], options)
        except quarantine.QuarantineError as error:
            print("\n".join(error.rejections.explain()))
            raise
    generated = {name: easy_vqa.EASY_VQA_SETS[name]() for name in job.generated_sets}
    options = ShardOptions(samples_per_shard=job.data.samples_per_shard)
    for name, set_records in generated.items():
        shard_writer.make_shards(set_records, str(easy_vqa.PACKAGE_IMAGES), sets[name], options)
    if job.model.is_pretrained:
        return  # Pretrained parts bring their tokenizer
    # Its words are those of all sets, also of sets that earlier commands made.
    word_sets = list_word_sets(job)
    stored_records = [shard_index.Shards(sets[name]).iterate_records() for name in sorted(word_sets - generated.keys())]
    generated_records = [set_records for name, set_records in generated.items() if name in word_sets]
    with failures.locate_errors(tokenizer):
        train_tokenizer(job, [*generated_records, *stored_records]).save_pretrained(tokenizer)


def list_word_sets(job: Job) -> set[str]:
    """List the sets whose words the tokenizer of the job knows: without a language model of sizes, those of captions.

    A pretrained language model brings its tokenizer; the tower beside it is compared with captions alone.
    """
    stages = job.train.values()
    read = [stage for stage in stages if not job.model.has_pretrained_language or stage.objective == "contrastive"]
    return {name for stage in read for name in stage.mixture}


def train_tokenizer(job: Job, sets: Iterable[Iterable[Any]]) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a job whose language model, or whose tower alone, is built from sizes.

    Args:
        job: the job, resolved.
        sets: records of each set; rejected ones are left out.
    """
    if isinstance(job.model.language, LanguageSizes):
        max_length = job.model.language.max_position_embeddings
        templates = [TEMPLATES[stage.template or DEFAULT_TEMPLATE] for stage in job.train.values()]
    else:
        max_length, templates = CLIP_MAX_LENGTH, [TEMPLATES["plain"]]
    texts = (
        "".join(piece for piece, _ in template.split_spans(record["conversations"]))
        for record in itertools.chain(*sets)
        if records.find_rejection(record, None) is None
        for template in templates
    )
    return train_word_tokenizer(texts, max_length)
