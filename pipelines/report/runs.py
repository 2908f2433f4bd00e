"""Finished runs, grouped into models that can be compared. The groups follow from the settings, never from the name.

Runs that differ only in the seed are one model. Models that differ only in the method (VMTC, CMAI, another reduction,
or a caption in place of the image) are one family. Only within a family is a difference between scores an effect of the
method. A run that evaluates a checkpoint of another run belongs to the family and the seed of that run.

Cost: every line of a run's answers is read and scored once; only the outcomes stay in memory.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipelines.core import jsonl, storage
from pipelines.core.settings import KEYS_WITHOUT_EFFECT, flatten_dict, is_in_sections
from pipelines.evaluation.answer_files import ANSWERS_FOLDER, PROVENANCE_FILE
from pipelines.report.instruction_scores import add_split_metrics
from pipelines.training.files import (
    ASSEMBLED_FOLDER,
    CONFIG_FILE,
    JOB_FILE,
    METRICS_FILE,
    RESULT_FILE,
    SCORES_FILE,
    STUDY_FILE,
    is_complete,
    is_finished_run,
    list_stage_models,
)
from redux.benchmarks import Metric, Row
from redux.configuration import ReduxConfig
from redux.presets import Preset
from redux.settings import METHODS

UNCOMPARED_KEYS = (*KEYS_WITHOUT_EFFECT, "name", "seed", "checkpoints", "report", "evaluate.attention")
"""Keys of a job in which runs of one variant may differ: the seed, and keys without effect on the result."""

TASKS_KEY = "evaluate.tasks"

METHOD_KEYS = tuple(f"model.{name}" for name in METHODS)

SAME_FAMILY_KEYS = (
    *UNCOMPARED_KEYS, *METHOD_KEYS, "evaluate.image_input", "evaluate.template", "evaluate.image_aspect_ratio",
    "evaluate.allow_mismatch",
)  # fmt: skip
"""Keys of a job in which runs of one family may differ: those of a variant, the method, and its input."""

CLIP_PATCHES = 576
"""Patches of an image in CLIP ViT-L/14 at 336 pixels, the default for a run with an unknown tower."""

CLIP_BLOCKS = 23
"""Blocks of CLIP ViT-L/14 that LLaVA uses, the default for a run with an unknown tower."""

Scorer = Callable[[Sequence[Row]], dict[str, Metric]]
"""Function from answered questions to metrics."""

ScorerFinder = Callable[[str], Scorer | None]
"""Function that finds the scorer of a task by its name; None if the answers are ignored."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Args:
        folder: the run folder.
        job: the job as resolved.
        source_job: the job that trained the evaluated model; the same object as `job` unless the run evaluates the
            checkpoint of another run.
        numbers: content of scores.json and metrics.json, by dotted name.
        metrics: metrics of its answers, such as "gqa.accuracy".
        provenance: model and settings that gave the answers, as the evaluation wrote them.
    """

    folder: Path
    job: dict[str, Any]
    source_job: dict[str, Any]
    numbers: dict[str, float]
    metrics: dict[str, Metric]
    provenance: dict[str, Any]

    @property
    def is_foreign(self) -> bool:
        """True if the evaluated model is not a LLaVA."""
        return bool(self.provenance.get("model_type", "llava") != "llava")

    @property
    def methods(self) -> Preset:
        """Methods of the evaluation."""
        return make_preset(self.provenance.get("methods") or _read_methods(self.job))

    @property
    def trained_with(self) -> Preset:
        """Methods of the training.

        A checkpoint from elsewhere was trained with the methods that its folder has. Without the folder, they are those
        of the evaluation, except methods that the job sets.
        """
        if self.source_job is not self.job or self.job.get("train"):
            return make_preset(_read_methods(self.source_job))
        if (saved := _read_saved_methods(self.job)) is not None:
            return make_preset(saved)
        evaluated = self.provenance.get("methods", {})
        return make_preset(
            {name: None if value else evaluated.get(name) for name, value in _read_methods(self.job).items()}
        )

    @property
    def uses_captions(self) -> bool:
        """True if the model sees a caption in place of the image."""
        return (self.job.get("evaluate") or {}).get("image_input") == "caption"

    @property
    def seed(self) -> int:
        return int(self.source_job.get("seed", 0))

    @property
    def training_s(self) -> float | None:
        """Seconds of the training loops: computing, waiting for data, and stalls."""
        # A job that only evaluates has no record of training.
        path = self.folder / METRICS_FILE
        if not path.exists():
            return None
        return sum(step.get(part) or 0.0 for step in jsonl.read(path) for part in ("compute_s", "data_s", "stall_s"))

    @cached_property
    def config(self) -> ReduxConfig | None:
        """Configuration of the model, if the run folder has it."""
        # The last stage has the model that was evaluated.
        stages = list_stage_models(self.job, self.folder)
        for model in (*reversed(stages), str(self.folder / ASSEMBLED_FOLDER)):
            path = storage.join(model, CONFIG_FILE)
            if storage.exists(path):
                return ReduxConfig.from_dict(json.loads(storage.read(path)))
        return None


@dataclass(frozen=True, eq=False)
class ComparedModel:
    """Runs that differ only in the seed.

    Args:
        runs: the runs, by seed.
        methods: methods of the evaluation.
        trained_with: methods of the training.
        uses_captions: the model sees a caption in place of the image.
        is_foreign: the model is not a LLaVA.
    """

    runs: tuple[FinishedRun, ...]
    methods: Preset
    trained_with: Preset
    uses_captions: bool
    is_foreign: bool

    @property
    def trained_as_evaluated(self) -> bool:
        """True if training and evaluation have the same methods; never for a model that is not a LLaVA."""
        return self.methods == self.trained_with and not self.is_foreign

    @property
    def job(self) -> dict[str, Any]:
        return self.runs[0].job

    @property
    def num_seeds(self) -> int:
        return len(self.runs)

    @property
    def checkpoint(self) -> str:
        """The checkpoint that the runs start from, "" for none."""
        return str(self.job["model"].get("checkpoint") or "")

    @property
    def trained_model(self) -> str:
        """Folder or URL of the model that the first run trained, "" if there is none."""
        stages = list_stage_models(self.job, self.runs[0].folder)
        return stages[-1] if stages and is_complete(stages[-1]) else ""

    @cached_property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        if config := self.runs[0].config:
            return config.num_patches
        tower = self.runs[0].source_job["model"].get("tower")
        return int(tower["image_size"] // tower["patch_size"]) ** 2 if isinstance(tower, dict) else CLIP_PATCHES

    @cached_property
    def num_blocks(self) -> int:
        """Number of tower blocks in use."""
        if config := self.runs[0].config:
            return config.num_blocks_used
        tower = self.runs[0].source_job["model"].get("tower")
        return int(tower["num_hidden_layers"]) - 1 if isinstance(tower, dict) else CLIP_BLOCKS

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens of an image that reach the language model."""
        return count_remaining_tokens(self.methods, self.num_patches, self.num_blocks)

    def metrics(self, name: str) -> list[Metric]:
        """One metric per run that has it."""
        return [run.metrics[name] for run in self.runs if name in run.metrics]

    def mean_number(self, name: str) -> float | None:
        """Mean over the runs of a number in metrics.json; None if no run has it."""
        # Older runs may lack a number.
        values = [run.numbers[name] for run in self.runs if name in run.numbers]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Family:
    """Models that differ only in the method, and foreign models with the same evaluation tasks.

    Args:
        label: sizes of the model, and other settings in which families differ.
        models: the models.
    """

    label: str
    models: tuple[ComparedModel, ...]

    @property
    def size(self) -> str | None:
        """Size of the paper's models, "7B" or "13B", from the name of the language model; None for other sizes."""
        language = str(self.models[0].runs[0].source_job["model"].get("language")).lower()
        return next((size for size in ("7B", "13B") if f"-{size.lower()}" in language), None)


def count_remaining_tokens(methods: Preset, patches: int = CLIP_PATCHES, blocks: int = CLIP_BLOCKS) -> int:
    """Count the tokens of an image after the methods, for a tower with these patches and blocks in use."""
    if methods.reduction:
        return methods.reduction.count_tokens(patches)
    return methods.vmtc.count_tokens_left(patches, blocks) if methods.vmtc else patches


def read_finished_runs(paths: Sequence[Path], find_scorer: ScorerFinder) -> tuple[list[FinishedRun], list[str]]:
    """Read the finished runs and score their answers.

    Args:
        paths: run folders, or folders that contain run folders.
        find_scorer: finds the functions that score the answers.

    Returns:
        The runs, and notes about runs that are left out.

    Raises:
        ValueError: there is no finished run at these paths, or a file of a run cannot be read.
    """
    notes: list[str] = []
    runs: list[FinishedRun] = []
    for folder in dict.fromkeys(folder for path in paths for folder in _find_run_folders(path)):
        if is_finished_run(folder):
            runs.append(read_run(folder, find_scorer))
        else:
            notes.append(f"{folder} is not finished and is left out.")
    if not runs:
        searched = ", ".join(f"{path}, {path}/*, {path}/*/*" for path in paths) or "nowhere"
        raise ValueError(
            f"runs: found none that is finished, allowed: folders with job.yaml and metrics.json at {searched}"
        )
    metrics = add_split_metrics([run.metrics for run in runs], [run.source_job for run in runs])
    return [replace(run, metrics=run_metrics) for run, run_metrics in zip(runs, metrics, strict=True)], notes


def group_families(runs: Sequence[FinishedRun], notes: list[str]) -> list[Family]:
    """Group runs into families; notes about runs that are left out are appended to `notes`."""
    if approximate := [run.folder.name for run in runs if run.provenance.get("splitter") == "regex"]:
        notes.append(
            f"T12 of {', '.join(approximate)}: sentences were counted by regular expressions, "
            "not by Punkt as in IFEval."
        )
    # LLaVA runs make the families; if there are none, foreign models make families of their own.
    foreign = [run for run in runs if run.is_foreign]
    by_family = defaultdict[str, list[FinishedRun]](list)
    for run in [run for run in runs if not run.is_foreign] or foreign:
        by_family[_family_key(run)].append(run)
    models = {key: list(_group_seeds(family, notes)) for key, family in by_family.items()}
    # A foreign model joins every family with the same evaluation tasks.
    foreign_is_family = bool(by_family.keys() & {_family_key(run) for run in foreign})
    for model in [] if foreign_is_family else _group_seeds(foreign, notes):
        for key, family in by_family.items():
            if _read_tasks(family[0]) == _read_tasks(model.runs[0]):
                models[key].append(model)
    # Labels come last, because they name only the differences between families.
    labels = _make_labels(list(models))
    return [Family(label, tuple(models[key])) for key, label in zip(models, labels, strict=True)]


def _family_key(run: FinishedRun) -> str:
    return json.dumps(family_settings(run.source_job, run.job), sort_keys=True)


def _read_tasks(run: FinishedRun) -> Any:
    return (run.job.get("evaluate") or {}).get("tasks")


def _find_run_folders(path: Path) -> list[Path]:
    if (path / JOB_FILE).exists():
        return [path]
    files = [file for pattern in (f"*/{JOB_FILE}", f"*/*/{JOB_FILE}") for file in sorted(path.glob(pattern))]
    # The shared stages of a study are not evaluated.
    return [
        file.parent
        for file in files
        if not (file.parent.name == "shared" and (file.parent.parent / STUDY_FILE).exists())
    ]


def read_run(folder: Path, find_scorer: ScorerFinder) -> FinishedRun:
    """Read a run folder and score its answers."""
    job = _relocate_paths(_read_job(folder / JOB_FILE), folder)
    numbers: dict[str, float] = {}
    # Numbers of metrics.json replace those of scores.json.
    for name in (SCORES_FILE, RESULT_FILE):
        if (folder / name).exists():
            numbers |= _read_json(folder / name)
    metrics: dict[str, Metric] = {}
    # The file of a task has its name; files without a scorer, such as those of the speed, are ignored.
    for path in sorted((folder / ANSWERS_FOLDER).glob("*.jsonl")):
        if scorer := find_scorer(path.stem):
            try:
                scored = scorer(jsonl.read(path))
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: a row lacks or misuses {error}, allowed: rows as an evaluation writes"
                ) from None
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            metrics |= {f"{path.stem}.{name}": metric for name, metric in scored.items()}
    provenance = folder / ANSWERS_FOLDER / PROVENANCE_FILE
    return FinishedRun(
        folder=folder,
        job=job,
        source_job=_find_source_job(job),
        numbers=numbers,
        metrics=metrics,
        provenance=_read_json(provenance) if provenance.exists() else {},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: got {error}, allowed: an object of JSON") from None


def _read_job(path: Path) -> dict[str, Any]:
    try:
        job = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {error}") from None
    if not isinstance(job, dict) or not isinstance(job.get("model"), dict):
        raise ValueError(f"{path}: got no section model, allowed: a job as a run writes it")
    if "workers" in job:  # A key of every resolved job before the keys got their present names
        raise ValueError(f"{path}: written by an earlier version of Redux, allowed: runs of this version")
    return job


def _relocate_paths(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Replace the folder in which a run was made by the one in which it is, in all paths of its job.

    Runs of a study are copied into one folder from several machines. Their checkpoint is that of a run beside them.
    """
    checkpoint = job["model"].get("checkpoint")
    if not isinstance(checkpoint, str) or Path(checkpoint).exists():
        return job
    # The run of the checkpoint lies beside this one, under another path than in the job.
    current_parent = folder.resolve().parent
    former_parent = next(
        (path.parent for path in Path(checkpoint).parents if _is_run_folder(current_parent / path.name)), None
    )
    if former_parent is None:
        return job
    # Paths of sets and checkpoints all begin with the former folder. Without the closing quotation mark, its JSON text
    # is a prefix of theirs.
    former_prefix, current_prefix = (json.dumps(f"{parent}/")[:-1] for parent in (former_parent, current_parent))
    return dict(json.loads(json.dumps(job).replace(former_prefix, current_prefix)))


def _find_source_job(job: dict[str, Any]) -> dict[str, Any]:
    """Find the job that trained the evaluated model.

    This is the job itself, with the sizes from the run of its starting checkpoint. A job without training has the job
    of that run as its source.
    """
    checkpoint = job["model"].get("checkpoint")
    # The checkpoint of a run is inside the run folder, so a folder above it has the job.
    parents = Path(checkpoint).parents if isinstance(checkpoint, str) else ()
    previous = next((_read_job(folder / JOB_FILE) for folder in parents if _is_run_folder(folder)), None)
    if previous is None or not job.get("train"):
        return previous or job
    # Sizes and inherited methods are in the job of the checkpoint only.
    inherited = ("tower", "language", *(name for name in METHODS if job["model"].get(name) == "checkpoint"))
    return job | {"model": job["model"] | {part: previous["model"].get(part) for part in inherited}}


def _is_run_folder(folder: Path) -> bool:
    """Return True if a folder is that of a run, and not a folder in which a user keeps a job file."""
    has_record = (folder / METRICS_FILE).exists() or (folder / RESULT_FILE).exists()
    return has_record and (folder / JOB_FILE).exists()


def _read_methods(job: Mapping[str, Any]) -> dict[str, Any]:
    """Read the method settings of a job; None for a method that the checkpoint decides."""
    settings = {name: job["model"].get(name) for name in METHODS}
    return {name: None if value == "checkpoint" else value for name, value in settings.items()}


def _read_saved_methods(job: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the methods in the configuration of a checkpoint; None if it is not a local folder of a LLaVA."""
    path = Path(str(job["model"].get("checkpoint"))) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or config.get("model_type") != "llava":
        return None
    return {name: config.get(name) for name in METHODS}


def make_preset(methods: Mapping[str, Any], description: str = "") -> Preset:
    """Make a preset from method settings as a YAML or JSON file has them."""
    arguments = {}
    for name, settings_class in METHODS.items():
        values = methods.get(name)
        if values is not None:
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        arguments[name] = None if values is None else settings_class(**values)
    return Preset(description=description, **arguments)


def family_settings(source_job: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the settings that separate families, by dotted name: training and evaluation tasks."""
    # Training settings of the source, evaluation settings of this run.
    combined = copy.deepcopy({**source_job, "evaluate": job.get("evaluate")})
    return {key: value for key, value in flatten_dict(combined).items() if not is_in_sections(key, SAME_FAMILY_KEYS)}


def _group_seeds(family: Sequence[FinishedRun], notes: list[str]) -> Iterator[ComparedModel]:
    """Group runs that differ only in the seed; add a note for each run whose settings and seed occur twice."""
    by_settings = defaultdict[str, dict[int, FinishedRun]](dict)
    for run in family:
        # Runs with the same family and methods are seeds of one model.
        settings = [asdict(run.methods), asdict(run.trained_with), run.uses_captions]
        seeds = by_settings[json.dumps(settings, sort_keys=True)]
        if run.seed in seeds:
            notes.append(f"{run.folder} has the same settings and seed as {seeds[run.seed].folder} and is left out.")
        else:
            seeds[run.seed] = run
    for seeds in by_settings.values():
        runs = tuple(seeds[seed] for seed in sorted(seeds))
        first_run = runs[0]
        yield ComparedModel(
            runs=runs,
            methods=first_run.methods,
            trained_with=first_run.trained_with,
            uses_captions=first_run.uses_captions,
            is_foreign=first_run.is_foreign,
        )


def _make_labels(keys: Sequence[str]) -> Iterator[str]:
    """Make labels of families: their sizes, and every other setting in which they differ."""
    families = name_tasks([json.loads(key) for key in keys])
    sizes = [_describe_sizes(settings) for settings in families]
    stages = [_list_parts(settings, "train") for settings in families]
    # A stage that some families lack is named as a whole, not by each of its settings.
    common = set(stages[0]).intersection(*stages)
    names = dict.fromkeys(
        name
        for settings in families
        for name in settings
        if not name.startswith("train.") or name.split(".")[1] in common
    )
    all_sizes_differ = len(set(sizes)) == len(sizes)  # Then other settings of the model add nothing
    differing = [
        name
        for name in names
        if len({json.dumps(settings.get(name)) for settings in families}) > 1
        and not (all_sizes_differ and name.startswith("model."))
    ]
    for size, settings, stage_names in zip(sizes, families, stages, strict=True):
        trained = [f"stages {' and '.join(stage_names)}"] if len({*map(tuple, stages)}) > 1 else []
        yield ", ".join([size, *trained, *(f"{name} = {json.dumps(settings.get(name))}" for name in differing)])


def name_tasks(all_settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Replace the settings of evaluation tasks that some runs lack by the names of the tasks, for descriptions.

    Args:
        all_settings: settings of each run by dotted name.

    >>> for named in name_tasks([{"evaluate.tasks.vqa.limit": 4}, {"evaluate.tasks.pope.limit": 9, "seed": 1}]):
    ...     print(named)
    {'evaluate.tasks': 'vqa'}
    {'seed': 1, 'evaluate.tasks': 'pope'}
    """
    tasks = [_list_parts(settings, TASKS_KEY) for settings in all_settings]
    common = set(tasks[0]).intersection(*tasks) if tasks else set()
    return [
        {name: value for name, value in settings.items() if not {*_list_parts([name], TASKS_KEY)} - common}
        | {TASKS_KEY: ", ".join(names)}
        for settings, names in zip(all_settings, tasks, strict=True)
    ]


def _list_parts(names: Iterable[str], section: str) -> list[str]:
    """List the parts of a section of a job, from dotted names of settings.

    >>> _list_parts(["train.pretrain.steps", "train.pretrain.seed", "train.instruct.steps"], "train")
    ['pretrain', 'instruct']
    """
    prefix = f"{section}."
    return list(dict.fromkeys(name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)))


def _describe_sizes(settings: Mapping[str, Any]) -> str:
    if isinstance(language := settings.get("model.language"), str):
        return Path(language).name
    parts = [
        f"{name} of {settings[f'model.{part}.num_hidden_layers']} × {settings[f'model.{part}.hidden_size']}"
        for part, name in (("tower", "tower"), ("language", "language model"))
        if f"model.{part}.hidden_size" in settings
    ]
    return ", ".join(parts) or Path(str(settings.get("model.checkpoint") or "sizes unknown")).name


def select_changed_fields(settings: Any) -> dict[str, Any]:
    """Select the fields of a settings dataclass that differ from their defaults."""
    values = {field: getattr(settings, field.name) for field in fields(settings)}
    return {field.name: value for field, value in values.items() if value != field.default}
