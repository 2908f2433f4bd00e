"""Start of the workers: all that Ray Train's controller imports of this package.

The controller is a process of its own that unpickles the trainer's arguments. This module does not import torch, so
that the controller starts in a second and leaves the CPUs to the workers, which import it at the same time.
"""

from typing import Any

import ray.train
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.core import failures
from pipelines.training.recorder import RecorderClient

UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)
"""Callbacks of Ray Train 2.60 that start an actor each. The workers make their dataset themselves. The cleaner asks
Ray's dashboard, which a private Ray does not have; `driver.remove_placement_group` does its work."""


class StageTrainer(DataParallelTrainer):
    """Ray Train's trainer without the actors that training here does not use."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [
            callback for callback in super()._create_default_callbacks() if not isinstance(callback, UNUSED_CALLBACKS)
        ]


def run_worker(config: dict[str, Any]) -> None:
    """Train one rank. Ray Train calls it in each worker, again after every fault.

    Args:
        config: keyword arguments of `worker.train_worker`.
    """
    from pipelines.training import worker

    worker.train_worker(**config)


class FaultCallback(ray.train.UserCallback):
    """Callback that sends the errors of failed workers to the recorder.

    It runs in the process of Ray Train's controller.
    """

    def __init__(self, client: RecorderClient) -> None:
        self.client = client

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train before it restarts the workers."""
        self.client.record_fault({rank: failures.classify_error(error) for rank, error in worker_exceptions.items()})
