"""Validation loss: the loss of the samples that `data.hold_out` keeps out of training.

Ranks take the micro-batches of held-out samples in turn, set by set in the stored order. A thread of each rank reads
one ahead, without Ray Data: a second dataset would take CPUs from the readers of training. The loss is the mean over
tokens or samples, as `loss_reduction` says, of the held-out samples of all sets together. It does not depend on the
number of workers, except by rounding: sums are float64.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from pipelines.data import ingest
from pipelines.training.engine import DeepSpeedEngineProtocol, move_to_device
from pipelines.training.hooks import Hook, StepResult
from pipelines.training.metrics import VALIDATION_LOSS
from pipelines.training.plan import StagePlan
from redux.conversation import IGNORE_INDEX


class ValidationHook(Hook):
    """Hook that adds the validation loss to the metrics of a step, every `validate_steps` steps and after the last one.

    Stands before the hook that records the step, and after the one that ends training on request.

    Args:
        engine: engine of this rank.
        plan: plan of the stage.
        reader: reader of the training samples.
    """

    def __init__(self, engine: DeepSpeedEngineProtocol, plan: StagePlan, reader: ingest.Reader) -> None:
        self.engine, self.plan = engine, plan
        self.readers = plan.build_validation_readers(reader)
        self.every = plan.stage.validate_steps or plan.stage.save_steps

    def on_step_end(self, step: StepResult) -> None:
        # A stopped run has only seconds left for its checkpoint.
        is_stopped = step.votes.get("stop", 0) > 0
        if (step.number % self.every == 0 or step.is_last) and not is_stopped:
            step.values[VALIDATION_LOSS] = compute_validation_loss(self.engine, self.plan, self.readers)


def compute_validation_loss(
    engine: DeepSpeedEngineProtocol, plan: StagePlan, readers: Sequence[ingest.Reader]
) -> float:
    """Compute the mean loss of the held-out samples. A collective; all ranks return the same number.

    Args:
        engine: engine of this rank.
        plan: plan of the stage.
        readers: readers of `StagePlan.build_validation_readers`.
    """
    # The micro-batches of all ranks, and those of this one.
    parts = [ValidationBatch(reader, number) for reader in readers for number in range(reader.order.count_batches(1))]
    # With ZeRO 3 every forward pass is a collective, so all ranks compute equally many; the surplus ones count nothing.
    parts += [parts[0]._replace(counts=False)] * (-len(parts) % engine.dp_world_size)
    local_parts = parts[engine.global_rank :: engine.dp_world_size]
    # Total loss and its divisor. Dropout is off, and no rank keeps activations.
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.module.eval()
    try:
        with torch.no_grad():
            for part, batch in zip(local_parts, _read_ahead(local_parts), strict=True):
                weight, count = _weigh_samples(batch, part.num_real, plan)
                loss = engine(**move_to_device(batch, engine), weight=weight.to(engine.device))
                sums += torch.stack([loss.double(), count.to(sums)])
    finally:
        engine.module.train()
    # The divisor is zero if no held-out sample has a labelled token.
    dist.all_reduce(sums)
    total, count = sums.tolist()
    return total / count if count else math.nan


class ValidationBatch(NamedTuple):
    """A micro-batch of held-out samples.

    Args:
        reader: its reader.
        number: its number.
        counts: False for a repeated one, whose loss counts nothing.
    """

    reader: ingest.Reader
    number: int
    counts: bool = True

    @property
    def num_real(self) -> int:
        """Number of samples at its start that count; the others fill up the last micro-batch of a set."""
        return self.reader.order.count_real_samples(self.number, 1) if self.counts else 0


def _weigh_samples(batch: ingest.Batch, num_real: int, plan: StagePlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the weight of each sample of a micro-batch, and the sum by which the total loss is divided.

    Args:
        batch: the micro-batch.
        num_real: number of samples at its start that count; the others fill it up.
        plan: plan of the stage.
    """
    size = len(batch["input_ids"])
    is_real = torch.arange(size) < num_real
    # The contrastive loss of a micro-batch is a mean over its samples.
    if plan.stage.objective == "contrastive":
        return is_real / size, is_real.sum() / size
    tokens = torch.from_numpy(np.asarray((batch["labels"][:, 1:] != IGNORE_INDEX).sum(axis=1)))
    if plan.stage.loss_reduction == "sample":
        return is_real / tokens.clamp(min=1), is_real.sum()
    return is_real.float(), tokens[is_real].sum()


def _read_ahead(parts: Sequence[ValidationBatch]) -> Iterator[ingest.Batch]:
    """Read micro-batches; a thread reads the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(parts[0].reader, parts[0].number)
        for following in parts[1:]:
            batch = future.result()
            future = pool.submit(following.reader, following.number)
            yield batch
        yield future.result()
