"""A study: one job in several variants and with several seeds, whose first stages are trained once for all.

    name: mini
    seeds: [0, 1]
    shared: [tower, pretrain]      # trained once, with the job's own model; variants go on from what they made
    job: {…}                       # a job file without name and seed
    variants:
      llava: {model.vmtc: null, model.cmai: null}
      vmtc: {model.cmai: null}

runs/NAME/study.yaml       the study as it was done
runs/NAME/shared/          the run of the shared stages
runs/NAME/VARIANT-SEED/    a run for each variant and seed
runs/NAME/tables.html      what came of it; see pipelines/report/tables.py

Each run is a job like any other: it can be run, looked at and resumed alone, by its job.yaml.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt, MinLen

from jobs import document
from jobs.layout import locate_model, locate_sets
from jobs.schema import Job, Name
from pipelines.core import failures
from redux.settings import METHODS

SHARED = "shared"
FILE = "study.yaml"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study file says.

    seeds: each variant is trained with each of them; what is shared is trained with the first.
    shared: names of the job's first stages, in order.
    job: a job file's content without name and seed.
    variants: for each, values to put in place of the job's, by dotted path.
    """

    name: Name
    seeds: Annotated[tuple[Annotated[int, Ge(0), Lt(2**32)], ...], MinLen(1)] = (0,)
    shared: tuple[Name, ...] = ()
    job: dict[str, Any]
    variants: Annotated[dict[Name, dict[str, Any]], MinLen(1)]

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {list(self.seeds)}, allowed: each once")
        if taken := {"name", "seed"} & self.job.keys():
            raise ValueError(f"job: got a {min(taken)}, allowed: none, as each run has its own")
        stages = self.job.get("train", {})
        if not isinstance(stages, dict):
            raise ValueError(f"job.train: got {stages!r}, allowed: a section of stages")
        stages = list(stages)
        if list(self.shared) != stages[: len(self.shared)] or (self.shared and len(self.shared) == len(stages)):
            raise ValueError(
                f"shared: got {', '.join(self.shared)}, allowed: the first of the stages {', '.join(stages)}, not all"
            )


def load(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study of a YAML file after overrides.  Raises ValueError with one clear line, also for any of its jobs."""
    study = document.read(path, overrides, Study)
    jobs(study, Path(), str(path))
    return study


def jobs(study: Study, folder: Path, source: str = "study") -> dict[str, Job]:
    """The study's jobs by the names of their folders, in the order in which they can be run.

    ValueError where a variant makes none.
    folder: the study's.  source: an error begins with it.
    """
    result, tree = {}, study.job
    if study.shared:
        whole = {"seed": study.seeds[0], **tree}
        result[SHARED] = shared = build(whole, {}, f"{study.name}-{SHARED}", f"{source}: job")
        tree = going_on(tree, study.shared, shared, folder / SHARED)
    for seed in study.seeds:
        for variant, changes in study.variants.items():
            name = f"{variant}-{seed}"
            one = {"seed": seed, **tree}
            result[name] = build(one, changes, f"{study.name}-{name}", f"{source}: variants.{variant}")
    return result


def going_on(tree: dict[str, Any], stages: Sequence[str], shared: Job, folder: Path) -> dict[str, Any]:
    """What is left of a job after these stages of the shared run: it has the last one's model, and the sets made there.

    After all stages the model is only evaluated.
    """
    result = tree | {
        "data": tree.get("data", {}) | {"source": None, "make": {}, "sets": locate_sets(shared, folder)},
        "train": {name: stage for name, stage in tree["train"].items() if name not in stages},
    }
    if stages:
        methods = {name: value for name, value in tree["model"].items() if name in METHODS}
        result["model"] = {**methods, "checkpoint": locate_model(shared, folder, stages[-1])}
    return result


def build(tree: Mapping[str, Any], changes: Mapping[str, Any], name: str, source: str) -> Job:
    """A job of this name with other values at some places; an error begins with `source`."""
    own = copy.deepcopy({"name": name, **tree})
    for dotted, value in changes.items():
        document.put(own, dotted, value, f"{source}.{dotted}")
    return document.build(own, Job, source)


def conduct(study: Study, folder: Path, changed: bool = False) -> None:
    """Do what is left of the study in its folder: each job in turn, then the tables.

    A variant's run that was finished stays; changed: as of jobs.run.run.
    """
    from jobs import run, tables
    from pipelines.core import cluster

    folder = folder.resolve()
    todo = jobs(study, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with cluster.open_session():
        for number, (name, job) in enumerate(todo.items(), start=1):
            print(f"[{number}/{len(todo)}] {name}", flush=True)
            run.run(job, folder / name, changed, until=study.shared[-1] if name == SHARED else None)
    with failures.locate_errors(folder / FILE):
        (folder / FILE).write_text(document.write(study))
    tables.tell([folder / name for name in todo if name != SHARED], folder, tables.scorers())
    print(f"{study.name} is finished; its tables: {folder / 'tables.html'}")
