"""Tests of the order: no sample is lost or repeated, ratios are kept, and permutations look random."""

import hashlib
import itertools
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data.grouping import LengthGroups
from pipelines.data.order import Order, count_set_samples
from pipelines.data.permutation import permute, permute_windows

SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 63, 64, 65, 100, 255, 256, 257, 1000, 4000)
MIXTURES = (
    (1, 1),
    (7, 2, 1),
    (0.5, 0.3, 0.2),
    (558_128, 665_298, 40_688),
    (1, 100),
    (97, 89, 83, 3),
    (5, 4, 3, 2, 1, 9),
)
SHARDS = np.array([5, 1, 9, 3, 3, 7, 20, 2, 13])


def stream(order: Order, batches: int) -> np.ndarray:
    """Return the sample numbers of the first batches of a single source."""
    return np.concatenate([order.get_batch(number)[1] for number in range(batches)])


def chi_square(counts: np.ndarray) -> float:
    """Compute the chi-square statistic in standard deviations above its expectation."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def columns(samples: int, modalities: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw modality and length of each sample. The first modality is four times as frequent as the last."""
    rng = np.random.default_rng((samples, modalities, seed))
    parts = np.linspace(4, 1, modalities)
    drawn = rng.choice(modalities, samples, p=parts / parts.sum())
    return drawn.astype(np.uint8), rng.integers(1, 300, samples).astype(np.uint16)


def grouped(samples: int, global_batch_size: int, seed: int = 3, megabatch: int = 3, modalities: int = 2) -> Order:
    groups = LengthGroups.from_columns(*columns(samples, modalities), megabatch)
    return Order(samples=(samples,), global_batch_size=global_batch_size, seed=seed, groups=groups)


def orders() -> dict[str, Order]:
    """Make one order of each kind."""
    shards = (SHARDS, SHARDS[:4])
    held = tuple(int(sizes.sum()) for sizes in shards)
    return {
        "one source": Order(samples=(101,), global_batch_size=8, seed=3),
        "mixture": Order(samples=(101, 67, 5), global_batch_size=8, seed=3),
        "weights": Order(samples=(101, 67, 5), global_batch_size=8, seed=3, weights=(0.3, 0.5, 0.2)),
        "window": Order(samples=held, global_batch_size=8, seed=3, shuffle="window", window=2, shards=shards),
        "none": Order(samples=(101, 67), global_batch_size=8, seed=3, shuffle="none"),
        "groups": grouped(101, 8),
    }


KINDS = orders()


# One source


def test_the_order_of_one_source_is_the_one_that_results_were_trained_in():
    digest = hashlib.sha256()
    for samples, global_batch_size, seed in ((64, 8, 0), (100, 7, 1), (1000, 64, 2), (4097, 32, 3), (10**9, 256, 4)):
        order = Order(samples=(samples,), global_batch_size=global_batch_size, seed=seed)
        for number in (*range(40), 12345):
            source, sample = order.get_batch(number)
            assert not source.any()
            digest.update(sample.astype("<i8").tobytes())
    assert digest.hexdigest() == "0a1fe359bcde30399e3fe69ffcd8936c5b6f0e71471c0d6713759efcc0be28d9"


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 7, 8, 17, 64, 101, 256])
@pytest.mark.parametrize("global_batch_size", [1, 3, 8])
@pytest.mark.parametrize("kind", ["global", "window", "none", "groups"])
def test_batches_go_over_the_seams_of_epochs_without_loss(samples: int, global_batch_size: int, kind: str):
    if kind == "groups":
        order = grouped(samples, global_batch_size)
    else:
        shards = np.diff(np.unique([0, samples, *np.random.default_rng(samples).integers(0, samples, 9)]))
        order = Order(
            samples=(samples,), global_batch_size=global_batch_size, seed=7, shuffle=kind, window=3, shards=(shards,)
        )
    epochs = 3 if samples < 64 or global_batch_size == 8 else 1
    flat = stream(order, order.count_batches(epochs))
    assert len(flat) - global_batch_size < epochs * samples <= len(flat)
    for epoch in range(epochs):
        one = flat[epoch * samples : (epoch + 1) * samples]
        assert np.array_equal(np.sort(one), np.arange(samples)), epoch


@pytest.mark.parametrize("kind", ["global", "groups"])
def test_a_batch_larger_than_the_set_holds_whole_epochs(kind: str):
    order = Order(samples=(3,), global_batch_size=10, seed=0) if kind == "global" else grouped(3, 10)
    batch = order.get_batch(2)[1]  # places 20..29: the end of epoch 6 up to epoch 9
    assert sorted(batch[1:4]) == sorted(batch[4:7]) == sorted(batch[7:10]) == [0, 1, 2]


@pytest.mark.parametrize("coarse", [2, 4, 8])
def test_the_stream_of_one_source_does_not_depend_on_the_global_batch(coarse: int):
    fine = stream(Order(samples=(73,), global_batch_size=1, seed=5), 144)
    assert np.array_equal(stream(Order(samples=(73,), global_batch_size=coarse, seed=5), 144 // coarse), fine)


@pytest.mark.parametrize(("epochs", "batches"), [(1, 7), (2, 13), (0.5, 4), (3, 19), (0.02, 1)])
@pytest.mark.parametrize("samples", [(50,), (31, 19)])
def test_batches_are_the_fewest_that_hold_the_epochs_and_say_what_of_them_is_real(
    samples: tuple[int, ...], epochs: float, batches: int
):
    order = Order(samples=samples, global_batch_size=8, seed=0)
    assert order.count_batches(epochs) == batches
    real = [order.count_real_samples(number, epochs) for number in range(batches + 2)]
    assert sum(real) == round(50 * epochs)
    assert real[: batches - 1] == [8] * (batches - 1)
    assert real[batches - 1] > 0
    assert real[batches:] == [0, 0]


@pytest.mark.parametrize("name", KINDS)
def test_the_real_samples_of_an_epoch_are_each_sample_once(name: str):
    order = KINDS[name]
    if order.weights:
        return  # there an epoch is an amount
    parts = [np.stack(order.get_batch(n))[:, : order.count_real_samples(n, 1)] for n in range(order.count_batches(1))]
    source, sample = np.concatenate(parts, axis=1)
    for one, samples in enumerate(order.samples):
        mine = sample[source == one]
        assert abs(len(mine) - samples) <= (len(order.samples) > 1)
        assert len(np.unique(mine)) == min(len(mine), samples)


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_does_not_depend_on_what_was_asked_before(name: str):
    order = KINDS[name]
    before = {number: order.get_batch(number) for number in range(60)}
    for number in np.random.default_rng(0).permutation(60).tolist():
        fresh = orders()[name].get_batch(number)
        assert np.array_equal(order.get_batch(number), fresh)
        assert np.array_equal(before[number], fresh)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "none"])
def test_an_order_travels(name: str):
    sent = pickle.loads(pickle.dumps(KINDS[name]))
    assert all(np.array_equal(sent.get_batch(number), KINDS[name].get_batch(number)) for number in (0, 7, 100))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "none"])
def test_every_seed_and_every_epoch_has_an_order_of_its_own(name: str):
    seen, samples = set(), KINDS[name].samples[0]
    for seed in range(4):
        order = replace(KINDS[name], seed=seed)
        source, sample = np.concatenate([order.get_batch(number) for number in range(samples)], axis=1)
        mine = sample[source == 0]
        seen |= {tuple(mine[first : first + samples]) for first in (0, samples)}
        assert len(mine) >= 2 * samples
    assert len(seen) == 8


# Mixtures


@pytest.mark.parametrize("weights", MIXTURES)
@pytest.mark.parametrize("global_batch_size", [1, 3, 8, 64])
def test_each_batch_and_the_whole_run_keep_the_ratio(weights: tuple[float, ...], global_batch_size: int):
    exact = np.array(weights) / sum(weights) * global_batch_size
    total = np.zeros(len(weights), int)
    for number in range(200):
        starts, counts = count_set_samples([Fraction(str(weight)) for weight in weights], global_batch_size, number)
        assert sum(counts) == global_batch_size
        assert (np.abs(counts - exact) < 1).all(), number
        assert np.array_equal(starts, total), number
        total += counts
        assert (np.abs(total - exact * (number + 1)) <= 1 + 1e-9).all(), number


def test_ratios_hold_for_mixtures_by_chance():
    """Counts since the start deviate by at most 1 for up to three sources, rarely and slightly more for others."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        weights = [Fraction(int(weight)) for weight in rng.integers(1, 60, rng.integers(2, 9))]
        global_batch_size = int(rng.integers(1, 70))
        exact = np.array(weights, float) / float(sum(weights)) * global_batch_size
        for number in map(int, rng.integers(0, 2 * sum(weights), 12)):
            starts, counts = count_set_samples(weights, global_batch_size, number)
            assert (np.abs(counts - exact) < 1).all()
            assert np.array_equal(np.add(starts, counts), count_set_samples(weights, global_batch_size, number + 1)[0])
            assert np.abs(starts - exact * number).max() < (1 if len(weights) < 4 else 1.2)


@pytest.mark.parametrize("far", [10**9, 10**15])
def test_ratios_hold_far_into_a_run(far: int):
    weights = (0.6180339887, 0.3, 0.0819660113)
    starts, counts = count_set_samples([Fraction(str(weight)) for weight in weights], 256, far)
    for start, count, weight in zip(starts, counts, weights, strict=True):
        assert abs(start - Fraction(str(weight)) * 256 * far) < 1
        assert abs(count - weight * 256) < 1


@pytest.mark.parametrize("weights", [(), (0.2, 0.3, 0.5), (1, 1, 30)])
@pytest.mark.parametrize("global_batch_size", [1, 7, 32])
def test_each_source_goes_through_its_own_epochs(weights: tuple[float, ...], global_batch_size: int):
    order = Order(samples=(67, 101, 5), global_batch_size=global_batch_size, seed=9, weights=weights)
    source, sample = np.concatenate([order.get_batch(number) for number in range(order.count_batches(4))], axis=1)
    for one, samples in enumerate(order.samples):
        mine = sample[source == one]
        epochs = [mine[first : first + samples] for first in range(0, len(mine), samples)]
        for epoch in epochs[:-1]:
            assert np.array_equal(np.sort(epoch), np.arange(samples))
        assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(epochs[:-1]))


def test_batches_are_those_of_a_slow_reference():
    order = Order(samples=(67, 101, 5), global_batch_size=9, seed=2, weights=(1, 2, 0.5))
    streams = [
        iter(np.concatenate([permute(np.arange(samples), samples, 2, epoch, *key) for epoch in range(70)]))
        for samples, key in zip(order.samples, [(), (1,), (2,)], strict=True)
    ]
    for number in range(60):
        for source, sample in zip(*order.get_batch(number), strict=True):
            assert sample == next(streams[source])


def test_any_slice_of_a_batch_has_about_the_ratio_of_the_whole():
    order = Order(samples=(500, 300, 200), global_batch_size=60, seed=1)
    for number in range(20):
        source, _ = order.get_batch(number)
        for first in range(0, 60, 10):
            assert np.abs(np.bincount(source[first : first + 10], minlength=3) - [5, 3, 2]).max() <= 1


def test_equal_sources_are_not_ordered_alike():
    source, sample = np.concatenate(
        [Order(samples=(100, 100), global_batch_size=20, seed=1).get_batch(number) for number in range(10)], axis=1
    )
    assert (sample[source == 0] == sample[source == 1]).sum() < 10


# Windows


@pytest.mark.parametrize("window", [1, 2, 4, 100])
@pytest.mark.parametrize("seed", range(3))
def test_samples_mix_within_windows_of_shards_and_not_beyond(window: int, seed: int):
    samples = int(SHARDS.sum())
    shard_of = np.repeat(np.arange(len(SHARDS)), SHARDS)
    flat = permute_windows(np.arange(samples), SHARDS.astype(np.uint64), window, seed, 0)
    order = permute(np.arange(len(SHARDS)), len(SHARDS), seed, 0, 0)
    first = 0
    for at in range(0, len(SHARDS), window):
        shards = order[at : at + window]
        stop = first + SHARDS[shards].sum()
        expected = np.flatnonzero(np.isin(shard_of, shards))
        assert np.array_equal(np.sort(flat[first:stop]), expected)
        assert len(expected) < 9 or not np.array_equal(flat[first:stop], expected), "mixed"
        first = stop
    assert first == samples


# Groups


def slow_groups(order: Order, modality: np.ndarray, lengths: np.ndarray, epoch: int) -> np.ndarray:
    """Slow reference: a whole grouped epoch, assembled as described in the docstring of `grouping`."""
    global_batch_size, samples, seed = order.global_batch_size, order.samples[0], order.seed
    head = min((global_batch_size - epoch * samples % global_batch_size) % global_batch_size, samples)
    full = (samples - head) // global_batch_size
    members = []
    for one, name in enumerate(np.unique(modality)):
        numbers = np.flatnonzero(modality == name)
        members.append(numbers[permute(np.arange(len(numbers)), len(numbers), seed, epoch, 1, one)])
    pure = [len(numbers) // global_batch_size for numbers in members]
    if sum(pure) > full:
        pure[pure.index(max(pure))] -= 1
    batches, left = [], []
    for numbers, count in zip(members, pure, strict=True):
        taken, rest = np.split(numbers, [count * global_batch_size])
        left.extend(rest)
        size = order.groups.megabatch * global_batch_size
        for first in range(0, len(taken), size):
            megabatch = sorted(taken[first : first + size], key=lambda number: lengths[number])
            batches += [megabatch[at : at + global_batch_size] for at in range(0, len(megabatch), global_batch_size)]
    mixed = (full - sum(pure)) * global_batch_size
    batches += [left[at : at + global_batch_size] for at in range(0, mixed, global_batch_size)]
    tail = samples - head - full * global_batch_size
    shuffled = [batches[at] for at in permute(np.arange(full), full, seed, epoch, 0)] if full else []
    return np.array([*left[mixed + tail :], *itertools.chain(*shuffled), *left[mixed : mixed + tail]])


@pytest.mark.parametrize(
    ("samples", "global_batch_size", "megabatch", "modalities"),
    [(1, 1, 1, 1), (3, 8, 2, 2), (97, 8, 3, 2), (128, 8, 2, 1), (500, 16, 4, 3), (499, 7, 50, 4), (64, 32, 1, 2)],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_groups_are_those_of_a_slow_reference(
    samples: int, global_batch_size: int, megabatch: int, modalities: int, seed
):
    order = grouped(samples, global_batch_size, seed, megabatch, modalities)
    modality, lengths = columns(samples, modalities)
    epochs = np.concatenate([slow_groups(order, modality, lengths, epoch) for epoch in range(4)])
    batches = 4 * samples // global_batch_size
    assert np.array_equal(stream(order, batches) if batches else [], epochs[: batches * global_batch_size])


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_batches_are_of_one_modality_but_for_one_more_than_there_are_modalities(modalities: int):
    order = grouped(1999, 16, modalities=modalities)
    modality, _ = columns(1999, modalities)
    for epoch in range(3):
        numbers = range(epoch * 1999 // 16, -(-(epoch + 1) * 1999 // 16))
        mixed = sum(len(np.unique(modality[order.get_batch(number)[1]])) > 1 for number in numbers)
        assert mixed <= modalities + 1


def test_groups_pad_less_than_chance_and_as_megabatches_say():
    _, lengths = columns(4000)
    wasted = []
    for order in (
        Order(samples=(4000,), global_batch_size=16, seed=0),
        grouped(4000, 16, megabatch=1),
        grouped(4000, 16),
    ):
        taken = [lengths[order.get_batch(number)[1]].astype(int) for number in range(250)]
        wasted.append(sum((one.max() - one).sum() for one in taken))
    assert wasted[2] < wasted[1] * 0.6
    assert wasted[2] < wasted[0] * 0.6


def test_an_index_numbered_by_modality_gives_the_same_order_as_its_columns():
    modality, lengths = columns(300)
    modality = np.sort(modality)
    held = grouped_by(LengthGroups.from_columns(modality, lengths, 2))
    counts = tuple(np.bincount(modality).tolist())
    asked = grouped_by(LengthGroups(counts=counts, lengths=lambda rows: lengths[rows], megabatch=2))
    for number in range(80):
        assert np.array_equal(held.get_batch(number), asked.get_batch(number))


def grouped_by(groups: LengthGroups) -> Order:
    return Order(samples=(300,), global_batch_size=8, seed=1, groups=groups)


# Permutations


@pytest.mark.parametrize("samples", SIZES)
def test_each_epoch_is_a_permutation(samples: int):
    places = np.arange(samples)
    for seed, epoch in itertools.product((0, 1, 12345, 2**40), (0, 1, 2, 1000)):
        assert np.array_equal(np.sort(permute(places, samples, seed, epoch)), places), (seed, epoch)


@pytest.mark.parametrize("samples", [3, 5, 7, 10, 16, 50, 80])
def test_the_first_place_is_any_sample_with_equal_chance(samples: int):
    firsts = [permute(np.array([0]), samples, seed, 0)[0] for seed in range(20 * samples)]
    assert chi_square(np.bincount(firsts, minlength=samples)) < 4


@pytest.mark.parametrize("samples", [5, 8, 13, 16, 64])
def test_neighbours_in_the_order_are_any_pair_with_equal_chance(samples: int):
    pairs = np.zeros((samples, samples), int)
    for seed in range(10 * samples):
        order = permute(np.arange(samples), samples, seed, 0)
        np.add.at(pairs, (order[:-1], order[1:]), 1)
    assert not pairs.diagonal().any()
    assert chi_square(pairs[~np.eye(samples, dtype=bool)]) < 4


@pytest.mark.parametrize("streams", [((0, 0), (0, 1)), ((0, 0), (0, 0, 1)), ((0, 0, 1), (0, 0, 2))])
def test_a_sample_comes_at_any_place_of_another_epoch_or_stream(streams: tuple[tuple[int, ...], ...]):
    samples = 80
    one, other = (np.array([permute(np.arange(samples), samples, s, *key[1:]) for s in range(200)]) for key in streams)
    assert chi_square(np.bincount(((other - one) % samples).ravel(), minlength=samples)) < 4


def test_few_samples_come_in_every_order_with_equal_chance():
    """Feistel networks are biased over few numbers: some orders were three times as frequent as others."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(3000):
        order = tuple(permute(np.arange(5), 5, seed, 0).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 120
    assert chi_square(np.array(list(counts.values()))) < 4


# A billion samples


def of_a_billion() -> None:
    """Run in a separate process, so that the peak memory is this order's. Prints the peak in MiB and the rows read."""
    rows = []

    def lengths(numbers: np.ndarray) -> np.ndarray:
        rows.append(len(numbers))
        return (numbers * 2654435761 % 2039).astype(np.uint16)

    samples = 10**9
    groups = LengthGroups(counts=(900_000_001, 99_999_999), lengths=lengths, megabatch=50)
    kinds = [
        Order(samples=(samples,), global_batch_size=256, seed=0),
        Order(samples=(samples // 2, samples // 3, samples // 6 + 1), global_batch_size=256, seed=0),
        Order(samples=(samples,), global_batch_size=256, seed=0, shuffle="window", shards=(np.full(100_000, 10_000),)),
        Order(samples=(samples,), global_batch_size=256, seed=0, groups=groups),
    ]
    for order in kinds:
        for number in (0, 3_906_249, 10**7):  # the second is the epoch's last
            source, sample = order.get_batch(number)
            assert len({*zip(source.tolist(), sample.tolist(), strict=True)}) == 256
            assert (sample < np.array(order.samples)[source]).all()
    # Not getrusage, whose peak a child takes over from the process that starts it.
    [peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    print(json.dumps({"peak": int(peak) / 1024, "rows": rows}))


@pytest.mark.integration
def test_a_batch_of_a_billion_samples_takes_little_memory_and_few_rows_of_the_index():
    ended = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    told = json.loads(ended.stdout)
    assert told["peak"] < 200
    assert len(told["rows"]) <= 3
    assert max(told["rows"]) <= 50 * 256


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": (0,)}, r"samples: got \(0,\), allowed: at least one set"),
        ({"samples": ()}, r"samples: got \(\), allowed"),
        ({"samples": (4, -1)}, r"samples: got \(4, -1\), allowed"),
        ({"global_batch_size": 0}, "global_batch_size: got 0, allowed: at least 1"),
        ({"seed": -1}, "seed: got -1, allowed: at least 0"),
        ({"weights": (1,)}, r"weights: got \(1,\), allowed: .* 2 sets"),
        ({"weights": (1, 0)}, r"weights: got \(1, 0\), allowed"),
        ({"weights": (1, float("nan"))}, r"weights: got \(1, nan\), allowed"),
        ({"shuffle": "shard"}, "shuffle: got 'shard', allowed: global, window, none"),
        ({"window": 0}, "window: got 0, allowed: at least 1 shard"),
        ({"shuffle": "window"}, r"shards: got \(\) samples, allowed: \(4, 5\)"),
        ({"shards": (np.array([4]), np.array([4]))}, r"shards: got \(4, 4\) samples, allowed: \(4, 5\)"),
        ({"groups": LengthGroups.from_columns(np.zeros(9), np.ones(9), 1)}, r"groups: got 9 samples, .* one set"),
    ],
)
def test_what_makes_no_order_is_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Order(**{"samples": (4, 5), "global_batch_size": 1, "seed": 0} | changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda order: order.get_batch(-1), "number: got -1, allowed: at least 0"),
        (lambda order: order.count_batches(0), "epochs: got 0, allowed: above 0"),
        (lambda order: order.count_real_samples(0, float("inf")), "epochs: got inf, allowed: above 0"),
        (lambda _: LengthGroups.from_columns(np.zeros(3), np.ones(2), 1), "lengths: got 2, allowed: 3"),
        (lambda _: LengthGroups.from_columns(np.zeros(3), np.ones(3), 0), "megabatch: got 0, allowed: at least 1"),
        (lambda _: LengthGroups(counts=(0, 3), lengths=len, megabatch=1), r"counts: got \(0, 3\), allowed"),
        (
            lambda _: LengthGroups(counts=(3,), lengths=len, megabatch=1, numbers=np.arange(2)),
            "numbers: got 2, allowed: 3",
        ),
    ],
)
def test_what_has_no_answer_is_refused_by_name(call: Callable[[Order], Any], message: str):
    with pytest.raises(ValueError, match=message):
        call(Order(samples=(4,), global_batch_size=1, seed=0))


if __name__ == "__main__":
    of_a_billion()
