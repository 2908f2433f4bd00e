"""Modules that ranks, commands and workers of a Ray import: importing this module imports them all.

The fork server of forks.py imports it, so its forks need not import them again.
"""

import atexit
import gc
import importlib
import os
from types import SimpleNamespace
from unittest.mock import patch

from pipelines.core.imports import import_without
from tests.triton_interpreter import omit_overflow_checks

MODULES = ["pytest", "torch._dynamo", "torch._inductor", "redux.contrastive", "redux.loading"]
"""Modules that do not import Ray. DeepSpeed imports those of torch in every rank."""

MODULES_WITH_RAY = ["pipelines.training.worker", "tests.pipelines.ranks"]

IMPORT_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    # A worker of no job gets its job with its first task.
    "RAY_JOB_ID": "ffffffff",
    # Workers end with this process, which does not end. Their server ends them with their raylet.
    "RAY_RAYLET_PID": "1",
    # Bars as on a terminal.
    "TQDM_MININTERVAL": "0.1",
    # `ray start --block` ends without waiting for work that nobody needs.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
}
"""Variables that libraries read when they are imported."""


def import_modules() -> None:
    """Import the modules, without a draw from Ray's generator of IDs.

    The first draw seeds it. Forks of a process with a seeded generator would draw the same IDs for their tasks.
    """
    import_without("deepspeed", "mlflow")
    for name in MODULES:
        importlib.import_module(name)
    import ray.actor

    class_id = ray.actor.ActorClassID
    # Ray draws an ID for each class of actors.
    draw = SimpleNamespace(from_random=lambda: class_id(os.urandom(class_id.size())))
    with patch.object(ray.actor, "ActorClassID", draw):
        for name in MODULES_WITH_RAY:
            importlib.import_module(name)


# Imports run faster without collections. Later collections, in forks, neither look at these objects nor copy them.
gc.disable()
with patch.dict(os.environ, IMPORT_ENVIRONMENT):
    import_modules()
omit_overflow_checks()
gc.freeze()
gc.enable()
# At the end of the process, libraries report frozen objects as leaked.
atexit.register(gc.unfreeze)
