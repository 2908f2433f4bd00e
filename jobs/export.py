"""Export a model as a complete folder: from a checkpoint of a run, or from a model folder with other weight names.

A run's folder has a model card. Its scores are those of the run's answers if the checkpoint is the one that the run
evaluates.
"""

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs import schema
from jobs.layout import locate_sets, require_folder
from jobs.run import plan_stages
from jobs.schema import Job
from jobs.tables import find_scorer
from pipelines.core import failures, storage
from pipelines.report import model_card
from pipelines.report.model_card import ExportedModel
from pipelines.training import checkpoint, export, lora
from pipelines.training.checkpoint import SavedCheckpoint
from pipelines.training.files import JOB_FILE, MANIFEST, is_complete
from pipelines.training.plan import StagePlan
from redux import conversion, processor
from redux.configuration import ReduxConfig

ExportTarget = Literal["hf", "vllm"]

EXPORTS_FOLDER = "exports"
"""Folder of exports in a run folder, if the user names no other."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    Args:
        to: "hf" writes a folder for transformers; "vllm" the same folder after checks, with vLLM first on its card.
        adapter: write the adapters of a stage with LoRA instead of the merged model.
    """

    to: ExportTarget = "hf"
    adapter: bool = False

    def __post_init__(self) -> None:
        if self.adapter and self.to == "vllm":
            raise ValueError("--adapter: got --to vllm, allowed: --to hf, because vLLM reads the merged model")

    @property
    def form(self) -> model_card.CardForm:
        """Kind of the folder."""
        return "adapter" if self.adapter else self.to


def export_model(
    source: Path, stage: str | None, step: int | None, out: str | None, options: ExportOptions = ExportOptions()
) -> tuple[str, str]:
    """Write a model to a folder or URL.

    Args:
        source: folder of a run, or of a model whose weights a wrapper or LLaVA itself saved.
        stage: training stage of the run; None is the last one.
        step: step of the checkpoint; None is the newest.
        out: folder or URL, empty or new; None is a folder in the run folder.
        options: form of the export.

    Returns:
        The folder or URL of the export, and that from which the weights come.

    Raises:
        ValueError: no such run, model, stage or checkpoint exists, the checkpoint is damaged, or `out` holds files.
    """
    require_folder(source, "FOLDER", "the folder of a run or of a model")
    if out is None:
        if not (source / JOB_FILE).exists():
            raise ValueError(f"--out: missing, allowed: a folder or URL, because {source} is not a run folder")
        out = str(source / EXPORTS_FOLDER / options.form)
    if is_complete(out) or storage.list_files(out):
        raise ValueError(f"out: got {out}, which holds files, allowed: an empty or new folder")
    try:
        return out, _export_folder(source, stage, step, out, options)
    except BaseException:  # An incomplete model would block the same command
        with suppress(OSError, ValueError):
            storage.remove_folder(out)
        raise


def _export_folder(source: Path, stage: str | None, step: int | None, out: str, options: ExportOptions) -> str:
    if (source / JOB_FILE).exists():
        return _export_checkpoint(source, stage, step, out, options)
    if not (source / "config.json").exists():
        raise ValueError(f"{source}: no {JOB_FILE} or config.json, allowed: the folder of a run or of a model")
    if stage or step is not None:
        raise ValueError(f"{source}: got a stage or a step, allowed: none for the folder of a model")
    if options.adapter:
        raise ValueError(f"--adapter: got the model {source}, allowed: the folder of a run that trained adapters")
    model, tokenizer = conversion.convert_checkpoint(source)
    config = model.config
    if options.to == "vllm" and not config.conversation_template:
        raise ValueError(f"--to: got vllm for {source}, whose conversation template is unknown, allowed: hf")
    with tempfile.TemporaryDirectory() as folder, failures.locate_errors(folder):
        if config.conversation_template and config.image_aspect_ratio:
            processor.record_training_format(model, tokenizer, config.conversation_template, config.image_aspect_ratio)
            processor.build_processor(config, tokenizer).save_pretrained(folder)
        else:
            tokenizer.save_pretrained(folder)
        model.save_pretrained(folder, max_shard_size=export.MAX_SHARD_SIZE)
        # Written here first: transformers can save to a local folder only, and `out` may be a URL.
        export.upload_folder(Path(folder), out, str(source))
    return str(source)


def _export_checkpoint(run: Path, stage: str | None, step: int | None, out: str, options: ExportOptions) -> str:
    job = schema.load(run / JOB_FILE)
    plans = plan_stages(job, run.resolve())
    if not plans:
        raise ValueError(f"{run}: this run only evaluates, allowed: the folder of a run with training stages")
    name = stage or list(plans)[-1]
    if name not in plans:
        raise ValueError(f"stage: got {name}, allowed: {', '.join(plans)}")
    plan = plans[name]
    _check_form(job, plan, options)
    saved = _choose_checkpoint(plan, step)
    base = _find_base(job, plans, name) if options.adapter else None

    def add_card(folder: Path) -> None:
        if plan.stage.objective == "contrastive":
            return  # A CLIP, which is not a model of this library
        model = ExportedModel(
            run=run,
            stage=name,
            step=saved.manifest.cursor,
            is_last=_is_evaluated(plans, name, saved),
            form=options.form,
            out=out,
            config=ReduxConfig.from_pretrained(folder),
            dtype={"fp32": "float32", "bf16": "bfloat16"}[plan.stage.precision],
            sets=locate_sets(job, run.resolve()),
            workers=saved.manifest.workers,
            trained_model=plan.result,
            base=base,
        )
        text = model_card.render_card(model, find_scorer)
        (folder / model_card.CARD_FILE).write_text(text, encoding="utf-8")

    if base:
        export.export_adapter(plan, saved, out, base, add_card)
    else:
        export.export_checkpoint(plan, saved, out, add_card)
    return saved.url


def _check_form(job: Job, plan: StagePlan, options: ExportOptions) -> None:
    """Raise a ValueError unless the model of a stage can be exported in this form."""
    if options.adapter and not plan.stage.lora:
        with_lora = [name for name, stage in job.train.items() if stage.lora]
        allowed = f"--stage {with_lora[-1]}" if with_lora else "no --adapter, which writes the whole model"
        raise ValueError(f"--adapter: got stage {plan.name}, which trained no LoRA adapters, allowed: {allowed}")
    if options.adapter:
        lora.require_peft("--adapter")
    if options.to == "vllm" and (plan.stage.objective == "contrastive" or plan.template == "plain"):
        raise ValueError(f"--to: got vllm for stage {plan.name}, which learns no conversations, allowed: hf")


def _choose_checkpoint(plan: StagePlan, step: int | None) -> SavedCheckpoint:
    """Choose the checkpoint after a step, or the newest one; ValueError if there is none."""
    # Damaged checkpoints are listed too, but not as SavedCheckpoint.
    entries = checkpoint.list_newest_first(plan.folder)
    by_step = {entry.manifest.cursor: entry for entry in entries if isinstance(entry, SavedCheckpoint)}
    chosen_step = max(by_step, default=0) if step is None else step
    if chosen_step not in by_step:
        allowed = ", ".join(map(str, sorted(by_step))) or f"none: {plan.folder} has no complete checkpoint"
        raise ValueError(f"step: got {chosen_step}, allowed: {allowed}")
    return by_step[chosen_step]


def _find_base(job: Job, plans: Mapping[str, StagePlan], stage: str) -> str:
    """Find the model to which the adapters of a stage belong, if possible one that exists outside of the run."""
    start = plans[stage].start
    if start is None:
        raise ValueError(
            f"--adapter: got stage {stage}, which started from random weights, allowed: one that starts from a model"
        )
    # The first stage starts from a copy of the checkpoint, which has the same weights.
    return job.model.checkpoint if job.model.checkpoint and stage == next(iter(plans)) else start


def _is_evaluated(plans: Mapping[str, StagePlan], stage: str, saved: SavedCheckpoint) -> bool:
    """Return True if the run evaluates this checkpoint: it is that of the model of the last stage."""
    plan = plans[stage]
    if stage != list(plans)[-1] or not is_complete(plan.result):
        return False
    source = json.loads(storage.read(storage.join(plan.result, MANIFEST)))["from"]
    # The run folder may have been moved since.
    return str(source).rpartition("/")[2] == checkpoint.format_step_name(saved.manifest.cursor)
