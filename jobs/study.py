"""Run a study: one job in several variants and with several seeds, which share their first stages.

    name: mini
    seeds: [0, 1]
    shared: [tower, pretrain]      # trained once, with the model of the job; variants start from the result
    job: {…}                       # a job file without name and seed
    variants:
      llava: {model.vmtc: null, model.cmai: null}
      vmtc: {model.cmai: null}
    repeated: [llava]              # the other variants are trained with the first seed alone
    applied:                       # trained variants, evaluated with other settings
      llava-cmai: {variant: llava, changes: {model.cmai: {gamma_max: 0.6}}}
    decisive_heads:                # CMAI of these runs is that of few heads alone, which training samples choose
      {variants: [llava-cmai], share: 0.05, data: half_shown}

runs/NAME/study.yaml       the resolved study
runs/NAME/shared/          run of the shared stages
runs/NAME/shards/SET/      a set that is made of data in another form; in shared/ if there are shared stages
runs/NAME/VARIANT-SEED/    run of one variant with one seed, or of one of `applied`
runs/NAME/tables.html      results; see pipelines/report/tables.py

Each run is an ordinary job: its job.yaml can be run and resumed on its own. Several machines or calls can divide the
runs of a study, see `Share`. Each of them runs the shared stages unless they are finished, so with one folder for all
the first trains them and the others wait.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt, MinLen

from jobs import document
from jobs.layout import locate_model, locate_sets
from jobs.schema import Job, Name
from jobs.type_text import format_value
from pipelines.core import failures, storage
from pipelines.data.easy_vqa import EASY_VQA_SETS
from pipelines.training.files import RESULT_FILE, STUDY_FILE
from pipelines.training.stage import Stage
from redux.settings import CMAI, METHODS

SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class AppliedVariant:
    """A trained variant that is evaluated with other settings, without training.

    Args:
        variant: name of the variant whose models are evaluated; "shared" is the model after the shared stages.
        changes: values that replace those of the job, by dotted path. Methods that are not named are those with which
            the variant was trained.
    """

    variant: Name
    changes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DecisiveHeads:
    """Heads of the language model that alone get CMAI: those that matter most for the answers to training samples.

    Args:
        variants: names of variants or of evaluations in `applied` whose model.cmai is restricted to these heads. The
            heads are those of the model from which the run starts: that of the shared stages, or the trained variant.
        share: share of all heads of the language model; at least one head.
        data: set of the job, or of easy-VQA, whose samples are read. half_shown has images and instructions.
        samples: number of samples, evenly spaced.
    """

    variants: Annotated[tuple[Name, ...], MinLen(1)]
    share: Annotated[float, Gt(0), Le(1)] = 0.05
    data: str
    samples: Annotated[int, Ge(1)] = 128


@dataclass(frozen=True, kw_only=True)
class Study:
    """Content of a study file.

    Args:
        name: name of the study and of its folder.
        seeds: seeds with which each variant is trained. Shared stages use the first.
        shared: names of the job's first stages, in order, that are trained once for all variants.
        job: content of a job file without name and seed.
        variants: the variants by name, each with values that replace those of the job, by dotted path.
        repeated: names of the variants that are trained with every seed; the others have the first seed alone. null
            repeats all.
        applied: evaluations of trained variants with other settings, by name, with the seeds of the variant.
        decisive_heads: choice of the few heads that get CMAI in some runs.
    """

    name: Name
    seeds: Annotated[tuple[Annotated[int, Ge(0), Lt(2**32)], ...], MinLen(1)] = (0,)
    shared: tuple[Name, ...] = ()
    job: dict[str, Any]
    variants: Annotated[dict[Name, dict[str, Any]], MinLen(1)]
    repeated: tuple[Name, ...] | None = None
    applied: dict[Name, AppliedVariant] = field(default_factory=dict)
    decisive_heads: DecisiveHeads | None = None

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {list(self.seeds)}, allowed: each once")
        if reserved := {"name", "seed"} & self.job.keys():
            raise ValueError(f"job: got a {min(reserved)}, allowed: none, because each run has its own")
        stages = check_shared_stages(self.shared, self.job)
        if self.shared and len(self.shared) == len(stages):
            raise ValueError(
                f"shared: got {', '.join(self.shared)}, allowed: the first of the stages {', '.join(stages)}, not all"
            )
        self._check_names()

    def _check_names(self) -> None:
        """Check the names of `repeated` and `applied`."""
        variant_names = ", ".join(self.variants)
        if SHARED in self.variants:
            raise ValueError(
                f"variants: got {SHARED}, allowed: another name, because the run of the shared stages has this one"
            )
        for name in self.repeated or ():
            if name not in self.variants:
                raise ValueError(f"repeated: got {name}, allowed: {variant_names}")
        for name, applied in self.applied.items():
            if name in self.variants:
                raise ValueError(f"applied: got {name}, which is a variant, allowed: another name")
            models = [*self.variants, *([SHARED] if self.shared else [])]
            if applied.variant not in models:
                raise ValueError(f"applied.{name}.variant: got {applied.variant}, allowed: {', '.join(models)}")
        if self.applied and not self.job.get("evaluate"):
            raise ValueError(f"applied: got {', '.join(self.applied)}, allowed: none, because job.evaluate is null")
        if self.applied and not self.job.get("train"):
            raise ValueError(f"applied: got {', '.join(self.applied)}, allowed: none, because job.train has no stages")
        # Before the shared stages a variant has no trained model whose heads could be measured.
        measurable_names = ", ".join([*(self.variants if self.shared else []), *self.applied])
        for name in self.decisive_heads.variants if self.decisive_heads else ():
            if name not in self.applied and not (self.shared and name in self.variants):
                raise ValueError(f"decisive_heads.variants: got {name}, allowed: {measurable_names or 'none'}")

    def list_seeds(self, variant: str) -> tuple[int, ...]:
        """List the seeds of a variant."""
        return self.seeds if self.repeated is None or variant in self.repeated else self.seeds[:1]


@dataclass(frozen=True)
class Share:
    """One of several equal shares of the runs of a study, for several machines or calls.

    Args:
        number: number of this share, from 1.
        total: number of shares.
    """

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Parse K/N, such as 2/3; ValueError unless 1 <= K <= N."""
        number, _, total = text.partition("/")
        is_number = text.isascii() and number.isdecimal() and total.isdecimal() and len(text) <= 18
        if not (is_number and 1 <= int(number) <= int(total)):
            raise ValueError(f"got {text[:80]}, allowed: K/N with 1 <= K <= N, such as 2/3")
        return cls(int(number), int(total))

    def select_runs(self, study: Study) -> set[str]:
        """Select the names of the runs of this share.

        Each trained run goes to the share with the fewest runs so far, together with the evaluations that need its
        model. The first share evaluates the model of the shared stages.

        Raises:
            ValueError: there are more shares than trained runs.
        """
        trained = [
            (variant, seed) for seed in study.seeds for variant in study.variants if seed in study.list_seeds(variant)
        ]
        if self.total > len(trained):
            raise ValueError(
                f"--share: got {self.number}/{self.total}, allowed: at most {len(trained)} shares, one for each "
                "trained run"
            )
        shares: list[list[str]] = [[] for _ in range(self.total)]
        for variant, seed in [(SHARED, study.seeds[0]), *trained]:
            names = [variant, *(name for name, applied in study.applied.items() if applied.variant == variant)]
            smallest = min(shares, key=len)
            smallest.extend(format_run(name, seed) for name in names if name != SHARED)
        return set(shares[self.number - 1])


def format_run(variant: str, seed: int) -> str:
    """Format the name of the folder of a run."""
    return f"{variant}-{seed}"


def check_shared_stages(shared: Sequence[str], job: Mapping[str, Any]) -> list[str]:
    """Check that shared stages are the first ones of a job, whose content is unchecked; returns all its stages."""
    stages = job.get("train", {})
    if not isinstance(stages, dict):
        raise ValueError(f"job.train: got {format_value(stages)}, allowed: a section of stages")
    if list(shared) != list(stages)[: len(shared)]:
        raise ValueError(f"shared: got {', '.join(shared)}, allowed: the first of the stages {', '.join(stages)}")
    last = stages[shared[-1]] if shared else None
    if isinstance(last, dict) and last.get("objective") == "contrastive":
        others = [name for name in stages if name not in shared]
        raise ValueError(
            f"shared: got {', '.join(shared)}, allowed: {', '.join([*shared, *others[:1]])}, because the others start "
            "from the whole model of a language stage, and a contrastive stage makes a tower alone"
        )
    return list(stages)


def load(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Load the study of a YAML file after overrides; ValueError if it or one of its jobs is wrong."""
    study = document.read(path, overrides, Study)
    # Every job is built once, so that a wrong variant fails before hours of the others.
    jobs = list_jobs(study, Path(), str(path))
    _check_decisive_heads(study, jobs, str(path))
    return study


def list_jobs(study: Study, folder: Path, source: str = "study") -> dict[str, Job]:
    """List the jobs of a study by the names of their folders, in an order in which they can be run.

    Args:
        study: the study.
        folder: folder of the study.
        source: beginning of an error message.

    Raises:
        ValueError: a variant makes no valid job.
    """
    result: dict[str, Job] = {}
    content = study.job
    if study.shared:
        seeded = {"seed": study.seeds[0], **content}
        shared = build_job(seeded, {}, f"{study.name}-{SHARED}", f"{source}: job")
        result[SHARED] = shared
        check_templates(study.shared, shared.train, source)
        result |= _list_applied(study, seeded, shared, folder, SHARED, study.seeds[0], source)
        content = continue_from(content, study.shared, shared, folder / SHARED)
    for seed in study.seeds:
        for variant, changes in study.variants.items():
            if seed not in study.list_seeds(variant):
                continue
            name = format_run(variant, seed)
            seeded = {"seed": seed, **content}
            label = f"{source}: variants.{variant}"
            job = build_job(seeded, changes, f"{study.name}-{name}", label)
            result[name] = job
            if study.shared:
                check_templates(study.shared, {**result[SHARED].train, **job.train}, label)
            # Evaluations follow the run whose model they need.
            result |= _list_applied(study, seeded, job, folder, variant, seed, source)
    return result


def _check_decisive_heads(study: Study, jobs: Mapping[str, Job], source: str) -> None:
    """Check that the runs for which heads are chosen have CMAI, and that the set is known; ValueError if not."""
    settings = study.decisive_heads
    if settings is None:
        return
    for name in settings.variants:
        if not isinstance(jobs[format_run(name, study.seeds[0])].model.cmai, CMAI):
            raise ValueError(f"{source}: decisive_heads.variants: got {name}, allowed: runs that set model.cmai")
    # All runs of a study have the sets of its job.
    any_job = next(iter(jobs.values()))
    set_names = [*(EASY_VQA_SETS if any_job.data.source else ()), *any_job.data.set_names]
    if settings.data not in set_names:
        raise ValueError(f"{source}: decisive_heads.data: got {settings.data}, allowed: {', '.join(set_names)}")


def check_templates(shared: Sequence[str], stages: Mapping[str, Stage], source: str) -> None:
    """Check that a stage with the chat template can start from the model of the shared stages.

    Args:
        shared: names of the shared stages; there may be none.
        stages: all stages of a run, shared ones included.
        source: beginning of an error message.

    Raises:
        ValueError: the model of the shared stages has no chat template.
    """
    chat = [name for name, stage in stages.items() if name not in shared and stage.template == "chat"]
    if chat and shared and stages[shared[-1]].template == "plain":
        raise ValueError(
            f"{source}: job.train.{shared[-1]}.template: got plain before {chat[0]} with chat, allowed: chat, because "
            "a model that was last trained with captions alone has no chat template"
        )


def _list_applied(
    study: Study, tree: Mapping[str, Any], trained: Job, folder: Path, variant: str, seed: int, source: str
) -> dict[str, Job]:
    """List the evaluations of the model of a trained job with other settings.

    Args:
        study: the study.
        tree: content of the job that trained.
        trained: that job.
        folder: folder of the study.
        variant: name of the variant, or SHARED.
        seed: seed of the training.
        source: beginning of an error message.
    """
    result = {}
    for name, applied in study.applied.items():
        if applied.variant == variant:
            run, stage = (SHARED, study.shared[-1]) if variant == SHARED else (format_run(variant, seed), "")
            evaluated = evaluate_only(tree, trained, folder / run, stage or list(trained.train)[-1])
            title = format_run(name, seed)
            label = f"{source}: applied.{name}.changes"
            result[title] = build_job(evaluated, applied.changes, f"{study.name}-{title}", label)
    return result


def evaluate_only(tree: Mapping[str, Any], trained: Job, folder: Path, stage: str) -> dict[str, Any]:
    """Return the content of a job that evaluates the model of a trained job, with the methods of its training.

    Args:
        tree: content of the job that trained.
        trained: that job.
        folder: its run folder.
        stage: stage after which the model is evaluated.
    """
    model = {"checkpoint": locate_model(trained, folder, stage)}
    tasks = {name: document.write_plain(task) for name, task in trained.evaluation_tasks.items()}
    data = tree.get("data", {}) | {"source": None, "make": {}, "sets": locate_sets(trained, folder)}
    return {**tree, "data": data, "model": model, "train": {}, "evaluate": {**tree["evaluate"], "tasks": tasks}}


def continue_from(tree: dict[str, Any], stages: Sequence[str], shared: Job, folder: Path) -> dict[str, Any]:
    """Continue a job after stages of the shared run: with the model of the last of them, and the sets made there.

    After all stages the model is only evaluated.

    Args:
        tree: content of the job.
        stages: names of the finished stages.
        shared: job of the shared run.
        folder: folder of the shared run.
    """
    result = tree | {
        "data": tree.get("data", {}) | {"source": None, "make": {}, "sets": locate_sets(shared, folder)},
        "train": {name: stage for name, stage in tree["train"].items() if name not in stages},
    }
    if shared.evaluate and not shared.evaluate.tasks:
        # What is asked without names depends on the last stage, which may be a shared one.
        tasks = {name: document.write_plain(task) for name, task in shared.evaluation_tasks.items()}
        result["evaluate"] = {**tree["evaluate"], "tasks": tasks}
    if stages:
        # The checkpoint replaces the parts of the model, but its methods may differ between variants.
        methods = {name: value for name, value in tree["model"].items() if name in METHODS}
        result["model"] = {**methods, "checkpoint": locate_model(shared, folder, stages[-1])}
    return result


def build_job(tree: Mapping[str, Any], changes: Mapping[str, Any], name: str, source: str) -> Job:
    """Build a job with a name and changed values, by dotted path; an error message begins with `source`."""
    # set_value changes the tree in place, and the variants share it.
    copied = copy.deepcopy({"name": name, **tree})
    for dotted, value in changes.items():
        document.set_value(copied, dotted, value, f"{source}.{dotted}")
    return document.build(copied, Job, source)


def _share_sets(study: Study, folder: Path) -> Study:
    """Name the folders of the sets that are made of data in other forms, so that the first run makes them for all."""
    from jobs import resolve  # Imported late, as in `run_study`

    if any(key == "data" or key.startswith("data.make") for changes in study.variants.values() for key in changes):
        return study  # Variants make sets of their own
    job = build_job(study.job, {}, study.name, "job")
    data = resolve.resolve_data(job.data, folder / SHARED if study.shared else folder)
    return replace(study, job={**study.job, "data": document.write_plain(data)})


def run_study(study: Study, folder: Path, allow_changes: bool = False, share: Share = Share(1, 1)) -> None:
    """Run the unfinished jobs of a study in its folder, one after the other, then write the tables.

    Args:
        study: the study.
        folder: folder of the study.
        allow_changes: as for `jobs.run.run`.
        share: runs of the study that are run here, besides the shared stages. The tables have all finished runs in the
            folder.

    Raises:
        ValueError: as for `jobs.run.run`, or there are more shares than runs.
    """
    selected = share.select_runs(study)
    # Imported late: a wrong study is reported before torch and Ray are loaded.
    from jobs import decisive_heads, model_parts, ownership, run, tables
    from pipelines.core import cluster

    folder = folder.resolve()
    runs = list_jobs(_share_sets(study, folder), folder)
    ownership.make_folder(folder)
    # Written first: the tables of an unfinished study name its variants, too.
    with failures.locate_errors(folder / STUDY_FILE):
        storage.write(str(folder / STUDY_FILE), document.write(study).encode())
    selected_jobs = {name: job for name, job in runs.items() if name == SHARED or name in selected}
    for job in selected_jobs.values():
        model_parts.locate_parts(job.model)  # A missing package is named before Ray starts
    heads_settings = study.decisive_heads
    variants_with_heads = heads_settings.variants if heads_settings else ()
    with_heads = {format_run(name, seed) for name in variants_with_heads for seed in study.seeds}
    # One Ray for all runs, because its start takes seconds.
    with cluster.open_session():
        for number, (name, job) in enumerate(selected_jobs.items(), start=1):
            print(f"[{number}/{len(selected_jobs)}] {name}", flush=True)
            until = study.shared[-1] if name == SHARED else None
            if heads_settings and name in with_heads:
                job = decisive_heads.choose_heads(job, folder / name, heads_settings)
            # Another share may train the shared stages in the same folder.
            lock_timeout_s = math.inf if name == SHARED and share.total > 1 else 0
            run.run(job, folder / name, allow_changes, until, lock_timeout_s=lock_timeout_s)
    # Runs of other shares may have no folder here.
    finished = [folder / name for name in runs if name != SHARED and (folder / name).is_dir()]
    tables.write_tables(finished, folder, tables.find_scorer)
    print(_describe_end(study, folder, share, [name for name in runs if name != SHARED and name not in selected]))


def _describe_end(study: Study, folder: Path, share: Share, other_runs: Sequence[str]) -> str:
    """Describe the end of a call: the tables, and the runs of other shares that are not finished here."""
    missing = sum(not (folder / name / RESULT_FILE).exists() for name in other_runs)
    status = (
        f"{study.name} is finished"
        if share.total == 1
        else f"{study.name}: share {share.number}/{share.total} is finished"
    )
    rest = f"; {missing} runs of other shares are not finished in this folder" if missing else ""
    return f"{status}{rest}; its tables: {folder / 'tables.html'}"
