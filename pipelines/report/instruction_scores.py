"""Scores of the instructions that the training text teaches, and of those among the sixteen that it does not.

A model can learn the form of an instruction from text, or follow one that it has never been taught. The held-out
constraints are a task of their own, `instructions_held_out`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipelines.data.easy_vqa import INSTRUCTIONS_BY_SET
from redux.benchmarks import Metric
from redux.benchmarks.instructions import select_tasks
from redux.instructions import INSTRUCTIONS

SPLIT_METRICS = ("strict", "loose")
"""Metrics, means over tasks, that are split."""


def list_taught(job: Mapping[str, Any]) -> frozenset[str]:
    """List the ids of the instructions that the training sets of a job teach.

    Only sets of this project are known (`INSTRUCTIONS_BY_SET`); for a set under another name nothing is known.

    Args:
        job: content of a job file.
    """
    data = [stage["data"] for stage in (job.get("train") or {}).values()]
    sets = {name for mixture in data for name in ([mixture] if isinstance(mixture, str) else mixture)}
    return frozenset(id for name in sets for id in INSTRUCTIONS_BY_SET.get(name, ()))


def split_by_teaching(metrics: Mapping[str, Metric], taught: Collection[str]) -> dict[str, Metric]:
    """Split "TASK.strict" and "TASK.loose" of tasks with the sixteen instructions into taught and untaught ones.

    Args:
        metrics: metrics of a run, by task and name, such as "instructions.strict".
        taught: ids of the taught instructions. For several runs in one table, pass those that any of them taught, so
            that all runs have the same items.

    Returns:
        "TASK.strict_taught" and "TASK.strict_untaught", and the same for loose; without those that have no items.
    """
    parts = {"taught": taught, "untaught": INSTRUCTIONS.keys() - set(taught)}
    split = {
        f"{name}_{part}": select_tasks(metric, ids)
        for name, metric in metrics.items()
        if name.partition(".")[0].startswith("instructions") and name.partition(".")[2] in SPLIT_METRICS
        for part, ids in parts.items()
    }
    return {name: metric for name, metric in split.items() if metric}


def add_split_metrics(
    metrics: Sequence[Mapping[str, Metric]], jobs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Metric]]:
    """Add the metrics of `split_by_teaching` to those of several runs, by what any of their jobs teaches.

    Args:
        metrics: metrics of each run.
        jobs: the job that trained each run.
    """
    taught = frozenset(id for job in jobs for id in list_taught(job))
    return [{**run_metrics, **split_by_teaching(run_metrics, taught)} for run_metrics in metrics]
