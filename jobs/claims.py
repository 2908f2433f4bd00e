"""Claim a folder for a job: other settings are refused where something was learned or answered with those before.

A run that failed at its start has learned nothing, so the corrected job may go on in its folder.  Preparations (shards,
assembled parts) bind nothing: a setting that they depend on may change until the first training step, and they are made
again.  Settings that change no result may change at any time.

Cost: the lines of metrics.jsonl are read once.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs import document
from jobs.schema import Job
from pipelines.core import failures, jsonl
from pipelines.evaluation import evaluate
from pipelines.training import checkpoint, metrics

JOB = "job.yaml"
PROGRESS = "progress.jsonl"
ASSEMBLED = "assembled"

FREE = (
    "data.max_bad_fraction", "num_workers", "gpu_share", "recovery", "trackers",
    "evaluate.batch_size", "evaluate.num_actors",
)  # fmt: skip
"""Settings of a job that change no result."""

PREPARATIONS = {"shards", "assemble"}
"""Steps that are done again where their settings change before the first training step."""


def is_free(key: str, free: Collection[str]) -> bool:
    """Return whether a dotted path is one of `free` or lies in one.

    >>> is_free("recovery.restarts", FREE), is_free("evaluate.batch_size", FREE)
    (True, False)
    """
    return any(f"{key}.".startswith(f"{name}.") for name in free)


def find_changes(
    path: Path, settings: Any, find_use: Callable[[str], str] = lambda key: "", changed: bool = False
) -> list[str]:
    """Return the dotted paths at which settings differ from those in a file; none where there is no file.

    Args:
        settings: a job, or another tree of settings.  What the file does not say has its default: it may be from
            before there was such a setting.
        find_use: names what depends on the value in the file at a dotted path, "" where nothing does.
        changed: all may differ.

    Raises:
        ValueError: something depends on a value that differs.
    """
    if not path.exists():
        return []
    now = yaml.safe_load(document.write(settings))
    result = []
    for key, old, new in checkpoint.find_differences(_read(path, type(settings)), now):
        if (use := find_use(key)) and not changed:
            raise ValueError(
                f"{path}: this was started with {key} = {old!r}, not {new!r}, and {use} depends on it; "
                "give it another name, or another folder by --runs-dir; --allow-changes goes on all the same"
            )
        result.append(key)
    return result


def claim(
    path: Path, settings: Any, find_use: Callable[[str], str] = lambda key: "", changed: bool = False
) -> list[str]:
    """Write settings to a file in the folder that they are for; arguments and result as of `find_changes`."""
    result = find_changes(path, settings, find_use, changed)
    resolved = document.write(settings)
    if not path.exists() or path.read_text() != resolved:
        write_atomically(path, resolved)
    return result


def make_folder(folder: Path) -> None:
    """Make a run folder; ValueError where none can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: no run folder can be made here: {error.strerror}") from None


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    with failures.locate_errors(path):
        unfinished.write_text(text)
    os.replace(unfinished, path)


def find_assembled(folder: Path, job: Job) -> Path | None:
    """Return the folder of assembled parts in a run folder, None where they are not there or of another model.

    Of another model they may be once a stage has learned from them: then that is refused, or wanted.
    """
    assembled = folder / ASSEMBLED
    if not assembled.exists():
        return None
    outdated = any(key.partition(".")[0] == "model" for key in find_changes(folder / JOB, job))
    return None if outdated and not metrics.read_stages(folder) else assembled


@dataclass(frozen=True)
class Claim:
    """Claim of a run folder by a job: the settings that its steps depend on, and those that are begun.

    stages: names of the training stages, in order, of the job in the folder and of the job that is to go on.
    begun: stages with a training step on record, and "evaluate" where there are answers.
    """

    folder: Path
    job: Job
    stages: tuple[list[str], list[str]]
    begun: frozenset[str]

    @classmethod
    def of(cls, folder: Path, job: Job) -> "Claim":
        """Read what the folder holds."""
        before = _read(folder / JOB, Job).get("train") if (folder / JOB).exists() else None
        begun = metrics.read_stages(folder) | ({"evaluate"} if evaluate.has_answers(folder) else set())
        return cls(folder, job, (list(before or {}), list(job.train)), frozenset(begun))

    def find_changes(self, changed: bool = False) -> list[str]:
        """Return the settings that differ from those in the folder; ValueError where a step has used one of them."""
        return find_changes(self.folder / JOB, self.job, self.find_use, changed)

    def enforce(self, changed: bool = False) -> None:
        """Write the job into the folder, and have preparations and a report with other settings made again."""
        keys = claim(self.folder / JOB, self.job, self.find_use, changed)
        outdated = set().union(*(self.find_dependents(key) for key in keys if not self.find_use(key)))
        path = self.folder / PROGRESS
        entries = jsonl.read(path)
        if any(entry["step"] in outdated for entry in entries):
            kept = [entry for entry in entries if entry["step"] not in outdated]
            write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        if "assemble" in outdated:
            shutil.rmtree(self.folder / ASSEMBLED, ignore_errors=True)

    def find_use(self, key: str) -> str:
        """Return the first step that has begun and depends on a setting, "" where there is none."""
        steps = self.find_dependents(key)
        if steps & PREPARATIONS:  # every stage learns from what they made
            steps = steps.union(*self.stages)
        return next((name for name in (*self._all_stages, "evaluate") if name in steps & self.begun), "")

    def find_dependents(self, key: str) -> set[str]:
        """Return the steps whose results depend on the setting at a dotted path."""
        if is_free(key, FREE):
            return set()
        section, _, rest = key.partition(".")
        if section == "report":
            return {"report"}
        if section == "evaluate":
            return {"evaluate", "report"}
        if section in ("name", "checkpoints"):
            return {*self._all_stages, "evaluate", "report"}
        if section == "train" and rest:
            # the name of a stage may hold dots
            stage = max((name for name in self._all_stages if f"{rest}.".startswith(f"{name}.")), key=len)
            setting = rest.removeprefix(stage).removeprefix(".").partition(".")[0]
            orders = [order[order.index(stage) :] for order in self.stages if stage in order]
            made = {"": PREPARATIONS, "data": {"shards"}, "template": {"shards"}, "precision": {"assemble"}}
            return {*itertools.chain(*orders), *made.get(setting, ()), "evaluate", "report"}
        made = {"data": {"shards"}, "seed": {"assemble"}}
        return {*self._all_stages, *made.get(section, PREPARATIONS), "evaluate", "report"}

    @property
    def _all_stages(self) -> Sequence[str]:
        return list(dict.fromkeys(itertools.chain(*self.stages)))


def _read(path: Path, kind: type) -> dict[str, Any]:
    """Read a tree of settings with its defaults; as it stands where it is not of the kind any more."""
    try:
        written = document.write(document.read(path, (), kind))
    except ValueError:
        written = path.read_text()
    found = yaml.safe_load(written)
    return found if isinstance(found, dict) else {}
