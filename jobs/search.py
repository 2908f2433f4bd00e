"""Search for good settings of a job, by trials that cost less than the job itself.

    name: laptop
    num_trials: 40
    job: {…}                                    # a job file without name, for which settings are searched
    shared: [tower, pretrain, instruct]         # stages trained once for all trials
    fidelity: {evaluate.tasks.easy_vqa.limit: 200}  # values that replace the job's in a trial, to make it cheaper
    space:
      model.vmtc.tokens: {low: 4, high: 64}
      model.cmai.gamma_max: {low: 0.0, high: 0.9}
    references: {paper: {model.vmtc: {}, model.cmai: {}}}
    objectives: {easy_vqa.accuracy: max, flops: min}

runs/NAME/search.yaml      the resolved search
runs/NAME/study.journal    Optuna study; optuna-dashboard opens it
runs/NAME/shared/          run of the shared shards and stages
runs/NAME/trials/0007/     run of a trial; its weights are deleted when it has ended
runs/NAME/search.html      results; trials.csv has them as a table, best.yaml is a job to run
"""

import functools
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from transformers import AutoTokenizer

from jobs import document, model_parts, ownership, resolve, run, schema, search_schema, study
from jobs.layout import require_folder
from jobs.resources import find_shortage
from jobs.schema import Job
from jobs.search_schema import Search
from jobs.study import SHARED
from pipelines.core import cluster, storage
from pipelines.core.settings import KEYS_WITHOUT_EFFECT, is_in_sections
from pipelines.evaluation import evaluate
from pipelines.report import page
from pipelines.search import driver as tuning
from pipelines.search import search_page
from pipelines.search.space import Range, Space, Values, check_space
from pipelines.search.trials import Trials, TrialSpec, check_feasible, discard_study, load_study, open_storage
from pipelines.training import driver, metrics
from pipelines.training.files import ASSEMBLED_FOLDER, RESULT_FILE
from pipelines.training.stage import count_shared_workers
from redux.architecture import ModelSettings, TowerSizes
from redux.configuration import ReduxConfig, build_config
from redux.cost import compute_cost

SEARCH_FILE = "search.yaml"
BEST_FILE = "best.yaml"
SEARCH_MAY_CHANGE_ON_RESUME = (
    "num_trials",
    "max_concurrent_trials",
    "retries",
    *(f"job.{name}" for name in (*KEYS_WITHOUT_EFFECT, "report")),
)
"""Settings of a search that change no result of a finished trial."""

LLAMA_VOCABULARY = 32_000
"""Vocabulary size that checks assume until the tokenizer of the job exists."""

LOCK_TIMEOUT_S = 60
"""Seconds that processes of a killed driver get to release the folder of a trial."""

LOSS_PARTS = 10
"""The loss of a trial is the mean over the last of this many parts of its last stage."""


class TrialJobs:
    """Jobs of the trials of a search, by their values.

    Args:
        search: the search.
        shared: job and folder of the finished shared run. None before it: a trial's job then has all stages.
        counts: numbers of workers and actors, by dotted path.
    """

    def __init__(self, search: Search, shared: tuple[Job, Path] | None = None, counts: Values | None = None) -> None:
        self.search, self.counts = search, counts or {}
        self.shared_stages = shared[0].train if shared else {}
        self.tree = study.continue_from(search.job, search.shared, *shared) if shared else search.job
        tokenizer = shared[1] / run.TOKENIZER if shared else None
        # Pretrained parts bring their own tokenizer, so the shared run has none.
        has_tokenizer = tokenizer is not None and tokenizer.exists()
        self.vocabulary = len(AutoTokenizer.from_pretrained(tokenizer)) if has_tokenizer else LLAMA_VOCABULARY

    def build(self, values: Values, name: str = "trial") -> Job:
        """Build the job of a trial; ValueError if these values make no job."""
        # Later values win: those of the trial over the file's, and the file's over the counts of this machine.
        changes = self.counts | self.search.fidelity | values
        job = study.build_job(self.tree, changes, f"{self.search.name}-{name}", "job")
        study.check_templates(self.search.shared, {**self.shared_stages, **job.train}, "search")
        return job

    def forecast(self, values: Values) -> dict[str, float]:
        """Compute the metrics of a trial that are known without running it; ValueError if its values make no job."""
        config = _build_config(self.build(values).model, self.vocabulary)
        cost = compute_cost(config, self.search.text)
        return {
            "flops": cost.flops,
            "kv_bytes": cost.kv_bytes,
            "focus_bytes": cost.focus_bytes,
            "image_tokens": config.image_seq_length,
        }


def _build_config(model: ModelSettings, vocabulary: int) -> ReduxConfig:
    if not model.has_pretrained_language:
        return build_config(model, vocabulary)
    start = _read_start_config(model.tower, model.language, model.gguf_file, model.checkpoint)
    return ReduxConfig(**{**start, **model.methods})


@functools.cache
def _read_start_config(
    tower: TowerSizes | str | None, language: str | None, gguf_file: str | None, checkpoint: str | None
) -> dict[str, Any]:
    """Read the configuration of the model that trials start from, once per process."""
    parts = ModelSettings(tower=tower, language=language, gguf_file=gguf_file, checkpoint=checkpoint)
    return model_parts.configure_model(parts).to_dict()


def load(path: Path, overrides: Sequence[str] = ()) -> Search:
    """Load the search of a YAML file after overrides.

    Raises:
        ValueError: the search, its job, a reference or an end of a range is wrong.
    """
    search = search_schema.read(path, overrides)
    search = replace(search, space={name: _match_type(name, values) for name, values in search.space.items()})
    try:
        _check(search)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return search


def _check(search: Search) -> None:
    jobs = TrialJobs(search)
    job = jobs.build({})
    for name, values in search.references.items():
        try:
            jobs.forecast(values)
        except ValueError as error:
            raise ValueError(f"references.{name}: {error}") from None
    varied = [*search.space, *search.fidelity, *(key for values in search.references.values() for key in values)]
    # The shared run has used these settings, so a trial cannot change them.
    fixed = ["data", *(f"train.{stage}" for stage in search.shared)]
    fixed += [f"model.{part}" for part in ("tower", "language", "gguf_file", "checkpoint")] if search.shared else []
    for key in varied:
        if sections := [section for section in fixed if key == section or key.startswith(f"{section}.")]:
            raise ValueError(
                f"{key}: got other values for trials, allowed: none, because all trials share {sections[0]}"
            )
    _check_pruning(search, job)
    # Limits are checked too, except for a model from sizes, whose vocabulary is not known yet.
    check_space(
        Space(search.space),
        functools.partial(check_feasible, search, jobs.forecast)
        if job.model.has_pretrained_language
        else jobs.forecast,
    )


def _check_pruning(search: Search, job: Job) -> None:
    """Check that trials can be stopped early; ValueError if they cannot."""
    if not search.prune:
        return
    stages = [name for name in job.train if name not in search.shared]
    if not stages:
        raise ValueError("prune: got a rule, allowed: null, because trials train nothing")
    steps = job.train[stages[-1]].steps
    if steps and steps <= search.prune.first:
        raise ValueError(f"prune.first: got {search.prune.first}, allowed: less than the {steps} steps of {stages[-1]}")


def _match_type(name: str, values: Any) -> Any:
    """Turn a range of whole numbers into one of floats if the key takes floats."""
    takes_floats = document.accepts_type(Job, name, float) and not document.accepts_type(Job, name, int)
    if isinstance(values, Range) and takes_floats:
        return replace(values, low=float(values.low), high=float(values.high))
    return values


def _check_metrics(search: Search, job: Job, folder: Path) -> None:
    """Check that trials will report each objective and each metric with a limit; ValueError otherwise."""
    names = {"flops", "kv_bytes", "focus_bytes", "image_tokens"}
    if len(job.train) > len(search.shared):
        names |= {"loss", "tokens_per_s"} | ({metrics.VALIDATION_LOSS} if job.data.hold_out else set())
    if settings := resolve.resolve_job(job, folder).evaluate:
        names |= evaluate.list_metric_names(settings)
    for section in ("objectives", "limits"):
        for name in getattr(search, section):
            if name not in names:
                raise ValueError(f"{section}: got {name}, allowed: {', '.join(sorted(names))}")


def run_search(search: Search, folder: Path, allow_changes: bool = False) -> None:
    """Run the unfinished parts of a search in its folder: shared stages, trials, and the page of results.

    Raises:
        ValueError: a file cannot be read, or no trial would report an objective. Nothing has run then.
    """
    folder = folder.resolve()
    job = TrialJobs(search).build({})
    # A misspelt objective would be noticed only after the first trial.
    _check_metrics(search, job, folder)
    ownership.make_folder(folder)
    with run.run_lock(folder), cluster.open_session():
        _claim(search, folder, allow_changes)
        _check_resources(search, job)
        shared = _run_shared_stages(search, folder / SHARED, allow_changes)
        # Counts of workers depend on this machine, so they are chosen at each start and not written into the search.
        jobs = TrialJobs(search, shared, _divide_resources(search, job))
        trials = Trials(search, search.name, folder, jobs.forecast)

        def run_trial(trial: TrialSpec, trial_folder: Path, should_stop: driver.StopCallback) -> dict[str, float]:
            trial_job = jobs.build(trial.values, str(trial.number))
            run.run(trial_job, trial_folder, should_stop=should_stop, lock_timeout_s=LOCK_TIMEOUT_S)
            return _read_metrics(trial_job, trial_folder)

        # `cleaned` lives as long as the search: the weights of a trial are deleted once.
        on_trials_ended = functools.partial(_write_results, folder=folder, jobs=jobs, cleaned=set())
        stage = list(job.train)[-1] if job.train else None
        tuning.run_trials(trials, folder, run_trial, on_trials_ended, stage, job.recovery.grace_s)
    print(f"{search.name} is finished: {folder / 'search.html'}")
    for line in search_page.summarize_search(trials.study):
        print(line)


def _claim(search: Search, folder: Path, allow_changes: bool) -> None:
    """Write the search into its folder; ValueError if trials or shared stages depend on other settings.

    A study without a started trial is deleted and created again, because it holds the references of the earlier file.
    """

    def find_use(key: str) -> str:
        if is_in_sections(key, SEARCH_MAY_CHANGE_ON_RESUME):
            return ""
        if has_trained and key.startswith("job."):
            return f"{SHARED}, which has started,"
        return "a trial" if has_trials else ""

    has_trials = any((folder / tuning.TRIALS_FOLDER).glob("*"))
    has_trained = bool(metrics.read_stages(folder / SHARED))
    keys = ownership.claim(folder / SEARCH_FILE, search, find_use, allow_changes)
    if not has_trials and not all(is_in_sections(key, SEARCH_MAY_CHANGE_ON_RESUME) for key in keys):
        discard_study(search, search.name, folder)
    open_storage(search, folder)  # Reports a wrong `storage` before any work


def _run_shared_stages(search: Search, folder: Path, allow_changes: bool) -> tuple[Job, Path] | None:
    """Run the shared stages; returns their job and folder, or None if trials share nothing."""
    job = study.build_job(search.job, {}, f"{search.name}-{SHARED}", "job")
    # Sets in other forms than shards are made once, and trials read them.
    job = replace(job, data=resolve.resolve_data(job.data, folder))
    until = search.shared[-1] if search.shared else "shards"
    if until not in run.list_phases(job, folder):
        return None
    run.run(job, folder, allow_changes, until=until)
    return job, folder


def _check_resources(search: Search, job: Job) -> None:
    """Check that a Ray of this machine alone has the resources of the concurrent trials; they would wait forever."""
    trains = len(job.train) > len(search.shared)
    workers, _ = job.worker_range or (1, 1)
    actors = 0
    if job.evaluate:
        actors = 1 if job.evaluate.num_actors == "auto" else job.evaluate.num_actors
    shortage = find_shortage(job, workers if trains else 0, actors, search.max_concurrent_trials)
    if shortage:
        raise ValueError(
            f"max_concurrent_trials = {search.max_concurrent_trials} needs {shortage.needed:g} {shortage.resource}s, "
            f"allowed: {shortage.available:g}, which this machine has"
        )


def _divide_resources(search: Search, job: Job) -> Values:
    """Divide the CPUs or GPUs of Ray among the concurrent trials, for counts that the job leaves open."""
    processes = max(cluster.count_model_processes(job.gpu_share) // search.max_concurrent_trials, 1)
    stages = [stage for name, stage in job.train.items() if name not in search.shared]
    result: Values = {}
    if job.worker_range is None:
        result["num_workers"] = count_shared_workers(stages, processes)
    if job.evaluate and job.evaluate.num_actors == "auto":
        result["evaluate.num_actors"] = processes if cluster.count_gpus() else min(processes, 2)
    return result


def _read_metrics(job: Job, trial_folder: Path) -> dict[str, float]:
    """Read all metrics of a trial's run."""
    result = json.loads((trial_folder / RESULT_FILE).read_text())
    if job.train:
        stage = list(job.train)[-1]
        # None stands for a loss that was not finite.
        losses = [loss for loss in metrics.read_losses(trial_folder, stage).values() if loss is not None]
        last = losses[-max(len(losses) // LOSS_PARTS, 1) :]
        result["tokens_per_s"] = metrics.compute_tokens_per_s(trial_folder, stage)
        if last:
            result["loss"] = sum(last) / len(last)
        if (validation_loss := metrics.read_validation_loss(trial_folder, stage)) is not None:
            result[metrics.VALIDATION_LOSS] = validation_loss
    return result


def _write_results(trials: Trials, folder: Path, jobs: TrialJobs, cleaned: set[int]) -> None:
    """Write the page of results, and delete the weights of trials that have a result.

    Failed trials keep their weights, because more retries may be allowed later.
    """
    # The page comes first: to delete weights in a bucket may take long.
    search_page.write_page(trials.study, folder)
    for attempts in trials.ended_attempts:
        number = attempts[0].number
        if number in cleaned or attempts[-1].state == TrialState.FAIL:
            continue
        cleaned.add(number)
        trial_folder = folder / tuning.TRIALS_FOLDER / f"{number:04}"
        shutil.rmtree(trial_folder / ASSEMBLED_FOLDER, ignore_errors=True)
        for plan in run.plan_stages(jobs.build({}, str(number)), trial_folder).values():
            with suppress(OSError):  # A bucket that cannot be reached must not end the search
                storage.remove_tree(plan.folder)


def write_best_jobs(folder: Path, numbers: Sequence[int]) -> list[Path]:
    """Write the complete job with the settings of each of these trials.

    Args:
        folder: folder of the search.
        numbers: numbers of trials; none takes the best trial of a search with one objective.

    Returns:
        The files that were written.

    Raises:
        ValueError: a trial has no result.
    """
    require_folder(folder, "SEARCH", "the folder of a search")
    search = document.read(folder / SEARCH_FILE, (), Search)
    study = load_study(search, search.name, folder)
    complete = {trial.number: trial for trial in study.get_trials(states=(TrialState.COMPLETE,))}
    front = search_page.find_front(study)
    if not numbers and len(search.objectives) == 1 and front:
        numbers = [front[0].number]
    listing = ", ".join(f"{trial.number} ({_format_values(search, trial)})" for trial in front) or "none yet"
    if not numbers or not complete.keys() >= set(numbers):
        got = ", ".join(map(str, numbers)) or "none"
        raise ValueError(f"{folder}: TRIAL: got {got}, allowed: complete trials; the Pareto front: {listing}")
    return [
        _write_best_job(search, complete[number], folder, BEST_FILE if len(numbers) == 1 else f"best-{number}.yaml")
        for number in numbers
    ]


def _write_best_job(search: Search, trial: FrozenTrial, folder: Path, name: str) -> Path:
    """Write the job of a trial, with a comment about its origin; returns the path."""
    # A reference may have values outside the space, so Optuna does not hold them.
    reference = trial.user_attrs.get("reference")
    values = search.references[reference] if reference else Space(search.space).values(trial.params)
    job = study.build_job(search.job, values, f"{search.name}-{trial.number}", f"{folder / SEARCH_FILE}: job")
    fidelity = f", with {json.dumps(search.fidelity)}" if search.fidelity else ""
    shared = f", after the shared stages {', '.join(search.shared)}" if search.shared else ""
    header = (
        f"# Settings of trial {trial.number} of the search {search.name}.\n"
        f"# Result of the trial: {_format_values(search, trial)}{fidelity}{shared}.\n"
        "# The search has not run the complete job below.\n\n"
    )
    return page.write(folder / name, header + schema.dump(job))


def _format_values(search: Search, trial: FrozenTrial) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in zip(search.objectives, trial.values, strict=True))
