"""Global batches of one modality and of similar lengths, so that little is padded: LLaVA's grouping, at any place.

Of each modality the samples of an epoch, in a seeded permutation, fall into megabatches of some global batches; each
megabatch is sorted by length and cut into its batches, and all batches of the epoch come in a seeded order.

What does not fill a batch of its own modality is left over.  Leftovers make mixed batches, shuffled among the others,
and the parts of an epoch's first and last batch that share a batch with the epoch before or after.  So every sample
comes exactly once an epoch, all batches are full, and of an epoch's batches at most one more than there are modalities
is mixed.  LLaVA merges leftovers, too, but its order depends on the number of workers.
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

    counts: samples of each modality.  megabatch: global batches that are sorted by length together.
    numbers: the sample numbers, modality by modality; None where samples are numbered so, which takes no memory.
    lengths: of the samples with these numbers; `array.__getitem__` will do, also of one that is mapped from disk.
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
    def of(
        cls, modality: Shaped[np.ndarray, " samples"], lengths: Shaped[np.ndarray, " samples"], megabatch: int
    ) -> Self:
        """From columns of the index, held in memory."""
        if len(modality) != len(lengths):
            raise ValueError(f"lengths: got {len(lengths)}, allowed: {len(modality)}, one for each modality")
        counts = tuple(np.unique(modality, return_counts=True)[1].tolist())
        numbers = np.argsort(modality, kind="stable")
        return cls(counts=counts, lengths=lengths.__getitem__, megabatch=megabatch, numbers=numbers)

    def arrange(
        self, within: Int[np.ndarray, " places"], global_batch_size: int, seed: int, epoch: int
    ) -> Int[np.ndarray, " places"]:
        """Samples at these places of an epoch: a whole global batch, or all of one that lies in this epoch."""
        samples = sum(self.counts)
        head = min(-epoch * samples % global_batch_size, samples)  # places in a batch that began in the epoch before
        full = (samples - head) // global_batch_size
        pure = np.array(self.counts) // global_batch_size
        if pure.sum() > full:
            pure[pure.argmax()] -= 1  # the epoch's head and tail need its samples
        filled = int(pure.sum()) * global_batch_size
        since = within - head
        batch = int(since[0]) // global_batch_size
        if 0 <= batch < full:
            drawn = int(permute(np.array([batch]), full, seed, epoch, 0)[0])
            if drawn < pure.sum():
                return self._similar(drawn, pure, global_batch_size, seed, epoch)
            since += (drawn - batch) * global_batch_size
        # what is left over goes to the mixed batches, then to the tail of the epoch, then to its head
        place = since + (samples if batch < 0 else 0) - filled
        return self._left_over(place, pure * global_batch_size, seed, epoch)

    def _similar(
        self, batch: int, pure: Int[np.ndarray, " modalities"], global_batch_size: int, seed: int, epoch: int
    ) -> Int[np.ndarray, " global_batch_size"]:
        """Samples of a batch of one modality, by length; batches are counted through the modalities."""
        ends = np.cumsum(pure)
        modality = int(np.searchsorted(ends, batch, side="right"))
        megabatch, turn = divmod(batch - int(ends[modality] - pure[modality]), self.megabatch)
        stop = min((megabatch + 1) * self.megabatch, int(pure[modality]))
        ranks = np.arange(megabatch * self.megabatch * global_batch_size, stop * global_batch_size)
        samples = self._members(modality, ranks, seed, epoch)
        by_length = samples[np.argsort(self.lengths(samples), kind="stable")]
        return by_length[turn * global_batch_size : (turn + 1) * global_batch_size]

    def _left_over(
        self, place: Int[np.ndarray, " places"], taken: Int[np.ndarray, " modalities"], seed: int, epoch: int
    ) -> Int[np.ndarray, " places"]:
        """Samples at these places of what each modality has beyond the `taken` first, one modality after the other."""
        left = np.array(self.counts) - taken
        ends = np.cumsum(left)
        modality = np.searchsorted(ends, place, side="right")
        ranks = place - (ends - left - taken)[modality]
        result = np.empty_like(place)
        for one in np.unique(modality):
            result[modality == one] = self._members(int(one), ranks[modality == one], seed, epoch)
        return result

    def _members(
        self, modality: int, ranks: Int[np.ndarray, " ranks"], seed: int, epoch: int
    ) -> Int[np.ndarray, " ranks"]:
        """Samples at these ranks of the modality's permutation."""
        rows = sum(self.counts[:modality]) + permute(ranks, self.counts[modality], seed, epoch, 1, modality)
        return rows if self.numbers is None else self.numbers[rows]
