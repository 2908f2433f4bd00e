"""The model after any step of a run that was checkpointed, as a folder that `from_pretrained` opens."""

from pathlib import Path

from jobs import schema
from jobs.run import JOB, plans
from pipelines import checkpoint, export, storage


def write(run: Path, stage: str | None, step: int | None, out: str) -> str:
    """Write it to a folder or URL; returns the checkpoint's URL.

    stage: of the run; None is the last one.  step: a checkpointed one; None is the newest.
    ValueError where there is no such run, stage or checkpoint, or the checkpoint is damaged.
    """
    if not (run / JOB).exists():
        raise ValueError(f"{run}: no {JOB}, allowed: the folder of a run")
    stages = plans(schema.load(run / JOB), run.resolve())
    name = stage or list(stages)[-1]
    if name not in stages:
        raise ValueError(f"stage: got {name}, allowed: {', '.join(stages)}")
    plan = stages[name]
    whole = [one for one in checkpoint.candidates(plan.folder) if isinstance(one, checkpoint.Saved)]
    steps = {one.manifest.cursor: one for one in whole}
    wanted = max(steps, default=0) if step is None else step
    if wanted not in steps:
        there = ", ".join(map(str, sorted(steps))) or f"none: {plan.folder} has no whole checkpoint"
        raise ValueError(f"step: got {wanted}, allowed: {there}")
    if export.finished(out) or storage.names(out):
        raise ValueError(f"out: got {out}, which holds files, allowed: an empty or new folder")
    export.write(plan, steps[wanted], out)
    return steps[wanted].url
