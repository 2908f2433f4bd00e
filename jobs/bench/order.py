"""Measure time and peak memory of one global batch out of an epoch of a billion samples.

    python jobs/bench/order.py

Each kind of order runs in a new process and builds batches from all over the epoch, the first of them without warm-up.
Shards hold 10,000 samples, and lengths are computed instead of read. Times are CPU times, which a busy machine changes
little; the peak is that of the whole process, numpy included. The script prints the result and appends it to
order.jsonl.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Sequence

import numpy as np

from jobs.bench.record import add_out_option, append_record, measure_variants
from pipelines.data.grouping import LengthGroups
from pipelines.data.order import Order

SAMPLES = 10**9
ORDER_VARIANTS = ("global", "mixture", "window", "groups")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--global-batch-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument(
        "--variant", choices=ORDER_VARIANTS, help="measure only this one, in this process, and print it"
    )
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments.global_batch_size)))
        return
    results = {}
    for variant, measured in measure_variants(__file__, ORDER_VARIANTS, global_batch_size=arguments.global_batch_size):
        results[variant] = measured
        print(
            f"{variant:8} first {measured['first_ms']:6.2f} ms, median {measured['median_ms']:6.2f} ms, "
            f"worst {measured['worst_ms']:6.2f} ms, {measured['peak_mib']:4.0f} MiB",
            flush=True,
        )
    append_record(arguments.out, samples=SAMPLES, global_batch_size=arguments.global_batch_size, variants=results)


def build_order(variant: str, global_batch_size: int) -> Order:
    """Build an order of a billion samples."""
    if variant == "mixture":
        weights = (0.62, 0.25, 0.08, 0.05)
        return Order(samples=(SAMPLES // 4,) * 4, global_batch_size=global_batch_size, seed=0, weights=weights)
    if variant == "window":
        shards = (np.full(SAMPLES // 10_000, 10_000),)
        return Order(samples=(SAMPLES,), global_batch_size=global_batch_size, seed=0, shuffle="window", shards=shards)
    if variant == "groups":
        groups = LengthGroups(counts=(SAMPLES // 16 * 15, SAMPLES // 16), lengths=compute_lengths, megabatch=50)
        return Order(samples=(SAMPLES,), global_batch_size=global_batch_size, seed=0, groups=groups)
    return Order(samples=(SAMPLES,), global_batch_size=global_batch_size, seed=0)


def compute_lengths(numbers: np.ndarray) -> np.ndarray:
    """Compute pseudo-random text lengths from sample numbers."""
    return (numbers * 2654435761 % 2039).astype(np.uint16)


def measure(variant: str, global_batch_size: int, repeats: int = 50) -> dict[str, float]:
    """Measure the milliseconds of a batch and the peak MiB of the process."""
    order = build_order(variant, global_batch_size)
    np.random.SeedSequence(0)  # NumPy loads its module at first use
    times = []
    for number in np.linspace(0, order.count_batches(1) - 1, repeats).astype(int).tolist():
        start = time.process_time()
        order.get_batch(number)
        times.append((time.process_time() - start) * 1e3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: in KiB
    return {"first_ms": times[0], "median_ms": statistics.median(times), "worst_ms": max(times), "peak_mib": peak}


if __name__ == "__main__":
    main()
