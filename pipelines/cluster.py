"""The Ray that a run uses: the one that RAY_ADDRESS names, or one of its own that ends with it."""

import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
import ray.data
from transformers.utils.logging import disable_progress_bar

# read by libraries here and in every worker; a task is one thread, so tokenizers must not start more
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_AIR_NEW_OUTPUT": "0",  # of Tune, which would print tables in between
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed; Ray's own is 2
    # how long workers wait for machines of which one has just died, before others are looked for; Ray's own is 60
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # how soon a notice is heard; Ray's own is 5 of perhaps 30
}


@contextmanager
def session() -> Iterator[None]:
    """Ray for the length of a with block, quiet but for progress bars and errors; one within another is the same."""
    if ray.is_initialized():
        yield
        return
    environment = {name: os.environ.setdefault(name, value) for name, value in ENVIRONMENT.items()}
    disable_progress_bar()  # of transformers, which would show one for each file it reads
    own = _own()
    if own:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of what Ray's C++ side prints over the bars
    terminate = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local" if own else os.environ["RAY_ADDRESS"],
        runtime_env={"env_vars": environment},
        include_dashboard=False if own else None,
        logging_level=logging.ERROR,
        log_to_driver=False,  # what went wrong in a worker comes back as an exception
    )
    signal.signal(signal.SIGTERM, terminate)  # Ray puts its own in place
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False  # each long step has a bar of its own
    try:
        yield
    finally:
        ray.shutdown()


def require(needed: Mapping[str, float], what: str) -> None:
    """ValueError where Ray runs on this machine alone and has less: what needs it would wait without end.

    needed: by Ray's names, CPU or GPU.
    """
    for name, count in needed.items():
        have = ray.cluster_resources().get(name, 0)
        if _own() and have < count:
            raise ValueError(f"{what} needs {count:g} {name}s, allowed: {have:g}, which this machine has")


def gpus() -> float:
    """GPUs that Ray has."""
    return float(ray.cluster_resources().get("GPU", 0))


def _own() -> bool:
    """Whether the run starts a Ray of its own, since none is named."""
    return not os.environ.get("RAY_ADDRESS")
