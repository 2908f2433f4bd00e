"""Finished runs, as models that can be compared: what a run is follows from its settings, never from its name.

Runs that differ in nothing but the seed are one model.  Models that differ in nothing but the method (VMTC, CMAI,
another reduction, or being told of the image instead of shown it) are one family, and only within a family is a
difference a difference of the method.  A run that asks a checkpoint of another run is of that run's family and seed.

Cost: every line of a run's answers is read and scored once, and only its outcomes are kept.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipelines.core import jsonl
from redux.benchmarks import Metric, Row
from redux.configuration import ReduxConfig
from redux.presets import Preset
from redux.settings import METHODS

IDLE = (
    "name", "seed", "num_workers", "checkpoints", "recovery", "report", "trackers", "data.max_bad_fraction",
    "evaluate.num_actors", "evaluate.batch_size", "evaluate.image_input", "evaluate.template",
    "evaluate.image_aspect_ratio", "evaluate.allow_mismatch",
    *(f"model.{name}" for name in METHODS),
)  # fmt: skip
"""What of a job makes no other family: it is the seed, the method, or tells nothing of the result."""

PATCHES, BLOCKS = 576, 23
"""Of an image in CLIP ViT-L/14 at 336 pixels: what a run has whose tower nothing is known of."""

Scorers = Mapping[str, Callable[[Sequence[Row]], dict[str, Metric]]]
"""By the name of a task, what makes metrics of its rows."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    job: as resolved.  source: the job that trained what it asks; its own but for runs that ask another's checkpoint.
    numbers: of scores.json and metrics.json, flat.  metrics: of its answers, such as "gqa.accuracy".
    asked: who was asked, and how, as the evaluation noted it.
    """

    folder: Path
    job: dict[str, Any]
    source: dict[str, Any]
    numbers: dict[str, float]
    metrics: dict[str, Metric]
    asked: dict[str, Any]

    @property
    def foreign(self) -> bool:
        """Whether it asked a model of another kind than LLaVA."""
        return bool(self.asked.get("model_type", "llava") != "llava")

    @property
    def methods(self) -> Preset:
        """What it answered with."""
        return methods(self.asked.get("methods") or _told(self.job))

    @property
    def learned(self) -> Preset:
        """What it was trained with; of a checkpoint from elsewhere what that has, where nothing else was asked for."""
        if self.source is not self.job or self.job.get("train"):
            return methods(_told(self.source))
        own = self.asked.get("methods", {})
        return methods({name: None if value else own.get(name) for name, value in _told(self.job).items()})

    @property
    def seed(self) -> int:
        return int(self.source.get("seed", 0))

    @property
    def trained_s(self) -> float | None:
        """Seconds of the training loops: computing, waiting for data and standing still."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return None
        return sum(step.get(part) or 0.0 for step in jsonl.read(path) for part in ("compute_s", "data_s", "stall_s"))

    @cached_property
    def config(self) -> ReduxConfig | None:
        """The model's own, where the run folder has it."""
        stages = [f"checkpoints/{stage}/model" for stage in reversed(list(self.job.get("train") or {}))]
        found = (self.folder / name for name in (*stages, "assembled"))
        return next((ReduxConfig.from_pretrained(path) for path in found if (path / "config.json").exists()), None)


@dataclass(frozen=True, eq=False)
class Model:
    """Runs that differ in nothing but the seed, by seed.

    methods: what it answers with.  described: whether it knew images by its own descriptions alone.
    trained: whether it learned with the methods that it answers with.  foreign: it is no LLaVA.
    """

    runs: tuple[Run, ...]
    methods: Preset
    described: bool
    trained: bool
    foreign: bool

    @property
    def job(self) -> dict[str, Any]:
        return self.runs[0].job

    @property
    def seeds(self) -> int:
        return len(self.runs)

    @property
    def checkpoint(self) -> str:
        """What it began with, "" for nothing."""
        return str(self.job["model"].get("checkpoint") or "")

    @property
    def result(self) -> str:
        """The folder of the model that its first run made, "" where it is not there."""
        stages = [self.runs[0].folder / "checkpoints" / stage / "model" for stage in self.job.get("train") or {}]
        return str(stages[-1]) if stages and stages[-1].exists() else ""

    @cached_property
    def patches(self) -> int:
        """Patch tokens of an image."""
        if config := self.runs[0].config:
            return config.num_patches
        tower = self.runs[0].source["model"].get("tower")
        return int(tower["image_size"] // tower["patch_size"]) ** 2 if isinstance(tower, dict) else PATCHES

    @cached_property
    def blocks(self) -> int:
        """Blocks of the tower that are in use."""
        if config := self.runs[0].config:
            return config.num_blocks_used
        tower = self.runs[0].source["model"].get("tower")
        return int(tower["num_hidden_layers"]) - 1 if isinstance(tower, dict) else BLOCKS

    @cached_property
    def tokens(self) -> int:
        """Tokens of an image that reach the language model."""
        return left(self.methods, self.patches, self.blocks)

    def metrics(self, name: str) -> list[Metric]:
        """One for each run that has it."""
        return [run.metrics[name] for run in self.runs if name in run.metrics]

    def number(self, name: str) -> float | None:
        """The mean over runs of a number in metrics.json; None where none has it."""
        values = [run.numbers[name] for run in self.runs if name in run.numbers]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Family:
    """Models that differ in nothing but the method; and of other kinds those that were asked the same.

    label: their sizes, and what else tells this family from the others.
    """

    label: str
    models: tuple[Model, ...]

    @property
    def size(self) -> str | None:
        """Where the paper has its like: "7B" or "13B", by the name of the language model."""
        language = str(self.models[0].runs[0].source["model"].get("language")).lower()
        return next((size for size in ("7B", "13B") if f"-{size.lower()}" in language), None)


def left(methods: Preset, patches: int = PATCHES, blocks: int = BLOCKS) -> int:
    """Tokens of an image that a method leaves of so many patches, in a tower of so many blocks in use."""
    if methods.reduction:
        return methods.reduction.count_tokens(patches)
    return methods.vmtc.count_tokens_left(patches, blocks) if methods.vmtc else patches


def find(paths: Sequence[Path], scorers: Scorers) -> tuple[list[Family], list[str]]:
    """The families of the finished runs at `paths`, and what is to be said of those left out.

    paths: folders of runs, or folders that hold such folders.
    Raises ValueError where no finished run is there, saying where it looked, or a file of one cannot be read.
    """
    notes, runs = [], list[Run]()
    for folder in dict.fromkeys(folder for path in paths for folder in _folders(path)):
        if (folder / "scores.json").exists() or (folder / "metrics.json").exists():
            runs.append(read(folder, scorers))
        else:
            notes.append(f"{folder} is not finished and is left out.")
    if not runs:
        looked = ", ".join(f"{path}, {path}/*, {path}/*/*" for path in paths) or "nowhere"
        raise ValueError(
            f"runs: found none that is finished, allowed: folders with job.yaml and metrics.json at {looked}"
        )
    if rough := [run.folder.name for run in runs if run.asked.get("splitter") == "regex"]:
        notes.append(
            f"T12 of {', '.join(rough)}: sentences were counted by regular expressions, not by Punkt as in IFEval."
        )
    others = [run for run in runs if run.foreign]
    by_family = defaultdict[str, list[Run]](list)
    for run in [run for run in runs if not run.foreign] or others:
        by_family[_key(run)].append(run)
    models = {key: list(_models(family, notes)) for key, family in by_family.items()}
    for model in _models(others, notes) if others and not by_family.keys() & {_key(run) for run in others} else ():
        for key, family in by_family.items():
            if _tasks(family[0]) == _tasks(model.runs[0]):
                models[key].append(model)
    return [Family(label, tuple(models[key])) for key, label in zip(models, _labels(list(models)), strict=True)], notes


def _key(run: Run) -> str:
    return json.dumps(settings(run.source, run.job), sort_keys=True)


def _tasks(run: Run) -> Any:
    return (run.job.get("evaluate") or {}).get("tasks")


def _folders(path: Path) -> list[Path]:
    if (path / "job.yaml").exists():
        return [path]
    found = [each.parent for pattern in ("*/job.yaml", "*/*/job.yaml") for each in sorted(path.glob(pattern))]
    # what a study trains once for all is not asked anything
    return [folder for folder in found if not (folder.name == "shared" and (folder.parent / "study.yaml").exists())]


def read(folder: Path, scorers: Scorers) -> Run:
    """The run of a folder, its answers scored."""
    job, numbers = _yaml(folder / "job.yaml"), dict[str, float]()
    for name in ("scores.json", "metrics.json"):
        if (folder / name).exists():
            numbers |= _json(folder / name)
    metrics: dict[str, Metric] = {}
    for path in sorted((folder / "answers").glob("*.jsonl")):
        if path.stem in scorers:
            try:
                scored = scorers[path.stem](jsonl.read(path))
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: a row lacks or misuses {error}, allowed: rows as an evaluation writes"
                ) from None
            metrics |= {f"{path.stem}.{name}": metric for name, metric in scored.items()}
    asked = folder / "answers" / "asked.json"
    return Run(folder, job, _source(job), numbers, metrics, _json(asked) if asked.exists() else {})


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: got {error}, allowed: an object of JSON") from None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        job = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {error}") from None
    if not isinstance(job, dict) or not isinstance(job.get("model"), dict):
        raise ValueError(f"{path}: got no section model, allowed: a job as a run writes it")
    return job


def _source(job: dict[str, Any]) -> dict[str, Any]:
    """The job that trained what this one asks: itself, with the sizes of the run whose checkpoint it began with; that
    run's where it trained nothing."""
    checkpoint = job["model"].get("checkpoint")
    above = Path(checkpoint).parents if isinstance(checkpoint, str) else ()
    before = next((_yaml(folder / "job.yaml") for folder in above if (folder / "job.yaml").exists()), None)
    if before is None or not job.get("train"):
        return before or job
    own = ("tower", "language", *(name for name in METHODS if job["model"].get(name) == "own"))
    return job | {"model": job["model"] | {part: before["model"].get(part) for part in own}}


def _told(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a job says of the method; what is a checkpoint's own it does not know."""
    return {name: None if (value := job["model"].get(name)) == "own" else value for name in METHODS}


def methods(told: Mapping[str, Any], shows: str = "") -> Preset:
    """Settings of the method, typed."""
    return Preset(
        description=shows,
        **{
            name: kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
            if (values := told.get(name)) is not None
            else None
            for name, kind in METHODS.items()
        },
    )


def settings(source: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a family, by dotted name: how it was trained and what was asked, without method, seed and the idle."""
    whole = copy.deepcopy({**source, "evaluate": job.get("evaluate")})
    flat = dict(_flat(whole))
    return {key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{idle}.") for idle in IDLE)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _models(family: Sequence[Run], notes: list[str]) -> Iterator[Model]:
    alike = defaultdict[str, dict[int, Run]](dict)
    for run in family:
        kind = [asdict(run.methods), asdict(run.learned), _described(run)]
        seeds = alike[json.dumps(kind, sort_keys=True)]
        if run.seed in seeds:
            notes.append(f"{run.folder} has settings and seed of {seeds[run.seed].folder} and is left out.")
        else:
            seeds[run.seed] = run
    for seeds in alike.values():
        runs = tuple(seeds[seed] for seed in sorted(seeds))
        own, foreign = runs[0].methods, runs[0].foreign
        yield Model(runs, own, _described(runs[0]), own == runs[0].learned and not foreign, foreign)


def _described(run: Run) -> bool:
    return (run.job.get("evaluate") or {}).get("image_input") == "caption"


def _labels(keys: Sequence[str]) -> Iterator[str]:
    """Sizes, and every other setting in which families differ."""
    families = [json.loads(key) for key in keys]
    sizes = [_sizes(each) for each in families]
    names = dict.fromkeys(name for each in families for name in each)
    enough = len(set(sizes)) == len(sizes)  # to tell the models themselves apart
    differing = [
        name
        for name in names
        if len({json.dumps(each.get(name)) for each in families}) > 1 and not (enough and name.startswith("model."))
    ]
    for size, each in zip(sizes, families, strict=True):
        told = [f"{name} = {json.dumps(each.get(name))}" for name in differing]
        yield ", ".join([size, *told])


def _sizes(flat: Mapping[str, Any]) -> str:
    if isinstance(language := flat.get("model.language"), str):
        return Path(language).name
    parts = [
        f"{name} of {flat[f'model.{part}.num_hidden_layers']} × {flat[f'model.{part}.hidden_size']}"
        for part, name in (("tower", "tower"), ("language", "language model"))
        if f"model.{part}.hidden_size" in flat
    ]
    return ", ".join(parts) or Path(str(flat.get("model.checkpoint") or "sizes unknown")).name


def changes(value: Any) -> dict[str, Any]:
    """The fields of settings that are not at their defaults."""
    return {each.name: getattr(value, each.name) for each in fields(value) if getattr(value, each.name) != each.default}
