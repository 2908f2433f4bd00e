"""Ownership of a run folder by a job: changed settings are refused once a training step or an answer depends on them.

A run that failed at its start has trained nothing, so the corrected job may use its folder. Settings that shards and
assembled parts depend on may change until the first training step; both are then made again. Settings that change no
result may change at any time.

Cost: reads the lines of metrics.jsonl once.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs import document
from jobs.schema import Job
from pipelines.core import jsonl, storage
from pipelines.core.settings import KEYS_WITHOUT_EFFECT, is_in_sections
from pipelines.evaluation import evaluate
from pipelines.training import checkpoint, metrics
from pipelines.training.files import ASSEMBLED_FOLDER, JOB_FILE, PROGRESS_FILE

PREPARATIONS = {"shards", "assemble"}
"""Phases that are repeated if their settings change before the first training step."""


def find_changes(
    path: Path, settings: Any, find_use: Callable[[str], str] = lambda key: "", allow_changes: bool = False
) -> list[str]:
    """Find the dotted paths at which settings differ from those in a file; none if the file does not exist.

    Args:
        path: the file.
        settings: a job, or another tree of settings. A key that the file lacks has its default: the file may be older
            than the key.
        find_use: returns the name of what depends on the value at a dotted path, "" if nothing does.
        allow_changes: accept every difference.

    Raises:
        ValueError: something depends on a value that differs, or an earlier version of Redux wrote the file.
    """
    if not path.exists():
        return []
    current = yaml.safe_load(document.write(settings))
    result = []
    for key, old, new in checkpoint.find_differences(_read(path, type(settings)), current):
        if (use := find_use(key)) and not allow_changes:
            raise ValueError(
                f"{path}: this was started with {key} = {old!r}, not {new!r}, and {use} depends on it; "
                "choose another name or another --runs-dir, or continue with --allow-changes"
            )
        result.append(key)
    return result


def claim(
    path: Path, settings: Any, find_use: Callable[[str], str] = lambda key: "", allow_changes: bool = False
) -> list[str]:
    """Write settings to the file in their folder; arguments, result and errors as for `find_changes`."""
    result = find_changes(path, settings, find_use, allow_changes)
    resolved = document.write(settings)
    # An unchanged file keeps its time.
    if not path.exists() or path.read_text(encoding="utf-8") != resolved:
        storage.write(str(path), resolved.encode())
    return result


def make_folder(folder: Path) -> None:
    """Make a run folder; ValueError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: no run folder can be made here: {error.strerror}") from None


@dataclass(frozen=True)
class FolderOwnership:
    """Ownership of a run folder by a job: which phases depend on which settings, and which have started.

    Args:
        folder: run folder.
        job: the job that is to run.
        stages: names of the training stages, in order, of the job in the folder and of `job`.
        started_phases: stages with a recorded training step, and "evaluate" if there are answers.
    """

    folder: Path
    job: Job
    stages: tuple[list[str], list[str]]
    started_phases: frozenset[str]

    @classmethod
    def from_folder(cls, folder: Path, job: Job) -> "FolderOwnership":
        """Read the stages of the job in the folder, and which phases have started."""
        previous = _read(folder / JOB_FILE, Job).get("train") if (folder / JOB_FILE).exists() else None
        previous_stages = list(previous) if isinstance(previous, dict) else []
        started_phases = metrics.read_stages(folder) | ({"evaluate"} if evaluate.has_answers(folder) else set())
        return cls(folder, job, (previous_stages, list(job.train)), frozenset(started_phases))

    def find_changes(self, allow_changes: bool = False) -> list[str]:
        """Find the settings that differ from those in the folder; ValueError if a phase has used one of them."""
        return find_changes(self.folder / JOB_FILE, self.job, self.find_use, allow_changes)

    def enforce(self, allow_changes: bool = False) -> None:
        """Write the job into the folder, and mark outdated preparations and an outdated report as unfinished."""
        keys = claim(self.folder / JOB_FILE, self.job, self.find_use, allow_changes)
        # A setting that a phase has used was refused above, or the user allowed to keep its result.
        outdated = set().union(*(self.find_dependents(key) for key in keys if not self.find_use(key)))
        path = self.folder / PROGRESS_FILE
        entries = jsonl.read(path)
        if any(entry.get("step") in outdated for entry in entries):
            valid = [entry for entry in entries if entry.get("step") not in outdated]
            storage.write(str(path), "".join(json.dumps(entry) + "\n" for entry in valid).encode())
        if "assemble" in outdated:
            shutil.rmtree(self.folder / ASSEMBLED_FOLDER, ignore_errors=True)

    def find_use(self, key: str) -> str:
        """Find the first phase that has started and depends on a setting; "" if there is none."""
        phases = self.find_dependents(key)
        if phases & PREPARATIONS:  # Every stage trains on their results
            phases = phases.union(*self.stages)
        return next((name for name in (*self._all_stages, "evaluate") if name in phases & self.started_phases), "")

    def find_dependents(self, key: str) -> set[str]:
        """Find the phases whose results depend on the setting at a dotted path."""
        if is_in_sections(key, KEYS_WITHOUT_EFFECT):
            return set()
        section, _, subkey = key.partition(".")
        if section == "report":
            return {"report"}
        if section == "evaluate":
            return {"questions", "evaluate", "report"}
        if section in ("name", "checkpoints"):
            return {*self._all_stages, "evaluate", "report"}
        if section == "train" and subkey:
            # The name of a stage may hold dots.
            stage = max((name for name in self._all_stages if f"{subkey}.".startswith(f"{name}.")), key=len)
            setting = subkey.removeprefix(stage).removeprefix(".").partition(".")[0]
            # A changed stage also changes all later ones, in the order before and in the new one.
            orders = [order[order.index(stage) :] for order in self.stages if stage in order]
            preparations = {"": PREPARATIONS, "data": {"shards"}, "template": {"shards"}, "precision": {"assemble"}}
            return {*itertools.chain(*orders), *preparations.get(setting, ()), "evaluate", "report"}
        preparations = {"data": {"shards", "questions"}, "seed": {"assemble"}}
        return {*self._all_stages, *preparations.get(section, PREPARATIONS), "evaluate", "report"}

    @property
    def _all_stages(self) -> Sequence[str]:
        return list(dict.fromkeys(itertools.chain(*self.stages)))


def _read(path: Path, schema: type) -> dict[str, Any]:
    """Read a tree of settings with its defaults, or unchecked if it is no longer valid.

    Raises:
        ValueError: the file has keys of an earlier version, whose values cannot be compared.
    """
    try:
        # Written and read again, as plain values in which every default is explicit.
        return yaml.safe_load(document.write(document.read(path, (), schema)))
    except document.JobError as error:
        if former := next((problem for problem in error.problems if document.FORMER_KEY in problem), None):
            raise ValueError(
                f"{former}; an earlier version of Redux started this run: finish it with that version, or choose "
                "another name"
            ) from None
    tree = document.read_tree(path)
    return tree if isinstance(tree, dict) else {}
