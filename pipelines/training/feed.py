"""Micro-batches of one rank, from a Ray Data dataset that all ranks share."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipelines.data import ingest
from pipelines.training import checkpoint
from pipelines.training.plan import StageWork


class Feed:
    """Micro-batches of this rank for the stages of its group, from one Ray Data dataset.

    Readers take seconds to start. Those of the first stage go on with the next one and read ahead of it, while the
    driver exports the model in between.

    Args:
        stages: stages in their order, from the current one.
    """

    def __init__(self, stages: Sequence[StageWork]) -> None:
        self.stages = list(stages)
        self.batches: Iterator[ingest.Batch] | None = None
        self.next_index = 0
        """Index of the stage whose micro-batches come next."""

    def prepare(self, work: StageWork) -> None:
        """Start the readers of a stage that has no checkpoint, so that they start while the model is built.

        A collective. With a checkpoint, the first micro-batch is known only when it is loaded.
        """
        has_checkpoint = checkpoint.broadcast_from_rank_0(lambda: checkpoint.exists(work.plan.folder))
        index = self._find_index(work)
        if not has_checkpoint and (self.batches is None or index != self.next_index):
            self.batches, self.next_index = self._open(index, cursor=0), index

    def read(self, work: StageWork, cursor: int) -> Iterator[ingest.Batch]:
        """Yield the micro-batches of the global batches cursor+1..steps of a stage. A collective.

        Raises:
            RuntimeError: Ray Data delivered another micro-batch than the next one.
        """
        rank, workers = dist.get_rank(), dist.get_world_size()
        index = self._find_index(work)
        # The readers of earlier stages are at the beginning of this one, unless it starts from a checkpoint.
        if self.batches is None or index != self.next_index or cursor:
            self.batches = self._open(index, cursor)
        # Micro-batches go to the ranks in turn: rank r gets r, r + workers, ... A wrong one would change the result.
        accumulation_steps = work.plan.stage.count_accumulation_steps(workers)
        for local_index in range(cursor * accumulation_steps, work.steps * accumulation_steps):
            batch = next(self.batches)
            expected = local_index * workers + rank
            if batch["number"] != expected:
                raise RuntimeError(f"rank {rank}: got micro-batch {batch['number']}, expected {expected}")
            self.next_index = index + (local_index + 1 == work.steps * accumulation_steps)
            yield batch

    def _find_index(self, work: StageWork) -> int:
        return [stage.plan.name for stage in self.stages].index(work.plan.name)

    def _open(self, index: int, cursor: int) -> Iterator[ingest.Batch]:
        """Start the readers of a stage and of those after it. A collective."""
        workers = dist.get_world_size()
        # Rank 0 alone creates the dataset, so that one set of readers serves all ranks and a split hands each block to
        # one of them. The others get their iterators from it.
        splits: list[Any] = [None] * workers
        if dist.get_rank() == 0:
            segments: list[ingest.Segment] = []
            for work in self.stages[index:]:
                count = work.plan.stage.count_accumulation_steps(workers) * workers
                segments.append(ingest.Segment(work.reader, (0 if segments else cursor) * count, work.steps * count))
            leaves_cpus = self.stages[index].plan.leaves_cpus_to_readers(uses_gpus=torch.cuda.is_available())
            prefetched_blocks = min(segment.count_prefetched_blocks(workers) for segment in segments)
            splits = [(stream, prefetched_blocks) for stream in ingest.make_streams(segments, workers, leaves_cpus)]
        received: list[Any] = [None]
        dist.scatter_object_list(received, splits, src=0)
        stream, prefetched_blocks = received[0]
        # It starts to read now, so that the readers start while the model is built.
        return self._keep_splits(ingest.read_stream(stream, prefetched_blocks), splits)

    @staticmethod
    def _keep_splits(batches: Iterator[ingest.Batch], splits: list[Any]) -> Iterator[ingest.Batch]:
        """Yield the micro-batches, and keep all streams until then: the first one owns the execution."""
        yield from batches
        splits.clear()
