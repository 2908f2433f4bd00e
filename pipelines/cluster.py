"""The Ray that a run uses: the one that RAY_ADDRESS names, or one of its own that ends with it."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data
import torch

# read by ray and deepspeed when they are imported, here and in every worker
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


@contextmanager
def session() -> Iterator[None]:
    """Ray for the length of a with block, quiet but for progress bars and warnings."""
    environment = {**ENVIRONMENT, **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})}
    environment = {name: os.environ.setdefault(name, value) for name, value in environment.items()}
    terminate = signal.getsignal(signal.SIGTERM)
    ray.init(
        address=os.environ.get("RAY_ADDRESS", "local"),
        runtime_env={"env_vars": environment},
        include_dashboard=None if "RAY_ADDRESS" in os.environ else False,
        logging_level=logging.ERROR,
        log_to_driver=False,  # what went wrong in a worker comes back as an exception
    )
    signal.signal(signal.SIGTERM, terminate)  # Ray puts its own in place
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # each long step has a bar of its own
    try:
        yield
    finally:
        ray.shutdown()
