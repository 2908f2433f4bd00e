"""Show what a job trains on before it is trained: some samples of each set, as a page or in the terminal."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from jobs import model_parts
from jobs.chat import PICTURE_COLUMNS, format_picture
from jobs.dry_run import belongs_to_run, load_job, open_stages
from jobs.layout import find_model, locate_model
from jobs.resolve import resolve_job
from jobs.schema import Job
from pipelines.core import storage
from pipelines.data.options import Data
from pipelines.data.preview import PreviewSample, draw_rows, draw_samples, read_stored
from pipelines.data.shard_index import Shards, is_finished
from pipelines.data.unmade import UnmadeShards
from pipelines.report import page
from pipelines.report.sample_view import (
    SetView,
    StageView,
    format_stages,
    render_page,
    view_sample,
    view_stored,
    view_template,
)
from pipelines.training.files import JOB_FILE, is_complete
from pipelines.training.plan import StagePlan, StageWork
from pipelines.training.stage import DEFAULT_IMAGE_ASPECT_RATIO, DEFAULT_TEMPLATE, Stage
from redux.architecture import LanguageSizes, ModelSettings
from redux.configuration import ReduxConfig, build_config
from redux.conversation import TEMPLATES
from redux.hub import describe_missing
from redux.model import ReduxModel, normalize_pixels
from redux.pretrained import configure_checkpoint, load_image_encoder
from redux.trace import ImageTrace

SET_IMAGE_SIZE = 336
"""Side of the images of a set that is shown without a model."""

NO_RUN = os.path.join(os.devnull, "run")
"""Path of a run folder that cannot exist."""

ENCODE_BATCH_SIZE = 4
"""Images that the tower encodes together: little memory beside its weights."""


class PreviewEncoder(NamedTuple):
    """Image tower of a stage, or the reason why no patches are shown.

    Args:
        model: the tower with its compression; None for no pictures.
        note: whose tower it is, or why there is none.
    """

    model: ReduxModel | None
    note: str


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """Options of `redux look`, see its help.

    Args:
        source: job file, folder of a run, or folder or URL of shards.
        overrides: values of the job file to replace.
        text: print to the terminal instead of writing a page.
        out: the page; None for look-NAME.html.
        samples: samples of each set.
        seed: seed of the draw.
        model: LLaVA that shall be trained on a set.
        runs_dir: folder of the run folders.
    """

    source: str
    overrides: Sequence[str]
    text: bool
    out: Path | None
    samples: int
    seed: int
    model: str | None
    runs_dir: Path


def look(options: LookOptions) -> str:
    """Show samples of a job or of a set.

    Returns:
        The text for the terminal, or the path of the page.

    Raises:
        ValueError: there is no such job or set, or it cannot be read.
    """
    title, lead, stages = _collect(options)
    if options.text:
        draw = _draw if sys.stdout.isatty() else None
        return f"{title}: {lead}\n\n{format_stages(stages, draw)}"
    out = options.out or Path(f"look-{title}.html")
    return str(page.write(out, render_page(title, lead, stages)))


def _collect(options: LookOptions) -> tuple[str, str, list[StageView]]:
    """Collect what is shown: a title, a sentence about it, and the stages."""
    path = Path(options.source)
    # A job is a file, or the folder of its run.
    if options.source.endswith((".yaml", ".yml")):
        return _collect_job(options, path, run=None)
    if (path / JOB_FILE).exists():
        return _collect_job(options, path / JOB_FILE, run=path)
    if is_finished(options.source):
        return _collect_set(options)
    missing = "" if "://" in options.source or path.is_dir() else f"; {describe_missing(options.source)}"
    raise ValueError(
        f"JOB|SET: got {options.source}, allowed: a job file (.yaml), the folder of a run, or a folder or URL of "
        "shards; redux shards make or index makes shards" + missing
    )


def _collect_job(options: LookOptions, path: Path, run: Path | None) -> tuple[str, str, list[StageView]]:
    """Collect the samples of a job. `run` is its run folder; None for that of its name."""
    if options.model:
        raise ValueError(f"--model: got {options.model} with a job, allowed: with a set of shards")
    job = load_job(path, options.overrides)
    if not job.train:
        raise ValueError(
            f"{options.source}: train: got no stages, allowed: at least one, because samples are shown by stage"
        )
    folder = run or options.runs_dir / job.name
    stages = look_at_job(job, folder.resolve(), options.samples, options.seed)
    lead = f"Samples of each set as {options.source} trains on them, drawn with seed {options.seed}."
    return job.name, lead, stages


def _collect_set(options: LookOptions) -> tuple[str, str, list[StageView]]:
    """Collect the samples of a set, as a model would be trained on them if one is named."""
    source, model, seed = options.source, options.model, options.seed
    if options.overrides:
        raise ValueError(f"{options.overrides[0]}: got a value for a set of shards, allowed: with a job file")
    title = source.rstrip("/").rpartition("/")[2]
    if not model:
        stage = look_at_set(source, title, options.samples, seed)
        return title, f"Samples of {source}, drawn with seed {seed}. --model MODEL shows their tokens.", [stage]
    job = build_fine_tuning(source, title, find_model(model))
    stages = [_without_steps(stage) for stage in look_at_job(job, Path(NO_RUN), options.samples, seed)]
    return title, f"Samples of {source} as fine-tuning of {model} gets them, drawn with seed {seed}.", stages


def _without_steps(stage: StageView) -> StageView:
    """Leave out the steps of a stage that no job has."""
    facts = {name: value for name, value in stage.facts.items() if name != "steps"}
    sets = tuple(
        replace(set_view, samples=tuple(replace(sample, position="") for sample in set_view.samples))
        for set_view in stage.sets
    )
    return replace(stage, facts=facts, sets=sets)


def build_fine_tuning(source: str, name: str, model: str) -> Job:
    """Build a job that fine-tunes a model on one set, with the template and the images of the model."""
    stage = Stage(
        objective="language",
        data=name,
        epochs=1,
        global_batch_size=1,
        micro_batch_size=1,
        learning_rate={"projector": 1e-3},
    )
    settings = ModelSettings(checkpoint=model)
    return Job(name="look", data=Data(source=None, sets={name: source}), model=settings, train={"fine-tuning": stage})


def look_at_job(job: Job, folder: Path, samples: int, seed: int) -> list[StageView]:
    """Collect samples of each set of each stage.

    Args:
        job: the job as loaded.
        folder: run folder, which need not exist.
        samples: number of samples of each set.
        seed: seed of the draw.
    """
    job = resolve_job(job, folder)
    with open_stages(job, folder) as stages:
        return [_view_stage(job, folder, work, samples, seed) for work in stages.values()]


def _view_stage(job: Job, folder: Path, work: StageWork, samples: int, seed: int) -> StageView:
    plan, reader = work.plan, work.reader
    template = plan.load_template() if plan.stage.objective == "language" else None
    encoder = find_encoder(job, folder, plan)
    sets = []
    for name, shards in reader.sources.items():
        drawn_samples = list(draw_samples(reader, name, samples, seed, work.steps))
        pictures = draw_pictures(encoder.model, drawn_samples)
        views = tuple(
            view_sample(sample, reader, template, plan.image_tokens, plan.stage.max_length, picture)
            for sample, picture in zip(drawn_samples, pictures, strict=True)
        )
        sets.append(SetView(name=name, facts=_describe_set(plan, name, shards, len(drawn_samples)), samples=views))
    return StageView(
        name=plan.name,
        facts=_describe_stage(work, encoder),
        template=view_template(template, reader.get_tokenizer().eos_token) if template else (),
        sets=tuple(sets),
    )


def _describe_set(plan: StagePlan, name: str, shards: Shards, num_drawn: int) -> tuple[str, ...]:
    shares = plan.stage.mixture
    share = f"{page.format_percent(shares[name] / sum(shares.values()))} of each batch" if len(shares) > 1 else ""
    where = "not made yet: its records are read" if isinstance(shards, UnmadeShards) else shards.folder
    facts = (f"{num_drawn} of {len(shards):,} samples", share, where)
    return tuple(filter(None, facts))


def _describe_stage(work: StageWork, encoder: PreviewEncoder) -> dict[str, str]:
    """Describe the settings that decide what a sample becomes."""
    plan, stage, tokenizer = work.plan, work.plan.stage, work.reader.get_tokenizer()
    facts: dict[str, str] = {"objective": stage.objective}
    if stage.objective == "language":
        facts["template"] = plan.template
        facts["length"] = (
            f"at most {stage.max_length:,} tokens; the rest is cut off"
            if stage.max_length
            else f"longer samples than {tokenizer.model_max_length:,} tokens are replaced"
        )
    facts["image"] = f"{plan.image_size} × {plan.image_size} pixels, {plan.image_aspect_ratio}"
    if stage.objective == "language":
        facts["image tokens"] = f"{plan.image_tokens:,} for each image"
    changes = [f"at most {stage.max_rounds} rounds, shuffled"] if stage.max_rounds else []
    changes += ["images mirrored with probability 0.5"] if stage.random_flip else []
    if changes:
        facts["augmentation"] = "; ".join(changes)
    return facts | {"steps": f"{work.steps:,}, each with {stage.global_batch_size:,} samples", "patches": encoder.note}


def look_at_set(source: str, name: str, samples: int, seed: int) -> StageView:
    """Collect samples of a set without a model: stored images, and the text with the default template."""
    shards, template = Shards(source), TEMPLATES[DEFAULT_TEMPLATE]
    size, image_aspect_ratio = shards.prepared_format or (SET_IMAGE_SIZE, DEFAULT_IMAGE_ASPECT_RATIO)
    rows = draw_rows(shards, samples, seed)
    views = tuple(
        view_stored(row, stored, template, size, image_aspect_ratio)
        for row, stored in zip(rows, read_stored(shards, rows), strict=True)
    )
    return StageView(
        name="stored samples",
        facts={
            "template": f"{DEFAULT_TEMPLATE}, the default",
            "image": f"{size} × {size} pixels, {image_aspect_ratio}",
        },
        template=view_template(template),
        sets=(SetView(name=name, facts=(f"{len(rows)} of {len(shards):,} samples", source), samples=views),),
    )


# --- pictures of patches ---------------------------------------------------------------------------------------------


def find_encoder(job: Job, folder: Path, plan: StagePlan) -> PreviewEncoder:
    """Find the image tower that shows which patches a stage keeps: that after it, or else that with which it starts."""
    if plan.stage.objective == "contrastive":
        return PreviewEncoder(None, "the contrastive objective sees all patches")
    try:
        return _load_encoder(job, folder, plan)
    except (OSError, ValueError) as error:
        return PreviewEncoder(None, f"not shown, because the tower cannot be loaded: {' '.join(str(error).split())}")


def _load_encoder(job: Job, folder: Path, plan: StagePlan) -> PreviewEncoder:
    config = _configure(job, folder)
    patches, tokens = config.num_patches, config.num_visual_tokens
    if patches == tokens:
        return PreviewEncoder(None, f"all {patches:,} are kept")
    counts = f"{patches:,} become {tokens:,} tokens"
    # What the run has trained so far.
    if belongs_to_run(job, folder):
        for name in (plan.name, *list(job.train)[: list(job.train).index(plan.name)][::-1]):
            model = locate_model(job, folder, name)
            if is_complete(model) and storage.is_local(model):
                source = "checkpoint" if job.train[name].objective == "language" else "tower"
                return PreviewEncoder(
                    load_image_encoder(config, **{source: model}), f"{counts}, by the model after {name}"
                )
    if assembled := model_parts.find_assembled(job, folder):
        return PreviewEncoder(load_image_encoder(config, checkpoint=assembled), f"{counts}, by the pretrained tower")
    # Weights of whole models are large, so they are read only where they are.
    weights: Any = job.model.checkpoint or job.model.tower
    if not isinstance(weights, str):
        return PreviewEncoder(None, f"{counts}; not shown, because the tower is not trained yet")
    if not Path(weights).is_dir():
        return PreviewEncoder(None, f"{counts}; not shown, because {weights} is not a local folder")
    if job.model.checkpoint:
        return PreviewEncoder(load_image_encoder(config, checkpoint=weights), f"{counts}, by the checkpoint")
    return PreviewEncoder(load_image_encoder(config, tower=weights), f"{counts}, by the pretrained tower")


def _configure(job: Job, folder: Path) -> ReduxConfig:
    if isinstance(job.model.language, LanguageSizes):
        return build_config(job.model, vocab_size=8)
    if assembled := model_parts.find_assembled(job, folder):
        return configure_checkpoint(assembled)
    return model_parts.configure_model(job.model)


def draw_pictures(model: ReduxModel | None, samples: Sequence[PreviewSample]) -> list[Image.Image | None]:
    """Draw kept and merged patches of samples with an image; without a model none."""
    if model is None:
        return [None] * len(samples)
    images = {number: sample.image for number, sample in enumerate(samples) if sample.image is not None}
    pictures: dict[int, Image.Image] = {}
    for start in range(0, len(images), ENCODE_BATCH_SIZE):
        numbers = list(images)[start : start + ENCODE_BATCH_SIZE]
        values = np.stack([images[number].transpose(2, 0, 1) for number in numbers])
        with torch.inference_mode():
            _, assignment = model.encode_images(normalize_pixels(torch.from_numpy(values)))
        for number, token_of_patch, merged in zip(
            numbers, assignment.token_of_patch.numpy(), assignment.merged.numpy(), strict=True
        ):
            image = Image.fromarray(np.ascontiguousarray(images[number]))
            pictures[number] = ImageTrace(image, token_of_patch, merged).draw(SET_IMAGE_SIZE)
    return [pictures.get(number) for number in range(len(samples))]


def _draw(picture: Image.Image) -> str:
    return format_picture(picture, PICTURE_COLUMNS)
