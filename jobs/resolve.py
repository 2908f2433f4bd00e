"""Resolve a job before it runs: absolute paths, and the template and aspect ratio with which a model was trained.

Everything that can be checked is checked here, before days of training.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from jobs.layout import SHARDS_DIR
from jobs.model_parts import find_assembled, locate_parts, make_folder_absolute
from jobs.schema import Job
from pipelines.core import storage
from pipelines.data import shard_index
from pipelines.data.held_out import select_held_out
from pipelines.data.index_file import INDEX_FILE
from pipelines.data.options import Data, SetSource
from pipelines.data.sources.layouts import find_layout
from pipelines.evaluation import evaluate, tasks
from pipelines.training import lora, trackers
from pipelines.training.stage import Stage
from redux import answering
from redux.extras import write_install_command


def resolve_job(job: Job, folder: Path) -> Job:
    """Resolve a job: absolute paths, and templates and aspect ratios as the model was trained.

    Args:
        job: the job as loaded.
        folder: run folder; parts that were assembled there are not searched elsewhere.

    Raises:
        ValueError: a set or a benchmark file cannot be used, a package is missing, or the evaluation contradicts the
            training of the model.
    """
    job = replace(job, data=resolve_data(job.data, folder))
    for name, url in job.data.sets.items():
        if name in job.data.make:
            continue
        samples = len(shard_index.Shards(url))
        if not samples:
            raise ValueError(f"data.sets.{name}: {url} has no samples, allowed: at least one")
        asked = {task.held_out for task in job.evaluation_tasks.values()}
        if job.data.hold_out and name in asked.union(*(stage.mixture for stage in job.train.values())):
            select_held_out(samples, job.data.hold_out, name)  # Raises if a set is too small
    # Packages are looked for now: workers would import them only after the data is made.
    trackers.check_trackers(job.trackers)
    for name, stage in job.train.items():
        if stage.lora:
            lora.require_peft(f"train.{name}.lora")
        check_image_backend(name, stage)
    job = _resolve_formats(job, folder)
    return replace(
        job,
        checkpoints=job.checkpoints and storage.make_absolute(job.checkpoints),
        evaluate=job.evaluate and replace(job.evaluate, tasks=_resolve_tasks(job)),
        model=locate_parts(job.model),
    )


def check_image_backend(name: str, stage: Stage) -> None:
    """Check that the package of a stage's image backend is installed; ValueError if not."""
    if stage.image_backend == "fast" and find_spec("simplejpeg") is None:
        raise ValueError(
            f"train.{name}.image_backend: got fast, allowed: exact, or the package simplejpeg: "
            + write_install_command("fast")
        )


def resolve_data(data: Data, folder: Path) -> Data:
    """Make the paths of sets absolute, and replace each set in another form than shards by one that the job makes.

    Args:
        data: the data section of the job.
        folder: run folder. A set that the job makes, and that has no folder, gets one in it.

    Raises:
        ValueError: there is no such source, or its form is not read.
    """
    sets, make = dict(data.sets), dict(data.make)
    for name, url in data.sets.items():
        if name not in make and not shard_index.is_finished(url):
            try:
                find_layout(url)
            except ValueError as error:
                raise ValueError(f"data.sets.{name}: no shards here, {INDEX_FILE} is missing; {error}") from None
            make[name] = SetSource(source=url)
            del sets[name]
    own_sets = {name: str(folder / SHARDS_DIR / name) for name in make if name not in sets}
    return replace(
        data,
        sets={name: storage.make_absolute(url) for name, url in (sets | own_sets).items()},
        make={name: _resolve_source(name, source) for name, source in make.items()},
        features={name: storage.make_absolute(url) for name, url in data.features.items()},
    )


def _resolve_formats(job: Job, folder: Path) -> Job:
    """Resolve the template and the aspect ratio of each stage and of the evaluation."""
    assembled = find_assembled(job, folder)
    start = str(assembled) if assembled else make_folder_absolute(job.model.checkpoint)
    saved = answering.read_config(start) if start and (job.train or answering.is_llava(start)) else {}
    trained = {"template": saved.get("conversation_template"), "image_aspect_ratio": saved.get("image_aspect_ratio")}
    train = {name: stage.resolve_format(**trained) for name, stage in job.train.items()}
    settings = job.evaluate
    # A model of another library has no saved format, so its settings stay as they are.
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
    """Make the paths of a source absolute; ValueError if its form is not read."""
    path = storage.make_absolute(source.source)
    try:
        find_layout(path)
    except ValueError as error:
        raise ValueError(f"data.make.{name}.source: {error}") from None
    return replace(source, source=path, images=source.images and storage.make_absolute(source.images))


def _resolve_tasks(job: Job) -> dict[tasks.TaskName, tasks.TaskSettings]:
    """Make the paths of all tasks absolute and check their files. Those of held-out samples do not exist yet."""
    result = {name: resolve_task(task) for name, task in job.evaluation_tasks.items()}
    for name, task in result.items():
        if not task.held_out:
            evaluate.check_task(name, task)
    return result


def resolve_task(task: tasks.TaskSettings) -> tasks.TaskSettings:
    """Make the paths of a task absolute."""
    return replace(
        task,
        files=tuple(map(storage.make_absolute, task.files)),
        file=task.file and storage.make_absolute(task.file),
        images=task.images and storage.make_absolute(task.images),
    )
