"""Seeded permutations with random access: any position is computed directly, without a table of the epoch.

The permutation is a Feistel network over the smallest even power of two that contains all numbers, applied until the
result is in range (cycle walking, Black and Rogaway 2002). Over few numbers such a network is slightly biased, so there
random keys are sorted. A permutation by windows of shards keeps reads local: only a few shards are in use at a time.

Cost: about 0.3 microseconds per position and no memory except the positions. A hundred thousand shards in windows take
about 40 milliseconds and 6 MB for the first batch of an epoch, 2 milliseconds for the others.
"""

import functools

import numpy as np
from jaxtyping import Int

FEISTEL_ROUNDS = 4
MIN_FEISTEL_SAMPLES = 64
"""Smaller permutations are made by sorting random keys."""


def permute(
    positions: Int[np.ndarray, " positions"], samples: int, seed: int, epoch: int, *stream: int
) -> Int[np.ndarray, " positions"]:
    """Apply a seeded permutation of 0..samples-1 to positions. Epochs and streams have different permutations."""
    seeds = np.random.SeedSequence((seed, epoch), spawn_key=stream)
    if samples < MIN_FEISTEL_SAMPLES:
        return np.argsort(seeds.generate_state(samples, np.uint64))[positions]
    half = ((samples - 1).bit_length() + 1) // 2
    keys = seeds.generate_state(FEISTEL_ROUNDS, np.uint64)
    result = _feistel(positions.astype(np.uint64), half, keys)
    # Cycle walking: less than three quarters of the range are outside, so a few rounds suffice.
    while (outside := result >= samples).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def permute_windows(
    positions: Int[np.ndarray, " positions"],
    shards: Int[np.ndarray, " shards"],
    window: int,
    seed: int,
    epoch: int,
    *stream: int,
) -> Int[np.ndarray, " positions"]:
    """Permute the shards, and the samples within each window of shards.

    Args:
        positions: positions in the epoch.
        shards: number of samples of each shard, in the order of the sample numbers.
        window: number of shards that are mixed.
        seed: seed of the permutations.
        epoch: number of the epoch.
        stream: further numbers that select a permutation.

    Returns:
        Sample numbers at these positions.
    """
    order = _cached_permutation(len(shards), seed, epoch, *stream, 0)
    # Positions of the windows in the order of the shards.
    sizes = shards.astype(np.int64)[order]
    ends = np.cumsum(sizes)
    borders = np.concatenate([[0], ends[window - 1 : -1 : window], ends[-1:]])
    windows = np.searchsorted(borders, positions, side="right") - 1
    # Permute within each window.
    mixed = np.empty_like(positions)
    for number in np.unique(windows):
        in_window = windows == number
        window_start = borders[number]
        size = int(borders[number + 1] - window_start)
        in_order = positions[in_window] - window_start
        mixed[in_window] = window_start + permute(in_order, size, seed, epoch, *stream, 1, int(number))
    # Go from the order of the shards back to sample numbers.
    shard = np.searchsorted(ends, mixed, side="right")
    stored_starts = np.concatenate([[0], np.cumsum(shards, dtype=np.int64)])
    return stored_starts[order[shard]] + mixed - (ends - sizes)[shard]


@functools.lru_cache(maxsize=8)
def _cached_permutation(samples: int, seed: int, epoch: int, *stream: int) -> Int[np.ndarray, " samples"]:
    """Compute a whole permutation. Cached for all batches of an epoch, so callers must not write to it."""
    return permute(np.arange(samples), samples, seed, epoch, *stream)


def _feistel(value: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """Permute 0..4**half-1 with a Feistel network: each round mixes one half of the bits into the other."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for key in keys:
        left, right = right, left ^ (_hash(right + key) & mask)
    return (left << bits) | right


def _hash(value: np.ndarray) -> np.ndarray:
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
