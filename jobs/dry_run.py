"""The stages of a job before it has run: what their workers would read, without Ray and without a training step.

Everything that exists in the run folder is used. What a run would make first is made here in memory or in a temporary
folder: its sets, and the tokenizer. No weights are read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jobs import document, ownership, schema
from jobs.layout import locate_sets
from jobs.model_parts import find_assembled
from jobs.run import TOKENIZER, list_word_sets, plan_stages, train_tokenizer
from jobs.schema import Job
from pipelines.core.settings import KEYS_WITHOUT_EFFECT, is_in_sections
from pipelines.data import easy_vqa
from pipelines.data.options import ShardOptions
from pipelines.data.shard_index import Shards, is_finished
from pipelines.data.sources.opened import RecordSource
from pipelines.data.unmade import UnmadeShards
from pipelines.training.files import ASSEMBLED_FOLDER, JOB_FILE
from pipelines.training.plan import StagePlan, StageWork
from redux.hub import local_copy
from redux.pretrained import load_assembled_tokenizer

SECTIONS_OF_TRAINING = ("data", "model", "train", "seed")
"""Sections of a job on which samples and weights depend."""


def load_job(path: Path, overrides: Sequence[str]) -> Job:
    """Load a job; ValueError for a study or a search, which have several."""
    tree = document.read_tree(path)
    for key, kind in (("variants", "a study"), ("space", "a search")):
        if isinstance(tree, dict) and key in tree:
            raise document.JobError(f"{path}: got {kind}, allowed: a job; its runs have job files, RUN/{JOB_FILE}")
    return schema.load(path, overrides)


@contextmanager
def open_stages(job: Job, folder: Path) -> Iterator[dict[str, StageWork]]:
    """Open the stages of a job by name, in order. A tokenizer that was made for it is deleted afterwards.

    Args:
        job: the job, resolved.
        folder: run folder; it need not exist.

    Raises:
        ValueError: a set, the tokenizer or a configuration cannot be read.
    """
    plans = plan_stages(job, folder)
    sources = open_sets(job, folder)
    with TemporaryDirectory() as temporary:
        tokenizers = _find_tokenizers(job, folder, plans, sources, Path(temporary))
        result = {}
        for name, plan in plans.items():
            plan = replace(plan, tokenizer=tokenizers[plan.tokenizer])
            mixture = {source: sources[source] for source in plan.stage.mixture}
            if any(isinstance(shards, UnmadeShards) for shards in mixture.values()):
                plan = replace(plan, features={})  # Features of a set can only be written when it is made
            for source, shards in mixture.items():
                plan.check_prepared(source, shards.prepared_format)
            # Images are shown and checked, also where training reads stored features.
            reader = replace(plan.build_reader(mixture), features={})
            result[name] = StageWork(plan, reader, plan.count_steps(reader.order))
        yield result


def belongs_to_run(job: Job, folder: Path) -> bool:
    """Return True if the run folder has this job: samples and weights in it are those that the job would make."""
    if not (folder / JOB_FILE).exists():
        return False
    changes = ownership.find_changes(folder / JOB_FILE, job)
    return not any(
        is_in_sections(key, SECTIONS_OF_TRAINING) and not is_in_sections(key, KEYS_WITHOUT_EFFECT) for key in changes
    )


def open_sets(job: Job, folder: Path) -> dict[str, Shards]:
    """Open the sets on which the stages of a job train, by name. Sets that are not made yet are opened as records."""
    urls = locate_sets(job, folder)
    return {name: _open_set(job, folder, name, url) for name, url in urls.items() if name in job.trained_sets}


def _open_set(job: Job, folder: Path, name: str, url: str) -> Shards:
    if name in job.generated_sets:
        if belongs_to_run(job, folder) and is_finished(url):
            return Shards(url)
        options = ShardOptions(samples_per_shard=job.data.samples_per_shard)
        return UnmadeShards(easy_vqa.EASY_VQA_SETS[name](), str(easy_vqa.PACKAGE_IMAGES), options)
    source = job.data.make.get(name)
    if source is None or is_finished(url):
        return Shards(url)
    options = ShardOptions(**{field.name: getattr(source, field.name) for field in fields(ShardOptions)})
    record_source = RecordSource(source)
    return UnmadeShards(record_source, record_source.images, options)


def _find_tokenizers(
    job: Job, folder: Path, plans: dict[str, StagePlan], sources: dict[str, Shards], temporary: Path
) -> dict[Path, Path]:
    """Find or make the tokenizer of each stage, by its path in the run folder."""
    result = {}
    for path in dict.fromkeys(plan.tokenizer for plan in plans.values()):
        tokenizer = find_tokenizer(job, folder, path)
        if tokenizer is None:
            tokenizer = temporary / path.name
            _make_tokenizer(job, path, sources).save_pretrained(tokenizer)
        result[path] = tokenizer
    return result


def find_tokenizer(job: Job, folder: Path, path: Path | None = None) -> Path | None:
    """Find the tokenizer that the run has made; None if there is none, or that of another job.

    Args:
        job: the job, resolved.
        folder: run folder.
        path: its path in the run folder; None for that of the language model.
    """
    path = path or folder / (ASSEMBLED_FOLDER if job.model.has_pretrained_language else TOKENIZER)
    if path.name == ASSEMBLED_FOLDER:
        return find_assembled(job, folder)
    return path if path.exists() and belongs_to_run(job, folder) else None


def _make_tokenizer(job: Job, path: Path, sources: dict[str, Shards]) -> PreTrainedTokenizerBase:
    """Make the tokenizer that the run would make at a path."""
    model = job.model
    if path.name == TOKENIZER:
        return train_tokenizer(job, [sources[name].iterate_records() for name in sorted(list_word_sets(job))])
    if model.checkpoint:
        with local_copy(model.checkpoint, label="checkpoint", skips_weights=True) as copy:
            return AutoTokenizer.from_pretrained(copy)
    return load_assembled_tokenizer(str(model.language), model.gguf_file)
