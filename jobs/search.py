"""A search: one job whose settings are to be found, by trials that cost less than the job itself.

    name: laptop
    trials: 40
    job: {…}                                    # a job file without name: what is to be run in the end
    shared: [tower, pretrain, instruct]         # of its stages, trained once; after all of them trials only evaluate
    fidelity: {evaluate.tasks.easy_vqa.limit: 200}  # what a trial has in place of the job's, to cost less
    space:
      model.vmtc.tokens: {low: 4, high: 64}
      model.cmai.gamma_max: {low: 0.0, high: 0.9}
    references: {paper: {model.vmtc: {}, model.cmai: {}}}
    objectives: {easy_vqa.accuracy: max, flops: min}

runs/NAME/search.yaml      the search as it was done
runs/NAME/study.journal    Optuna's study, which its dashboard opens
runs/NAME/shared/          the run of what is shared: shards, and stages
runs/NAME/trials/0007/     the run of a trial, without its weights once it has ended
runs/NAME/search.html      what came of it; trials.csv, the same as a table; best.yaml, a job to run
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

from jobs import claims, document, run, schema, search_schema, study
from jobs.schema import Job
from jobs.search_schema import Search
from jobs.study import SHARED
from pipelines.core import cluster, storage
from pipelines.evaluation import evaluate
from pipelines.report import page
from pipelines.search import driver as tuning
from pipelines.search import search_page
from pipelines.search.space import Range, Space, Values, check
from pipelines.search.trials import Trials, Try, discard, find, fit, opened
from pipelines.training import driver, metrics
from pipelines.training.stage import count_shared_workers
from redux.architecture import ModelSettings
from redux.configuration import ReduxConfig, build_config
from redux.cost import compute_cost

FILE = "search.yaml"
BEST = "best.yaml"
FREE = ("num_trials", "max_concurrent_trials", "retries", *(f"job.{name}" for name in (*claims.FREE, "report")))
"""What of a search may be another when it goes on."""

LLAMA_WORDS = 32_000
"""The vocabulary that is assumed, for checks, until the job's own tokenizer is made."""

PATIENCE_S = 60
"""For processes of a driver that was killed to let go of a trial's folder."""

LAST = 10
"""The loss of a trial is the mean over the last of so many parts of its last stage."""


class Jobs:
    """The jobs of a search's trials, by their values.

    shared: the run of what they share, and its folder, once it is done; before, a trial's job is the whole.
    counts: numbers of workers and actors.
    """

    def __init__(self, search: Search, shared: tuple[Job, Path] | None = None, counts: Values | None = None) -> None:
        self.search, self.counts = search, counts or {}
        self.tree = study.going_on(search.job, search.shared, *shared) if shared else search.job
        tokenizer = shared[1] / run.TOKENIZER if shared else None
        known = tokenizer is not None and tokenizer.exists()
        self.words = len(AutoTokenizer.from_pretrained(tokenizer)) if known else LLAMA_WORDS

    def __call__(self, values: Values, name: str = "trial") -> Job:
        """ValueError where there is none."""
        return study.build(self.tree, self.counts | self.search.fidelity | values, f"{self.search.name}-{name}", "job")

    def forecast(self, values: Values) -> dict[str, float]:
        """What is known of a trial beforehand; ValueError where its values make no job."""
        config = _config(self(values).model, self.words)
        spent = compute_cost(config, self.search.text)
        return {
            "flops": spent.flops,
            "kv_bytes": spent.kv_bytes,
            "focus_bytes": spent.focus_bytes,
            "image_tokens": config.image_seq_length,
        }


def _config(model: ModelSettings, words: int) -> ReduxConfig:
    if not model.is_pretrained:
        return build_config(model, words)
    begun = _begun(model.tower, model.language, model.gguf_file, model.checkpoint)
    return ReduxConfig(**{**begun, **model.methods})


@functools.cache
def _begun(tower: str | None, language: str | None, gguf_file: str | None, checkpoint: str | None) -> dict[str, Any]:
    """The configuration of what trials begin with, read once."""
    parts = ModelSettings(tower=tower, language=language, gguf_file=gguf_file, checkpoint=checkpoint)
    return run.configured(parts).to_dict()


def load(path: Path, overrides: Sequence[str] = ()) -> Search:
    """The search of a YAML file after overrides.

    ValueError with one clear line also where the job, a reference, or an end of what is searched cannot be.
    """
    search = search_schema.read(path, overrides)
    search = replace(search, space={name: _typed(name, place) for name, place in search.space.items()})
    try:
        _check(search)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return search


def _check(search: Search) -> None:
    jobs = Jobs(search)
    whole = jobs({})
    for name, values in search.references.items():
        try:
            jobs.forecast(values)
        except ValueError as error:
            raise ValueError(f"references.{name}: {error}") from None
    touched = [*search.space, *search.fidelity, *(key for values in search.references.values() for key in values)]
    fixed = ["data", *(f"train.{stage}" for stage in search.shared)]
    fixed += [f"model.{part}" for part in ("tower", "language", "gguf_file", "checkpoint")] if search.shared else []
    for key in touched:
        if taken := [section for section in fixed if key == section or key.startswith(f"{section}.")]:
            raise ValueError(f"{key}: got other values for trials, allowed: none, as {taken[0]} is shared by all")
    _check_pruning(search, whole)
    # limits too, but of a model from sizes, whose vocabulary is not known yet
    check(
        Space(search.space),
        functools.partial(fit, search, jobs.forecast) if whole.model.is_pretrained else jobs.forecast,
    )


def _check_pruning(search: Search, job: Job) -> None:
    """ValueError where no trial could be stopped early."""
    if not search.prune:
        return
    left = [name for name in job.train if name not in search.shared]
    if not left:
        raise ValueError("prune: got a rule, allowed: null, as trials train nothing")
    steps = job.train[left[-1]].steps
    if steps and steps <= search.prune.first:
        raise ValueError(f"prune.first: got {search.prune.first}, allowed: less than the {steps} steps of {left[-1]}")


def _typed(name: str, place: Any) -> Any:
    """A range of whole numbers, where the job takes fractions, is one of fractions."""
    if isinstance(place, Range) and document.takes(Job, name, float) and not document.takes(Job, name, int):
        return replace(place, low=float(place.low), high=float(place.high))
    return place


def _check_metrics(search: Search, job: Job, folder: Path) -> None:
    """ValueError where an objective, or a metric with a limit, is none that a trial will have."""
    known = {"flops", "kv_bytes", "focus_bytes", "image_tokens"}
    if len(job.train) > len(search.shared):
        known |= {"loss", "tokens_per_s"}
    if settings := run.located(job, folder).evaluate:
        known |= evaluate.promised(settings)
    for section in ("objectives", "limits"):
        for name in getattr(search, section):
            if name not in known:
                raise ValueError(f"{section}: got {name}, allowed: {', '.join(sorted(known))}")


def conduct(search: Search, folder: Path, changed: bool = False) -> None:
    """Do what is left of the search in its folder: what is shared, trials, and what came of them.

    ValueError, before anything is run, where a file cannot be read or no trial would report an objective.
    """
    folder = folder.resolve()
    whole = Jobs(search)({})
    _check_metrics(search, whole, folder)
    claims.make_folder(folder)
    with run.alone(folder), cluster.session():
        _claim(search, folder, changed)
        _require(search, whole)
        jobs = Jobs(search, _share(search, folder / SHARED, changed), _with_counts(search, whole))
        trials = Trials(search, search.name, folder, jobs.forecast)

        def work(trial: Try, place: Path, watch: driver.Watch) -> dict[str, float]:
            job = jobs(trial.values, str(trial.number))
            run.run(job, place, watch=watch, patience_s=PATIENCE_S)
            return _measured(job, place)

        after = functools.partial(_show, folder=folder, jobs=jobs, tidied=set())
        stage = list(whole.train)[-1] if whole.train else None
        tuning.search(trials, folder, work, after, stage, whole.recovery.grace_s)
    print(f"{search.name} is finished: {folder / 'search.html'}")
    for line in search_page.summary(trials.study):
        print(line)


def _claim(search: Search, folder: Path, changed: bool) -> None:
    """Write the search into its folder; ValueError where trials, or what they share, depend on other settings.

    A study in which no trial has begun is deleted and created again, as it holds the references of an earlier file.
    """

    def find_use(key: str) -> str:
        if claims.is_free(key, FREE):
            return ""
        if trained and key.startswith("job."):
            return f"{SHARED}, which has begun,"
        return "a trial" if tried else ""

    tried = any((folder / tuning.FOLDER).glob("*"))
    trained = bool(metrics.stages(folder / SHARED))
    keys = claims.claim(folder / FILE, search, find_use, changed)
    if not tried and not all(claims.is_free(key, FREE) for key in keys):
        discard(search, search.name, folder)
    opened(search, folder)  # an error in `storage` comes before any work


def _share(search: Search, folder: Path, changed: bool) -> tuple[Job, Path] | None:
    """The run of what trials share, done; None where they share nothing."""
    job = study.build(search.job, {}, f"{search.name}-{SHARED}", "job")
    until = search.shared[-1] if search.shared else "shards"
    if until not in run.steps(job, folder):
        return None
    run.run(job, folder, changed, until=until)
    return job, folder


def _require(search: Search, job: Job) -> None:
    """ValueError where Ray runs here alone and has not enough for so many trials at once: they would wait for ever."""
    trains = len(job.train) > len(search.shared)
    fewest, most = job.worker_range or (1, 1)
    actors = 0 if job.evaluate is None else 1 if job.evaluate.num_actors == "auto" else job.evaluate.num_actors
    training = fewest * (0.5 if fewest == most else 1) if trains else 0
    what = f"max_concurrent_trials = {search.max_concurrent_trials}"
    cluster.require({"CPU": search.max_concurrent_trials * max(training, actors / 2) + 1}, what)
    if cluster.gpus():
        workers = max(fewest if trains else 0, actors)
        cluster.require({"GPU": search.max_concurrent_trials * workers * job.gpu_share}, what)


def _with_counts(search: Search, job: Job) -> Values:
    """Values that divide what Ray has among the trials under way at a time, where the job leaves it open."""
    places = max(cluster.count_places(job.gpu_share) // search.max_concurrent_trials, 1)
    stages = [stage for name, stage in job.train.items() if name not in search.shared]
    result: Values = {}
    if job.worker_range is None:
        result["num_workers"] = count_shared_workers(stages, places)
    if job.evaluate and job.evaluate.num_actors == "auto":
        result["evaluate.num_actors"] = places if cluster.gpus() else min(places, 2)
    return result


def _measured(job: Job, place: Path) -> dict[str, float]:
    """All numbers of a trial's run."""
    result = json.loads((place / "metrics.json").read_text())
    if job.train:
        stage = list(job.train)[-1]
        losses = [loss for loss in metrics.losses(place, stage).values() if loss is not None]
        last = losses[-max(len(losses) // LAST, 1) :]
        result["tokens_per_s"] = metrics.tokens_per_s(place, stage)
        if last:
            result["loss"] = sum(last) / len(last)
    return result


def _show(trials: Trials, folder: Path, jobs: Jobs, tidied: set[int]) -> None:
    """What came of the search so far; and trials with a result need their weights no more.

    Those that failed keep them, for more retries may be allowed.
    """
    search_page.write(trials.study, folder)
    for tries in trials.ended:
        number = tries[0].number
        if number in tidied or tries[-1].state == TrialState.FAIL:
            continue
        tidied.add(number)
        place = folder / tuning.FOLDER / f"{number:04}"
        shutil.rmtree(place / claims.ASSEMBLED, ignore_errors=True)
        for plan in run.plans(jobs({}, str(number)), place).values():
            with suppress(OSError):  # a bucket that is away for now is no reason to end a search
                storage.remove_tree(plan.folder)


def best(folder: Path, numbers: Sequence[int]) -> list[Path]:
    """Write the job with the settings of these trials, whole, as files to run; returns them.

    Without numbers it is the best trial's, where there is one objective.  ValueError where a trial has no result.
    """
    search = document.read(folder / FILE, (), Search)
    study = find(search, search.name, folder)
    complete = {trial.number: trial for trial in study.get_trials(states=(TrialState.COMPLETE,))}
    found = search_page.front(study)
    if not numbers and len(search.objectives) == 1 and found:
        numbers = [found[0].number]
    told = ", ".join(f"{trial.number} ({_values(search, trial)})" for trial in found) or "none yet"
    if not numbers or not complete.keys() >= set(numbers):
        got = ", ".join(map(str, numbers)) or "none"
        raise ValueError(f"{folder}: TRIAL: got {got}, allowed: complete trials; those that no other dominates: {told}")
    return [
        _write(search, complete[number], folder, BEST if len(numbers) == 1 else f"best-{number}.yaml")
        for number in numbers
    ]


def _write(search: Search, trial: FrozenTrial, folder: Path, name: str) -> Path:
    reference = trial.user_attrs.get("reference")
    values = search.references[reference] if reference else Space(search.space).values(trial.params)
    job = study.build(search.job, values, f"{search.name}-{trial.number}", f"{folder / FILE}: job")
    cheaper = f", with {json.dumps(search.fidelity)}" if search.fidelity else ""
    begun = f", from what the stages {', '.join(search.shared)} had made without it" if search.shared else ""
    told = (
        f"# The settings of trial {trial.number} of the search {search.name}.\n"
        f"# There: {_values(search, trial)}{cheaper}{begun}.\n"
        "# The job as a whole, as it stands here, was not run by the search.\n\n"
    )
    return page.write(folder / name, told + schema.dump(job))


def _values(search: Search, trial: FrozenTrial) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in zip(search.objectives, trial.values, strict=True))
