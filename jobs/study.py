"""Run a study: one job in several variants and with several seeds, which share their first stages.

    name: mini
    seeds: [0, 1]
    shared: [tower, pretrain]      # trained once, with the model of the job; variants start from the result
    job: {…}                       # a job file without name and seed
    variants:
      llava: {model.vmtc: null, model.cmai: null}
      vmtc: {model.cmai: null}

runs/NAME/study.yaml       the resolved study
runs/NAME/shared/          run of the shared stages
runs/NAME/shards/SET/      a set that is made of data in another form; in shared/ if there are shared stages
runs/NAME/VARIANT-SEED/    run of one variant with one seed
runs/NAME/tables.html      results; see pipelines/report/tables.py

Each run is an ordinary job: its job.yaml can be run and resumed on its own.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt, MinLen

from jobs import document
from jobs.layout import locate_model, locate_sets
from jobs.schema import Job, Name
from jobs.type_text import format_value
from pipelines.core import failures
from redux.settings import METHODS

SHARED = "shared"
STUDY_FILE = "study.yaml"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Content of a study file.

    Args:
        name: name of the study and of its folder.
        seeds: seeds with which each variant is trained. Shared stages use the first.
        shared: names of the job's first stages, in order, that are trained once for all variants.
        job: content of a job file without name and seed.
        variants: the variants by name, each with values that replace those of the job, by dotted path.
    """

    name: Name
    seeds: Annotated[tuple[Annotated[int, Ge(0), Lt(2**32)], ...], MinLen(1)] = (0,)
    shared: tuple[Name, ...] = ()
    job: dict[str, Any]
    variants: Annotated[dict[Name, dict[str, Any]], MinLen(1)]

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {list(self.seeds)}, allowed: each once")
        if reserved := {"name", "seed"} & self.job.keys():
            raise ValueError(f"job: got a {min(reserved)}, allowed: none, as each run has its own")
        stages = check_shared_stages(self.shared, self.job)
        if self.shared and len(self.shared) == len(stages):
            raise ValueError(
                f"shared: got {', '.join(self.shared)}, allowed: the first of the stages {', '.join(stages)}, not all"
            )


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
            f"shared: got {', '.join(shared)}, allowed: {', '.join([*shared, *others[:1]])}, as the others start from "
            "the whole model of a language stage, and a contrastive stage makes a tower alone"
        )
    return list(stages)


def load(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Load the study of a YAML file after overrides; ValueError if it or one of its jobs is wrong."""
    study = document.read(path, overrides, Study)
    # every job is built once, so that a wrong variant fails before hours of the others
    list_jobs(study, Path(), str(path))
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
    result, tree = {}, study.job
    if study.shared:
        seeded = {"seed": study.seeds[0], **tree}
        result[SHARED] = shared = build_job(seeded, {}, f"{study.name}-{SHARED}", f"{source}: job")
        tree = continue_from(tree, study.shared, shared, folder / SHARED)
    for seed in study.seeds:
        for variant, changes in study.variants.items():
            name = f"{variant}-{seed}"
            seeded = {"seed": seed, **tree}
            result[name] = build_job(seeded, changes, f"{study.name}-{name}", f"{source}: variants.{variant}")
    return result


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
        # what is asked without names depends on the last stage, which may be a shared one
        tasks = {name: document.write_plain(task) for name, task in shared.evaluation_tasks.items()}
        result["evaluate"] = {**tree["evaluate"], "tasks": tasks}
    if stages:
        # the checkpoint replaces the parts of the model, but its methods may differ between variants
        methods = {name: value for name, value in tree["model"].items() if name in METHODS}
        result["model"] = {**methods, "checkpoint": locate_model(shared, folder, stages[-1])}
    return result


def build_job(tree: Mapping[str, Any], changes: Mapping[str, Any], name: str, source: str) -> Job:
    """Build a job with a name and changed values, by dotted path; an error message begins with `source`."""
    # set_value changes the tree in place, and the variants share it
    copied = copy.deepcopy({"name": name, **tree})
    for dotted, value in changes.items():
        document.set_value(copied, dotted, value, f"{source}.{dotted}")
    return document.build(copied, Job, source)


def _share_sets(study: Study, folder: Path) -> Study:
    """Name the folders of the sets that are made of data in other forms, so that the first run makes them for all."""
    from jobs import resolve  # imported late, as in `run_study`

    if any(key == "data" or key.startswith("data.make") for changes in study.variants.values() for key in changes):
        return study  # variants make sets of their own
    job = build_job(study.job, {}, study.name, "job")
    data = resolve.resolve_data(job.data, folder / SHARED if study.shared else folder)
    return replace(study, job={**study.job, "data": document.write_plain(data)})


def run_study(study: Study, folder: Path, allow_changes: bool = False) -> None:
    """Run the unfinished jobs of a study in its folder, one after the other, then write the tables.

    Args:
        study: the study.
        folder: folder of the study.
        allow_changes: as for `jobs.run.run`.
    """
    # imported late: a wrong study is reported before torch and Ray are loaded
    from jobs import claims, run, tables
    from pipelines.core import cluster

    folder = folder.resolve()
    runs = list_jobs(_share_sets(study, folder), folder)
    claims.make_folder(folder)
    # one Ray for all runs, because its start takes seconds
    with cluster.open_session():
        for number, (name, job) in enumerate(runs.items(), start=1):
            print(f"[{number}/{len(runs)}] {name}", flush=True)
            run.run(job, folder / name, allow_changes, until=study.shared[-1] if name == SHARED else None)
    with failures.locate_errors(folder / STUDY_FILE):
        (folder / STUDY_FILE).write_text(document.write(study), encoding="utf-8")
    tables.write_tables([folder / name for name in runs if name != SHARED], folder, tables.find_scorer)
    print(f"{study.name} is finished; its tables: {folder / 'tables.html'}")
