"""Samples of a set that are held out of training: a seeded share, for a validation loss.

The selection depends on the number of samples and the share alone. So it is the same for every seed of a job, in every
stage, for any number of workers and after a restart.
"""

import numpy as np
from jaxtyping import Int

from pipelines.data.permutation import permute

HOLD_OUT_SEED = 0
"""Seed of the selection; not the job's, so that runs with other seeds are validated on the same samples."""


def select_held_out(samples: int, share: float, name: str) -> Int[np.ndarray, " held_out"]:
    """Select the held-out samples of a set, in ascending order.

    Args:
        samples: number of samples of the set.
        share: share of them to hold out, rounded to whole samples.
        name: name of the set, for an error.

    Raises:
        ValueError: no sample would be held out, or none would be left for training.
    """
    count = round(share * samples)
    if not 1 <= count < samples:
        raise ValueError(
            f"data.hold_out: got {share:g}, which is {count} of the {samples} samples of {name}, allowed: 0, or at "
            "least one sample, and fewer than all"
        )
    return np.sort(permute(np.arange(count), samples, HOLD_OUT_SEED, 0))
