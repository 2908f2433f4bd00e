"""Resources of runs: a Ray of this machine alone would wait for missing ones forever."""

from typing import NamedTuple

import ray

from jobs.schema import Job
from pipelines.core import cluster


class Shortage(NamedTuple):
    """A resource of which this machine has too little.

    Args:
        resource: Ray's name of it, "CPU" or "GPU".
        needed: needed amount.
        available: amount that this machine has.
    """

    resource: str
    needed: float
    available: float


def find_shortage(job: Job, workers: int, actors: int, runs: int = 1) -> Shortage | None:
    """Find a resource that a Ray of this machine alone lacks for runs of a job; None if there is none.

    Workers and actors take half a CPU each, and one CPU is left to readers. The workers of an elastic group take whole
    CPUs if there are no GPUs, and leave none to readers (`pipelines.training.driver`).

    Args:
        job: the job.
        workers: workers of a run; 0 if it does not train.
        actors: copies of the model that answer in a run; 0 if it does not evaluate.
        runs: number of runs at the same time.
    """
    if not cluster.is_private():
        return None  # An autoscaler or the end of another job may bring what is missing
    processes = runs * max(workers, actors)
    resources = ray.cluster_resources()
    has_gpus = cluster.count_gpus() > 0
    # Shares of a GPU cannot be added up: Ray gives a process no parts of two GPUs.
    if has_gpus and processes > cluster.count_processes_on_gpus(job.gpu_share):
        return Shortage("GPU", processes * job.gpu_share, resources.get("GPU", 0))
    fewest, most = job.worker_range or (1, 1)
    if fewest < most and not has_gpus:
        needed = max(runs * workers, runs * actors / 2 + 1 if actors else 0)
    else:
        needed = processes / 2 + 1 if processes else 0
    available = resources.get("CPU", 0)
    return Shortage("CPU", needed, available) if needed > available else None
