"""Export of a checkpoint to a folder that `from_pretrained` opens: the result of a stage, or the model after any step.

Both take the same way: build the model before the first step, and replace its trained weights by those of the
checkpoint. The export runs without DeepSpeed in one process, so ZeRO-3 weights need no gathering. It needs memory for
the model as it is stored, and 4 bytes more per trained parameter.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoTokenizer

from pipelines.core import failures, storage
from pipelines.training import checkpoint, engine
from pipelines.training.checkpoint import DamagedError
from pipelines.training.files import MANIFEST
from pipelines.training.plan import StagePlan
from redux import processor
from redux.model import ReduxForConditionalGeneration

MAX_SHARD_SIZE = "1GB"
"""Largest size of a file of the model. Each file is uploaded from memory, within the deadline of the storage."""

AddFiles = Callable[[Path], None]
"""Function that adds files, such as a model card, to a folder that is complete except for them."""


def export_result(plan: StagePlan, cursor: int) -> None:
    """Export the result of a stage, its model and tokenizer after so many steps. ValueError as `export_checkpoint`."""
    try:
        saved = checkpoint.read_checkpoint(storage.join(plan.folder, checkpoint.format_step_name(cursor)))
    except DamagedError as error:
        raise ValueError(str(error)) from None
    export_checkpoint(plan, saved, plan.result)


def export_checkpoint(
    plan: StagePlan, saved: checkpoint.SavedCheckpoint, out: str, add_files: AddFiles | None = None
) -> None:
    """Export the model of a checkpoint with its tokenizer and processor, in the precision of the stage.

    Args:
        plan: plan of the stage that wrote the checkpoint.
        saved: the checkpoint.
        out: folder or URL.
        add_files: adds files to the local folder before it is uploaded.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    model = engine.extract_model(_load_trained(plan, saved), plan).to(engine.DTYPES[plan.stage.precision])
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer)

    # save_pretrained writes local files only, so write a temporary folder and upload it.
    with tempfile.TemporaryDirectory() as folder, failures.locate_errors(folder):
        if isinstance(model, ReduxForConditionalGeneration):
            processor.record_training_format(model, tokenizer, plan.template, plan.image_aspect_ratio)
            processor.build_processor(model.config, tokenizer).save_pretrained(folder)
        else:
            tokenizer.save_pretrained(folder)
        # save_pretrained imports DeepSpeed if it is installed.
        engine.import_deepspeed()
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        if add_files:
            add_files(Path(folder))
        upload_folder(Path(folder), out, saved.url)


def export_adapter(
    plan: StagePlan, saved: checkpoint.SavedCheckpoint, out: str, base: str, add_files: AddFiles | None = None
) -> None:
    """Export what a stage with LoRA trained, in the format of PEFT, with configuration, tokenizer and processor.

    Args:
        plan: plan of the stage that wrote the checkpoint.
        saved: the checkpoint.
        out: folder or URL.
        base: folder, hub id or URL of the model from which the stage started.
        add_files: adds files to the local folder before it is uploaded.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    from pipelines.training import lora

    module = _load_trained(plan, saved)
    assert isinstance(module, engine.LlavaWithLoss)
    assert plan.stage.lora
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer)
    other_parts = [part for part in plan.stage.learning_rate if part != "language"]
    with tempfile.TemporaryDirectory() as folder, failures.locate_errors(folder):
        processor.record_training_format(module.llava, tokenizer, plan.template, plan.image_aspect_ratio)
        processor.build_processor(module.llava.config, tokenizer).save_pretrained(folder)
        for settings in (module.llava.config, module.llava.generation_config):
            settings.save_pretrained(folder)
        lora.save_adapters(module.llava, plan.stage.lora, other_parts, base, Path(folder))
        if add_files:
            add_files(Path(folder))
        upload_folder(Path(folder), out, saved.url)


def _load_trained(plan: StagePlan, saved: checkpoint.SavedCheckpoint) -> engine.ModuleWithLoss:
    """Rebuild the model before the first step, and load the trained weights into it; ValueError if they are damaged."""
    module, parts = engine.build_module(plan)
    trained_ids = {id(parameter) for part in plan.stage.learning_rate for parameter in parts[part]}
    trained = {name: parameter for name, parameter in module.named_parameters() if id(parameter) in trained_ids}
    try:
        weights = checkpoint.load_weights(saved, {name: parameter.shape for name, parameter in trained.items()})
    except DamagedError as error:
        raise ValueError(str(error)) from None
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    return module


def upload_folder(folder: Path, out: str, source: str) -> None:
    """Upload the files of a local folder, and last a manifest. After an error, remove the files that were uploaded.

    Args:
        folder: local folder.
        out: target folder or URL.
        source: origin of the model, for the manifest.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    try:
        for path in files:
            storage.write(storage.join(out, path.name), path.read_bytes())
        # The manifest comes last: is_complete looks for it.
        sizes = {path.name: path.stat().st_size for path in files}
        storage.write(storage.join(out, MANIFEST), json.dumps({"from": source, "files": sizes}).encode())
    except BaseException:
        # Clean up, so that the same command finds an empty folder when it is repeated.
        for path in files:
            with suppress(OSError, ValueError):
                storage.remove(storage.join(out, path.name))
        raise
