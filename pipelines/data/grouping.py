"""Global batches of one modality and similar lengths, for little padding: LLaVA's grouping with random access.

The samples of each modality are permuted per epoch and divided into megabatches of several global batches. Each
megabatch is sorted by length and cut into its batches. All batches of the epoch come in a seeded order.

Samples that do not fill a batch of one modality are leftovers. They make mixed batches, shuffled among the others, and
the parts of the epoch's first and last batch that share a batch with the previous or next epoch. So every sample comes
exactly once per epoch, all batches are full, and the number of mixed batches per epoch is at most the number of
modalities plus one. LLaVA merges leftovers, too, but its order depends on the number of workers.

Cost: each batch reads and sorts the lengths of its megabatch, whatever the size of the epoch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Int, Shaped

from pipelines.data.permutation import permute


@dataclass(frozen=True, kw_only=True, eq=False)
class LengthGroups:
    """Modalities and lengths of a source.

    Args:
        counts: number of samples of each modality.
        lengths: function from sample numbers to lengths, such as `array.__getitem__` of an array or a memory map.
        megabatch: number of global batches that are sorted by length together.
        numbers: sample numbers, modality by modality. None if samples are numbered in that order, which saves memory.
    """

    counts: tuple[int, ...]
    lengths: Callable[[Int[np.ndarray, " rows"]], Shaped[np.ndarray, " rows"]]
    megabatch: int
    numbers: Int[np.ndarray, " samples"] | None = None

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise ValueError(f"counts: got {self.counts}, allowed: at least 1 sample of each modality")
        if self.megabatch < 1:
            raise ValueError(f"megabatch: got {self.megabatch}, allowed: at least 1")
        if self.numbers is not None and len(self.numbers) != sum(self.counts):
            raise ValueError(f"numbers: got {len(self.numbers)}, allowed: {sum(self.counts)}, the sum of counts")

    @classmethod
    def from_columns(
        cls, modality: Shaped[np.ndarray, " samples"], lengths: Shaped[np.ndarray, " samples"], megabatch: int
    ) -> Self:
        """Make groups from columns of the index, in memory."""
        if len(modality) != len(lengths):
            raise ValueError(f"lengths: got {len(lengths)}, allowed: {len(modality)}, one for each modality")
        counts = tuple(np.unique(modality, return_counts=True)[1].tolist())
        # A process keeps these numbers as long as the stage runs: 4 bytes a sample.
        numbers = np.argsort(modality, kind="stable").astype(np.min_scalar_type(max(len(modality) - 1, 0)))
        return cls(counts=counts, lengths=lengths.__getitem__, megabatch=megabatch, numbers=numbers)

    def permute(
        self, positions: Int[np.ndarray, " positions"], global_batch_size: int, seed: int, epoch: int
    ) -> Int[np.ndarray, " positions"]:
        """Return the samples at positions of an epoch.

        Args:
            positions: positions of one global batch, or of its part that is in this epoch.
            global_batch_size: samples per global batch.
            seed: seed of the permutations.
            epoch: number of the epoch.
        """
        # An epoch has a head (the end of a batch of the previous epoch), full batches, and a tail.
        samples = sum(self.counts)
        head = min(-epoch * samples % global_batch_size, samples)
        full = (samples - head) // global_batch_size
        pure = np.array(self.counts) // global_batch_size
        if pure.sum() > full:
            pure[pure.argmax()] -= 1  # the epoch's head and tail need its samples
        num_in_pure = int(pure.sum()) * global_batch_size
        # A full batch is exchanged for another one by the permutation of batches; the first ones are of one modality.
        after_head = positions - head
        batch = int(after_head[0]) // global_batch_size
        if 0 <= batch < full:
            permuted = int(permute(np.array([batch]), full, seed, epoch, 0)[0])
            if permuted < pure.sum():
                return self._take_sorted(permuted, pure, global_batch_size, seed, epoch)
            after_head += (permuted - batch) * global_batch_size
        # Leftovers fill the mixed batches, then the tail of the epoch, then its head.
        leftover_positions = after_head + (samples if batch < 0 else 0) - num_in_pure
        return self._take_leftovers(leftover_positions, pure * global_batch_size, seed, epoch)

    def _take_sorted(
        self, batch: int, pure: Int[np.ndarray, " modalities"], global_batch_size: int, seed: int, epoch: int
    ) -> Int[np.ndarray, " global_batch_size"]:
        """Return a batch of one modality, sorted by length. `batch` counts through the modalities."""
        # Modality and megabatch of the batch.
        ends = np.cumsum(pure)
        modality = int(np.searchsorted(ends, batch, side="right"))
        megabatch, index = divmod(batch - int(ends[modality] - pure[modality]), self.megabatch)
        stop = min((megabatch + 1) * self.megabatch, int(pure[modality]))
        ranks = np.arange(megabatch * self.megabatch * global_batch_size, stop * global_batch_size)
        # Sort the megabatch, and cut the batch out of it.
        samples = self._take_ranks(modality, ranks, seed, epoch)
        by_length = samples[np.argsort(self.lengths(samples), kind="stable")]
        return by_length[index * global_batch_size : (index + 1) * global_batch_size]

    def _take_leftovers(
        self,
        positions: Int[np.ndarray, " positions"],
        num_batched: Int[np.ndarray, " modalities"],
        seed: int,
        epoch: int,
    ) -> Int[np.ndarray, " positions"]:
        """Return the samples at positions of the leftovers: all beyond the first `num_batched` of each modality."""
        remaining = np.array(self.counts) - num_batched
        ends = np.cumsum(remaining)
        modalities = np.searchsorted(ends, positions, side="right")
        ranks = positions - (ends - remaining - num_batched)[modalities]
        result = np.empty_like(positions)
        for modality in np.unique(modalities):
            in_modality = modalities == modality
            result[in_modality] = self._take_ranks(int(modality), ranks[in_modality], seed, epoch)
        return result

    def _take_ranks(
        self, modality: int, ranks: Int[np.ndarray, " ranks"], seed: int, epoch: int
    ) -> Int[np.ndarray, " ranks"]:
        """Return the samples at ranks of the modality's permutation."""
        rows = sum(self.counts[:modality]) + permute(ranks, self.counts[modality], seed, epoch, 1, modality)
        return rows if self.numbers is None else self.numbers[rows].astype(np.int64)
