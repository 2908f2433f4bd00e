"""Which samples make global batch i: a pure function of (number of samples, global batch, seed).

Epochs follow each other without a seam: the samples of epoch 0 in a seeded permutation, then those of epoch 1 in
another, and global batch i is the i-th slice of that stream.  So every sample comes exactly once an epoch, every batch
is full, world size does not appear, and a place in the order is one integer.

The permutation is a Feistel network over the smallest even power of two that holds all numbers, walked until it lands
inside (Black and Rogaway 2002): any place is computed at once, without a table of the epoch.
Cost: about 1 microsecond a sample, and no memory but the batch.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Order:
    """Order of `samples` samples in global batches of `global_batch`."""

    samples: int
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: got {self.samples}, allowed: at least 1")

    def batches(self, epochs: float) -> int:
        """Global batches of that many epochs; the last may reach into the next epoch, so that it is full."""
        return -(-max(round(epochs * self.samples), 1) // self.global_batch)

    def batch(self, number: int) -> Int[np.ndarray, " global_batch"]:
        """Sample numbers of global batch `number`, counted from 0 over all epochs."""
        place = number * self.global_batch + np.arange(self.global_batch, dtype=np.int64)
        epoch, within = np.divmod(place, self.samples)
        result = np.empty_like(place)
        for one in np.unique(epoch):
            result[epoch == one] = permute(within[epoch == one], self.samples, self.seed, int(one))
        return result


def permute(place: Int[np.ndarray, " places"], samples: int, seed: int, epoch: int) -> Int[np.ndarray, " places"]:
    """Where a seeded permutation of 0..samples-1 sends `place`; another one each epoch."""
    half = max((samples - 1).bit_length() + 1, 2) // 2
    keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)
    result = _feistel(place.astype(np.uint64), half, keys)
    while (outside := result >= samples).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(value: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0..4**half-1: each round mixes one half of the bits into the other."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for key in keys:
        left, right = right, left ^ (_hash(right + key) & mask)
    return (left << bits) | right


def _hash(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
