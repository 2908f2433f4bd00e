"""Model card of an exported model: README.md with YAML front matter, as the Hugging Face Hub shows it.

Everything comes from the run folder and the configuration of the model. A section says what is missing; for the effect
of CMAI at inference it has the command that measures it.

Cost: the answers of the run are scored, with a bootstrap for each metric; so are those of a run beside it that
evaluates the same model with CMAI off.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from pipelines.core import jsonl
from pipelines.core.words import pluralize
from pipelines.data.easy_vqa import EASY_VQA_SETS
from pipelines.data.shard_index import Shards, is_finished
from pipelines.evaluation.statistics import Difference, Interval, bootstrap_difference, bootstrap_interval
from pipelines.report import runs
from pipelines.report.columns import BENCHMARK_COLUMNS
from pipelines.report.cost_section import TEXT_TOKENS, CostLine, compare_cost
from pipelines.report.environment import ENVIRONMENT_FILE, read_versions
from pipelines.report.page import format_duration, format_number
from pipelines.report.runs import FinishedRun, ScorerFinder
from pipelines.training import ledger
from pipelines.training.files import JOB_FILE, METRICS_FILE, is_finished_run
from redux.benchmarks import Metric
from redux.configuration import ReduxConfig
from redux.hub import is_hub_id
from redux.settings import METHODS

CARD_FILE = "README.md"
TEMPLATE_FILE = "model_card.md.j2"
METHOD_TITLES = {"vmtc": "VMTC", "cmai": "CMAI", "reduction": "a reduction of image tokens"}

CardForm = Literal["hf", "vllm", "adapter"]


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """An exported model, for its card.

    Args:
        run: run folder.
        stage: stage that trained it.
        step: step of the stage.
        is_last: the model is that of the last checkpoint of the last stage, which the run evaluates.
        form: kind of the folder.
        out: folder or URL of the export.
        config: configuration of the model.
        dtype: dtype of its weights.
        sets: folder or URL of each set of shards, by name.
        workers: workers that wrote the checkpoint.
        trained_model: folder or URL of the model of the run, which its evaluation reads.
        base: model to which adapters belong.
    """

    run: Path
    stage: str
    step: int
    is_last: bool
    form: CardForm
    out: str
    config: ReduxConfig
    dtype: str
    sets: Mapping[str, str]
    workers: int
    trained_model: str
    base: str | None = None


class CardScore(NamedTuple):
    """A score as text."""

    name: str
    value: str
    interval: str
    questions: str


class CardDifference(NamedTuple):
    """Scores with CMAI on and off as text, and their difference."""

    name: str
    ours: str
    base: str
    difference: str
    interval: str
    is_noise: bool


def render_card(model: ExportedModel, find_scorer: ScorerFinder) -> str:
    """Render the card.

    Args:
        model: the model.
        find_scorer: finds the functions that score the answers of a task.

    Raises:
        ValueError: a file of the run cannot be read.
    """
    import jinja2

    # Answers are scored once; the sections below share the run.
    run = runs.read_run(model.run, find_scorer)
    job, config = run.job, model.config
    stages = _select_stages(job, model.stage)
    # Scores of another checkpoint of the run say nothing about this model.
    cmai_off = find_run_without_cmai(run, model, find_scorer) if model.is_last else None
    # Markdown needs no HTML escapes; `cell` keeps a text inside its cell of a table.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = format_cell
    text = environment.get_template(TEMPLATE_FILE).render(
        front_matter=write_front_matter(model, job, stages),
        title=f"{job['name']}, stage {model.stage}, step {model.step}",
        # The model, and the ways to ask it.
        methods=" and ".join(title for name, title in METHOD_TITLES.items() if getattr(config, name)),
        is_adapter=model.form == "adapter",
        form=model.form,
        folder=model.out,
        base=model.base,
        config=config,
        dtype=model.dtype,
        tokens_per_image=config.image_seq_length,
        plain_tokens=_count_plain_tokens(config),
        template_name=config.conversation_template,
        vllm_command=write_vllm_command(model.out, config),
        # Scores and the effect of CMAI.
        scores=list(list_scores(run.metrics)) if model.is_last else [],
        is_evaluated=model.is_last,
        has_scores=bool(run.metrics),
        differences=list(list_differences(run.metrics, cmai_off.metrics)) if cmai_off else [],
        cmai_off_command=write_cmai_off_command(run, model) if config.cmai and run.metrics and model.is_last else "",
        # Data and recipe.
        data=list(_list_data(run, model, stages)),
        parts=", ".join(f"`{part}`" for part in _list_parts(job)),
        stages=[_describe_stage(run.folder, name, stage) for name, stage in stages.items()],
        seed=run.seed,
        times=_describe_times(run.folder, stages),
        machine=describe_machine(run.folder, model.workers),
        code=describe_code(run.folder),
        # Settings, cost and limits.
        settings=list(_list_settings(config)),
        text_tokens=TEXT_TOKENS,
        cost=_list_costs(config),
        limits=list(_list_limits(run, model)),
    )
    # Conditions in the template leave empty lines.
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def write_front_matter(model: ExportedModel, job: Mapping[str, Any], stages: Mapping[str, Any]) -> str:
    """Write the YAML front matter. Without a licence: that of data and parts is unknown."""
    # The Hub links base_model to pages of its own, so folders are left out.
    bases = [part for part in _list_parts(job) if "/" in part and is_hub_id(part)]
    sets = {name: None for stage in stages.values() for name in _read_mixture(stage)}
    generated = job["data"].get("source")
    # Sets that the job makes of easy-VQA are one data set.
    datasets = dict.fromkeys(generated if generated and name in EASY_VQA_SETS else name for name in sets)
    fields = {
        "library_name": "peft" if model.form == "adapter" else "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": bases or None,
        "datasets": list(datasets) or None,
        "tags": ["llava", "redux", *(name for name in METHODS if getattr(model.config, name))],
    }
    metadata = {name: value for name, value in fields.items() if value}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"


def write_vllm_command(folder: str, config: ReduxConfig) -> str:
    """Write the command of vLLM that serves a folder; the plug-in refuses CMAI unless the command turns it off."""
    words = ["vllm", "serve", folder]
    return shlex.join([*words, "--hf-overrides", '{"cmai": null}'] if config.cmai else words)


def list_scores(metrics: Mapping[str, Metric]) -> Iterator[CardScore]:
    """List the main metrics of each task with their intervals; metrics of single types are left out."""
    for name, metric in metrics.items():
        # "task.metric" is over all questions, "task.metric.type" over one type.
        if name.count(".") == 1 and metric.outcomes:
            score = bootstrap_interval([metric]).scale(_find_factor(name))
            questions = f"{len(metric.outcomes):,}"
            yield CardScore(_format_name(name), _format_score(name, score.value), _format_range(score), questions)


def list_differences(ours: Mapping[str, Metric], base: Mapping[str, Metric]) -> Iterator[CardDifference]:
    """List the main metrics of the same questions with CMAI on and off, and their paired differences."""
    for name, metric in ours.items():
        if name.count(".") != 1 or name not in base or not metric.outcomes:
            continue
        try:
            difference: Difference = bootstrap_difference([metric], [base[name]])
        except ValueError:
            # The two runs asked other questions, so there is no pair to compare.
            continue
        factor = _find_factor(name)
        scaled = difference.scale(factor)
        yield CardDifference(
            _format_name(name),
            _format_score(name, metric.score * factor),
            _format_score(name, base[name].score * factor),
            f"{scaled.value:+.1f}",
            # Without any different outcome the bootstrap has no variance, and its interval would be 0 to 0.
            f"{scaled.low:+.1f} to {scaled.high:+.1f}" if scaled.low < scaled.high else "each question scores alike",
            difference.is_noise,
        )


def find_run_without_cmai(run: FinishedRun, model: ExportedModel, find_scorer: ScorerFinder) -> FinishedRun | None:
    """Find a run beside this one that evaluated the same model with CMAI off and the other methods unchanged."""
    if not run.methods.cmai:
        return None
    for path in sorted(run.folder.resolve().parent.glob(f"*/{JOB_FILE}")):
        folder = path.parent
        if folder == run.folder.resolve() or not is_finished_run(folder):
            continue
        # Look at the job before the answers: a folder of runs may hold hundreds.
        checkpoint = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("model", {}).get("checkpoint")
        if checkpoint != model.trained_model:
            continue
        other = runs.read_run(folder, find_scorer)
        # VMTC must be as in this run, or the difference would be that of both.
        other_methods = {name: value for name, value in other.methods.methods.items() if name != "cmai"}
        if not other.methods.cmai and all(run.methods.methods[name] == value for name, value in other_methods.items()):
            return other
    return None


def write_cmai_off_command(run: FinishedRun, model: ExportedModel) -> str:
    """Write the command that evaluates the model of the run with CMAI off, beside the run."""
    overrides = [f"name={run.job['name']}-cmai-off", "train={}"]
    overrides.append(f"model={{checkpoint: {model.trained_model}, cmai: null}}")
    if run.job["data"].get("make"):
        # An evaluation would make these sets again, without a use.
        overrides.append("data.make={}")
    folder = run.folder
    return shlex.join(["redux", "run", str(folder / JOB_FILE), *overrides, "--runs-dir", str(folder.parent)])


def describe_code(run: Path) -> str:
    """Describe the commit and the versions that computed the run; without a record, the versions of this process."""
    # A run that was resumed may have several commits and versions.
    entries = jsonl.read(run / ENVIRONMENT_FILE)
    commits = dict.fromkeys(
        f"commit {entry['commit']}{' with changes' if entry.get('is_modified') else ''}"
        for entry in entries
        if entry.get("commit")
    )
    if entries:
        versions = dict.fromkeys(
            f"{name} {version}" for entry in entries for name, version in (entry.get("versions") or {}).items()
        )
        return f"The code was that of {', '.join((*commits, *versions))}."
    installed = ", ".join(f"{name} {version}" for name, version in read_versions().items())
    return f"The run has no record of its code. The export used {installed}."


def describe_machine(run: Path, workers: int) -> str:
    """Describe the machines of the run; without a record, the number of workers."""
    entries = jsonl.read(run / ENVIRONMENT_FILE)
    described = pluralize(workers, "worker")
    if not entries:
        return described
    # Names of GPUs say more than the processor beside them.
    last = entries[-1]
    gpus = [f"{count:g} × {name}" for name, count in (last.get("gpus") or {}).items()]
    cpus = f"{last.get('cpus', 0):g} CPUs ({last.get('cpu', 'unknown')})"
    return f"{described}, {', '.join(gpus) or cpus}"


def format_cell(value: Any) -> str:
    """Format a text for a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _format_name(metric: str) -> str:
    task, _, name = metric.partition(".")
    return task if name == "accuracy" else f"{task}, {name}"


def _format_score(metric: str, value: float) -> str:
    return f"{value:.1f} %" if _find_factor(metric) == 100 else f"{value:.1f}"


def _find_factor(metric: str) -> float:
    """Find the factor from a metric to the number that is shown: per cent, or points of the benchmark."""
    task = metric.partition(".")[0]
    return next((column.factor for column in BENCHMARK_COLUMNS if column.source.startswith(f"{task}.")), 100.0)


def _format_range(interval: Interval) -> str:
    return f"{interval.low:.1f} to {interval.high:.1f}"


def _select_stages(job: Mapping[str, Any], last: str) -> dict[str, dict[str, Any]]:
    """Select the stages up to one."""
    names = list(job["train"])
    return {name: job["train"][name] for name in names[: names.index(last) + 1]}


def _list_parts(job: Mapping[str, Any]) -> list[str]:
    """List the pretrained models from which the run started."""
    model = job["model"]
    return [model[name] for name in ("checkpoint", "tower", "language") if isinstance(model.get(name), str)]


def _read_mixture(stage: Mapping[str, Any]) -> dict[str, float]:
    return {stage["data"]: 1.0} if isinstance(stage["data"], str) else stage["data"]


def _list_data(run: FinishedRun, model: ExportedModel, stages: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """List the sets of each stage; the samples that a stage has seen are those of all of its sets."""
    steps = jsonl.read(run.folder / METRICS_FILE)
    source = run.job["data"].get("source")
    for stage_name, stage in stages.items():
        # An exported checkpoint may be older than the last step of its stage.
        limit = model.step if stage_name == model.stage else None
        num_samples = sum(
            row.get("samples") or 0
            for row in steps
            if row["stage"] == stage_name and (limit is None or row["step"] <= limit)
        )
        mixture = _read_mixture(stage)
        total = sum(mixture.values())
        for name, share in mixture.items():
            yield {
                "stage": stage_name,
                "name": f"{name} ({source})" if source and name in EASY_VQA_SETS else name,
                "share": f"{share / total:.0%}",
                "samples": _count_samples(model.sets.get(name)),
                "seen": f"{num_samples:,.0f}",
            }


def _count_samples(url: str | None) -> str:
    """Count the samples of a set; "unknown" if it is no longer there."""
    try:
        return f"{len(Shards(url)):,}" if url and is_finished(url) else "unknown"
    except (OSError, ValueError):
        return "unknown"


def _describe_stage(run: Path, name: str, stage: Mapping[str, Any]) -> dict[str, str]:
    # Parts without a learning rate were frozen.
    lora = stage.get("lora")
    adapters = f" (LoRA, rank {lora['rank']}, alpha {lora['alpha']:g})" if lora else ""
    rates = [
        f"{part}{adapters if part == 'language' else ''} {rate:g}" for part, rate in stage["learning_rate"].items()
    ]
    is_language = stage["objective"] == "language"
    duration = f"{stage['steps']:,}" if stage.get("steps") else f"{stage['epochs']:g} epochs"
    # An epoch has as many steps as the samples give, which the metrics have counted.
    num_steps = len({row["step"] for row in jsonl.read(run / METRICS_FILE) if row["stage"] == name})
    return {
        "name": name,
        "rates": ", ".join(rates),
        "steps": f"{num_steps:,} ({stage['epochs']:g} epochs)" if stage.get("epochs") and num_steps else duration,
        "batch": str(stage["global_batch_size"]),
        "template": str(stage.get("template") or "") if is_language else "contrastive, captions",
        "precision": str(stage.get("precision", "fp32")),
    }


def _describe_times(run: Path, stages: Mapping[str, Any]) -> str:
    loops = ledger.read_ledger(run).loops
    return ", ".join(f"{format_duration(loops[name].total)} ({name})" for name in stages if name in loops)


def _list_settings(config: ReduxConfig) -> Iterator[tuple[str, str]]:
    yield "image tokens", f"{config.num_patches} → {config.image_seq_length}"
    for stage in config.compression_stages.values():
        yield f"block {stage.block} of the tower", f"k = {stage.kept} tokens kept, c = {stage.clusters} merged"
    for name in METHODS:
        settings = config.method_settings(name)
        if settings is None:
            yield name, "off"
            continue
        # Fields at None follow from the others.
        for field, value in asdict(settings).items():
            if value is not None:
                yield f"{name}.{field}", str(list(value)) if isinstance(value, tuple) else format_number(value)
    yield "conversation template", str(config.conversation_template)
    yield "image_aspect_ratio", str(config.image_aspect_ratio)


def _list_costs(config: ReduxConfig) -> list[CostLine]:
    """Compute the costs of the model and of a LLaVA of its sizes; none if several layers of the tower are read."""
    try:
        return list(compare_cost(config).lines)
    except ValueError:
        return []


def _count_plain_tokens(config: ReduxConfig) -> int:
    """Count the image tokens of the model without its methods."""
    return ReduxConfig(**{**config.to_dict(), **dict.fromkeys(METHODS)}).image_seq_length


def _list_limits(run: FinishedRun, model: ExportedModel) -> Iterator[str]:
    evaluated = {name.partition(".")[0] for name in run.metrics} if model.is_last else set()
    named = (run.job.get("evaluate") or {}).get("tasks") or {}
    if missing := [name for name in named if name not in evaluated]:
        yield f"Not evaluated on: {', '.join(missing)}."
    if evaluated:
        yield f"Evaluated on {', '.join(sorted(evaluated))} alone. Other tasks and other images may give other scores."
    yield "One training run with one seed. Another seed gives another score."
    yield "Nothing was measured on safety, bias, or languages other than those of the data."
    if model.config.conversation_template and model.config.conversation_template != "plain":
        yield (
            "Images are read without their EXIF rotation, as in training; pipelines of transformers rotate image files."
        )
        yield (
            f"Prompts must have the conversation template {model.config.conversation_template}, which the saved chat "
            "template writes."
        )
