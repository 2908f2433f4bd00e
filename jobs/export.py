"""Export a model for `from_pretrained`: from a checkpoint of a run, or from a model folder with other weight names."""

import tempfile
from contextlib import suppress
from pathlib import Path

from jobs import schema
from jobs.run import plan_stages
from pipelines.core import failures, storage
from pipelines.training import checkpoint, export
from pipelines.training.checkpoint import JOB_FILE
from redux import conversion, processor


def export_model(source: Path, stage: str | None, step: int | None, out: str) -> str:
    """Write a model to a folder or URL.

    Args:
        source: folder of a run, or of a model whose weights a wrapper or LLaVA itself saved.
        stage: training stage of the run; None is the last one.
        step: step of the checkpoint; None is the newest.
        out: folder or URL, empty or new.

    Returns:
        The folder or URL that the weights come from.

    Raises:
        ValueError: no such run, model, stage or checkpoint exists, the checkpoint is damaged, or `out` holds files.
    """
    if export.is_complete(out) or storage.list_files(out):
        raise ValueError(f"out: got {out}, which holds files, allowed: an empty or new folder")
    try:
        return _export_folder(source, stage, step, out)
    except BaseException:  # an incomplete model would block the same command
        with suppress(OSError, ValueError):
            storage.remove_folder(out)
        raise


def _export_folder(source: Path, stage: str | None, step: int | None, out: str) -> str:
    if (source / JOB_FILE).exists():
        return _export_checkpoint(source, stage, step, out)
    if not (source / "config.json").exists():
        raise ValueError(f"{source}: no {JOB_FILE} or config.json, allowed: the folder of a run or of a model")
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
        model.save_pretrained(folder, max_shard_size=export.MAX_SHARD_SIZE)
        # written here first: transformers can save to a local folder only, and `out` may be a URL
        export.upload_folder(Path(folder), out, str(source))
    return str(source)


def _export_checkpoint(run: Path, stage: str | None, step: int | None, out: str) -> str:
    stages = plan_stages(schema.load(run / JOB_FILE), run.resolve())
    if not stages:
        raise ValueError(f"{run}: this run only evaluates, allowed: the folder of a run with training stages")
    name = stage or list(stages)[-1]
    if name not in stages:
        raise ValueError(f"stage: got {name}, allowed: {', '.join(stages)}")
    plan = stages[name]
    # damaged checkpoints are listed too, but not as SavedCheckpoint
    entries = checkpoint.list_newest_first(plan.folder)
    by_step = {entry.manifest.cursor: entry for entry in entries if isinstance(entry, checkpoint.SavedCheckpoint)}
    chosen_step = max(by_step, default=0) if step is None else step
    if chosen_step not in by_step:
        allowed = ", ".join(map(str, sorted(by_step))) or f"none: {plan.folder} has no complete checkpoint"
        raise ValueError(f"step: got {chosen_step}, allowed: {allowed}")
    export.export_checkpoint(plan, by_step[chosen_step], out)
    return by_step[chosen_step].url
