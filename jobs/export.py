"""A model to load with `from_pretrained`: a checkpoint of a run, or a model folder with names that need converting."""

import tempfile
from contextlib import suppress
from pathlib import Path

from jobs import schema
from jobs.claims import JOB
from jobs.run import plans
from pipelines.core import failures, storage
from pipelines.training import checkpoint, export
from redux import conversion, processor


def write(source: Path, stage: str | None, step: int | None, out: str) -> str:
    """Write a model to a folder or URL; returns where its weights come from.

    Args:
        source: the folder of a run, or that of a model whose weights were saved by a wrapper or by LLaVA itself.
        stage: of the run; None is the last one.
        step: a checkpointed one; None is the newest.

    Raises:
        ValueError: there is no such run, model, stage or checkpoint, the checkpoint is damaged, or `out` holds files.
    """
    if export.finished(out) or storage.names(out):
        raise ValueError(f"out: got {out}, which holds files, allowed: an empty or new folder")
    try:
        return _write(source, stage, step, out)
    except BaseException:  # what is there of it would be in the way of the same command
        with suppress(OSError, ValueError):
            storage.remove_folder(out)
        raise


def _write(source: Path, stage: str | None, step: int | None, out: str) -> str:
    if (source / JOB).exists():
        return _write_checkpoint(source, stage, step, out)
    if not (source / "config.json").exists():
        raise ValueError(f"{source}: no {JOB} or config.json, allowed: the folder of a run or of a model")
    if stage or step is not None:
        raise ValueError(f"{source}: got a stage or a step, allowed: none for the folder of a model")
    model, tokenizer = conversion.convert_checkpoint(source)
    config = model.config
    with tempfile.TemporaryDirectory() as folder, failures.locate_errors(folder):
        if config.conversation_template and config.image_aspect_ratio:
            processor.record_training_format(model, tokenizer, config.conversation_template, config.image_aspect_ratio)
            processor.build_processor(config, tokenizer).save_pretrained(folder)
        else:
            tokenizer.save_pretrained(folder)
        model.save_pretrained(folder, max_shard_size=export.SHARD)
        export.upload(Path(folder), out, str(source))
    return str(source)


def _write_checkpoint(run: Path, stage: str | None, step: int | None, out: str) -> str:
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
    export.write(plan, steps[wanted], out)
    return steps[wanted].url
