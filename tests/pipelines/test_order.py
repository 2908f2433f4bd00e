"""The order loses nothing, repeats nothing, depends on nothing but its three numbers, and looks like chance."""

import itertools
import tracemalloc

import numpy as np
import pytest

from pipelines.order import Order, permute

SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 64, 65, 100, 255, 256, 257, 1000, 4000)


def stream(order: Order, batches: int) -> np.ndarray:
    return np.concatenate([order.batch(number) for number in range(batches)])


def chi_square(counts: np.ndarray) -> float:
    """Sum of squared errors over expectation, in standard deviations above what fair counts give."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("samples", SIZES)
def test_each_epoch_is_a_permutation(samples: int):
    places = np.arange(samples)
    for seed, epoch in itertools.product((0, 1, 12345, 2**40), (0, 1, 2, 1000)):
        assert np.array_equal(np.sort(permute(places, samples, seed, epoch)), places), (seed, epoch)


@pytest.mark.parametrize("samples", SIZES)
@pytest.mark.parametrize("global_batch", [1, 3, 8])
def test_batches_go_over_the_seams_of_epochs_without_loss(samples: int, global_batch: int):
    order, epochs = Order(samples=samples, global_batch=global_batch, seed=7), 3
    flat = stream(order, order.batches(epochs))
    assert len(flat) - global_batch < epochs * samples <= len(flat)
    for epoch in range(epochs):
        one = flat[epoch * samples : (epoch + 1) * samples]
        assert np.array_equal(np.sort(one), np.arange(samples)), epoch


def test_a_batch_larger_than_the_set_holds_whole_epochs():
    batch = Order(samples=3, global_batch=10, seed=0).batch(2)  # places 20..29: the end of epoch 6 up to epoch 9
    assert sorted(batch[1:4]) == sorted(batch[4:7]) == sorted(batch[7:10]) == [0, 1, 2]


@pytest.mark.parametrize(("epochs", "batches"), [(1, 7), (2, 13), (0.5, 4), (3, 19), (0.02, 1)])
def test_batches_are_the_fewest_that_hold_the_epochs(epochs: float, batches: int):
    assert Order(samples=50, global_batch=8, seed=0).batches(epochs) == batches


def test_a_batch_does_not_depend_on_what_was_asked_before():
    numbers = np.random.default_rng(0).permutation(60)
    one = Order(samples=23, global_batch=5, seed=3)
    asked = {number: one.batch(int(number)) for number in numbers}
    for number in range(60):
        fresh = Order(samples=23, global_batch=5, seed=3).batch(number)
        assert np.array_equal(asked[number], fresh)
        assert np.array_equal(one.batch(number), fresh)


@pytest.mark.parametrize("coarse", [2, 4, 8])
def test_the_stream_does_not_depend_on_the_global_batch(coarse: int):
    fine = stream(Order(samples=13, global_batch=1, seed=5), 48)
    assert np.array_equal(stream(Order(samples=13, global_batch=coarse, seed=5), 48 // coarse), fine)


def test_every_seed_and_every_epoch_has_an_order_of_its_own():
    orders = {tuple(permute(np.arange(40), 40, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize("samples", [3, 10, 50, 300])
def test_the_first_place_is_any_sample_with_equal_chance(samples: int):
    firsts = [permute(np.array([0]), samples, seed, 0)[0] for seed in range(20 * samples)]
    assert chi_square(np.bincount(firsts, minlength=samples)) < 4


def test_neighbours_in_the_order_are_any_pair_with_equal_chance():
    samples = 50
    pairs = np.zeros((samples, samples), int)
    for seed in range(200):
        order = permute(np.arange(samples), samples, seed, 0)
        np.add.at(pairs, (order[:-1], order[1:]), 1)
    assert not pairs.diagonal().any()
    assert chi_square(pairs[~np.eye(samples, dtype=bool)]) < 4


def test_a_sample_comes_at_any_place_of_the_next_epoch():
    samples = 50
    first, second = (np.array([permute(np.arange(samples), samples, s, e) for s in range(200)]) for e in (0, 1))
    assert chi_square(np.bincount(((second - first) % samples).ravel(), minlength=samples)) < 4


def test_a_batch_of_a_billion_samples_takes_the_memory_of_a_batch():
    order = Order(samples=10**9, global_batch=256, seed=0)
    tracemalloc.start()
    batch = order.batch(10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    assert len(set(batch.tolist())) == 256
    assert batch.min() >= 0
    assert batch.max() < 10**9


@pytest.mark.parametrize("samples", [0, -1])
def test_an_order_of_nothing_is_refused(samples: int):
    with pytest.raises(ValueError, match=f"samples: got {samples}, allowed: at least 1"):
        Order(samples=samples, global_batch=1, seed=0)
