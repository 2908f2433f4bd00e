"""Time and peak memory of one global batch out of an epoch of a billion samples.

    python jobs/bench/order.py

Each way to order runs in a process of its own and builds batches from all over the epoch, the first of them cold;
shards hold 10,000 samples, and lengths are computed instead of read.  Times are of the processor, which a busy machine
does not change much; the peak is that of the whole process, numpy included.  The result is printed and added to
order.jsonl beside this file.
"""

import argparse
import json
import resource
import statistics
import time

import numpy as np

from jobs.bench.record import append, each
from pipelines.data.grouping import LengthGroups
from pipelines.data.order import Order

SAMPLES = 10**9
ORDER_WAYS = ("global", "mixture", "window", "groups")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--global-batch", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--way", choices=ORDER_WAYS, help="measure one way in this process and print it")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.global_batch_size)))
        return
    ways = {}
    for way, told in each(__file__, ORDER_WAYS, global_batch_size=arguments.global_batch_size):
        ways[way] = told
        print(
            f"{way:8} first {told['first_ms']:6.2f} ms, median {told['median_ms']:6.2f} ms, "
            f"worst {told['worst_ms']:6.2f} ms, {told['peak_mib']:4.0f} MiB",
            flush=True,
        )
    append(__file__, samples=SAMPLES, global_batch_size=arguments.global_batch_size, ways=ways)


def order(way: str, global_batch_size: int) -> Order:
    """A billion samples, in that way."""
    if way == "mixture":
        weights = (0.62, 0.25, 0.08, 0.05)
        return Order(samples=(SAMPLES // 4,) * 4, global_batch_size=global_batch_size, seed=0, weights=weights)
    if way == "window":
        shards = (np.full(SAMPLES // 10_000, 10_000),)
        return Order(samples=(SAMPLES,), global_batch_size=global_batch_size, seed=0, shuffle="window", shards=shards)
    if way == "groups":
        groups = LengthGroups(counts=(SAMPLES // 16 * 15, SAMPLES // 16), lengths=lengths, megabatch=50)
        return Order(samples=(SAMPLES,), global_batch_size=global_batch_size, seed=0, groups=groups)
    return Order(samples=(SAMPLES,), global_batch_size=global_batch_size, seed=0)


def lengths(numbers: np.ndarray) -> np.ndarray:
    """Text lengths that look like chance."""
    return (numbers * 2654435761 % 2039).astype(np.uint16)


def measure(way: str, global_batch_size: int, repeats: int = 50) -> dict[str, float]:
    """Milliseconds of a batch and MiB of the process."""
    one = order(way, global_batch_size)
    np.random.SeedSequence(0)  # numpy loads its module at first use
    times = []
    for number in np.linspace(0, one.count_batches(1) - 1, repeats).astype(int).tolist():
        start = time.process_time()
        one.get_batch(number)
        times.append((time.process_time() - start) * 1e3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: in KiB
    return {"first_ms": times[0], "median_ms": statistics.median(times), "worst_ms": max(times), "peak_mib": peak}


if __name__ == "__main__":
    main()
