"""Log of the samples that a run used, and the check of this log: each sample once per epoch.

    consumed.jsonl   {"stage", "step", "samples": {SET: [numbers]},
                      "replaced": [{"set", "index", "scheduled", "used", "reason"}]}

One line per step that counted. Numbers are rows of the set's index, in the order of the global batch. Readers report a
number after the bytes that they read matched that row's checksum. The check does not use the order that scheduled the
samples, so it also finds errors of that order.

replaced: at `index` of the set's numbers, sample `used` stands in for the sample `scheduled`.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

CONSUMED_FILE = "consumed.jsonl"
FORMER_FIELDS = {"at": "index", "due": "scheduled"}
"""Former names of fields of a replacement, found in the logs of older runs."""
MAX_LISTED_SAMPLES = 5
"""Maximum number of sample numbers in a message."""


@dataclass(frozen=True)
class ConsumedSamples:
    """Samples of a global batch by set, and the replacements among them."""

    samples: dict[str, list[int]]
    replaced: list[dict[str, Any]]


def gather_samples(
    micro_batches: Sequence[dict[str, Any]], names: Sequence[str], device: "torch.device"
) -> ConsumedSamples:
    """Gather the samples that all ranks used in a global batch. A collective: every rank calls it.

    Args:
        micro_batches: this rank's micro-batches, as `ingest.Reader` made them.
        names: names of the sources, in the order of `Order.samples`.
        device: device for the collectives.
    """
    import torch  # the process that writes the log runs without torch
    import torch.distributed as dist

    replaced = [entry for batch in micro_batches for entry in json.loads(batch["replaced"])]
    position, source, sample = np.hstack(
        [[batch["position"], batch["source"], batch["sample"]] for batch in micro_batches]
    )
    counts = torch.tensor([len(position), len(replaced)], device=device)
    dist.all_reduce(counts)
    size, num_replaced = counts.tolist()
    # Each rank fills in its samples, at their positions in the global batch.
    columns = np.zeros((2, size), np.int64)
    columns[:, position % size] = source, sample
    gathered = torch.from_numpy(columns).to(device)
    dist.all_reduce(gathered)
    source, sample = gathered.cpu().numpy()
    # Replacements are rare, so their lists are gathered only if there are any.
    if num_replaced:
        lists: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(lists, replaced)
        replaced = [_locate_replacement(entry, source) for entries in lists for entry in entries]
    by_set = {name: sample[source == index].tolist() for index, name in enumerate(names)}
    return ConsumedSamples(by_set, replaced)


def _locate_replacement(entry: dict[str, Any], source: np.ndarray) -> dict[str, Any]:
    """Convert the entry's stream position into an index among the set's samples of the global batch."""
    position = entry["position"] % len(source)
    index = int((source[:position] == source[position]).sum())
    return {"set": entry["set"], "index": index, **{name: entry[name] for name in ("scheduled", "used", "reason")}}


@dataclass
class Coverage:
    """Use of a set by a stage. Replaced samples count as if the scheduled sample had been used.

    stage: name of the stage. steps: its steps. samples: samples of the set that it used. epochs: complete epochs of the
    set. partial_samples: samples of the last, incomplete epoch. replaced: replaced samples.
    """

    stage: str
    steps: int = 0
    samples: int = 0
    epochs: int = 0
    partial_samples: int = 0
    replaced: int = 0


def verify_coverage(
    lines: Iterable[bytes], log: str, name: str, num_samples: int, held_out: Collection[int] = ()
) -> tuple[list[Coverage], list[str]]:
    """Check that a log uses each sample of a set exactly once per epoch, and no held-out sample.

    For each stage, steps must be 1, 2, 3, ... and of equal size. The scheduled samples are cut into epochs of
    all samples that are not held out. A complete epoch must have each number once, the last one no number twice. Memory
    is one byte per sample and stage.

    Args:
        lines: lines of the log with their line breaks. A line without one is a partial line of a crash, and ends the
            check.
        log: path of the log, for messages.
        name: name of the set in the run.
        num_samples: number of samples of the set, counted from 0.
        held_out: samples that training must not use.

    Returns:
        The use of the set by each stage, and one message per error.
    """
    # One pass over the log, so it may be larger than the memory.
    stages: dict[str, _StageProgress] = {}
    errors = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        step = _parse_step(line)
        if step is None:
            errors.append(f"{log}: line {number}: no step, allowed: an object with stage, step, samples of each set")
            continue
        if (stage := step["stage"]) not in stages:
            stages[stage] = _StageProgress(Coverage(stage), bytearray(num_samples), frozenset(held_out))
        errors += [f"{log}: stage {stage}: {error}" for error in stages[stage].add_step(step, name)]
    # The last epoch of a stage has no end at which repeats are checked.
    for stage, progress in stages.items():
        errors += [f"{log}: stage {stage}: {error}" for error in progress.check_repeats()]
    coverages = [progress.coverage for progress in stages.values() if progress.coverage.samples]
    if not coverages:
        errors.append(f"{log}: no step used a sample of {name}")
    return coverages, errors


@dataclass
class _StageProgress:
    """Progress of the check through a stage.

    use_flags: one byte per sample, 1 if the current epoch has used it. held_out: samples that must not be used.
    batch_size: size of the stage's global batches. repeated: samples that the current epoch has used again.
    """

    coverage: Coverage
    use_flags: bytearray
    held_out: frozenset[int]
    batch_size: int = 0
    repeated: list[int] = field(default_factory=list)

    def add_step(self, step: dict[str, Any], name: str) -> Iterator[str]:
        """Count a step, and yield errors in it or in epochs that end in it."""
        number, numbers, coverage = step["step"], list(step["samples"].get(name, [])), self.coverage
        # Check number and size of the step.
        if number != coverage.steps + 1:
            yield f"step {number} follows step {coverage.steps}, allowed: {coverage.steps + 1}"
        coverage.steps = number
        batch_size = sum(map(len, step["samples"].values()))
        self.batch_size = self.batch_size or batch_size
        if batch_size != self.batch_size:
            yield f"step {number}: {batch_size} samples, allowed: {self.batch_size}, as in the first"
        if forbidden := [sample for sample in numbers if sample in self.held_out]:
            yield f"step {number}: used held-out samples {_format_samples(forbidden)}"
        # Put the scheduled samples in place of their replacements.
        for entry in step["replaced"]:
            if entry["set"] == name:
                used = entry["used"]
                index = entry["index"]
                if numbers[index : index + 1] != [used] or not 0 <= used < len(self.use_flags):
                    yield f"step {number}: sample {used} is listed as a replacement, but was not used there"
                    continue
                numbers[index] = entry["scheduled"]
                coverage.replaced += 1
        # Mark the samples; an epoch may end in the middle of a step.
        outside = [sample for sample in numbers if not 0 <= sample < len(self.use_flags)]
        if outside:
            yield f"step {number}: samples {_format_samples(outside)}, allowed: 0 to {len(self.use_flags) - 1}"
        for sample in numbers:
            if sample not in outside:
                if self.use_flags[sample]:
                    self.repeated.append(sample)
                self.use_flags[sample] = 1
            coverage.samples += 1
            coverage.partial_samples += 1
            if coverage.partial_samples == len(self.use_flags) - len(self.held_out):
                yield from self._end_epoch()

    def check_repeats(self) -> Iterator[str]:
        """Yield an error if the current epoch has used samples more than once."""
        if self.repeated:
            samples = _format_samples(self.repeated)
            yield f"epoch {self.coverage.epochs}: {len(self.repeated)} samples were repeated: {samples}"

    def _end_epoch(self) -> Iterator[str]:
        yield from self.check_repeats()
        unused = [sample for sample, is_used in enumerate(self.use_flags) if not is_used]
        missing = [sample for sample in unused if sample not in self.held_out]
        if missing:
            yield f"epoch {self.coverage.epochs}: {len(missing)} samples are missing: {_format_samples(missing)}"
        self.use_flags, self.repeated = bytearray(len(self.use_flags)), []
        self.coverage.epochs += 1
        self.coverage.partial_samples = 0


def _format_samples(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:MAX_LISTED_SAMPLES])) + (", ..." if len(samples) > MAX_LISTED_SAMPLES else "")


def _parse_step(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the log; None if it has another form."""
    try:
        step = json.loads(line)
        numbers = [number for samples in step["samples"].values() for number in samples]
        replaced = [{FORMER_FIELDS.get(key, key): value for key, value in entry.items()} for entry in step["replaced"]]
        numbers += [entry[key] for entry in replaced for key in ("index", "scheduled", "used")]
        names = [step["stage"], *(entry["set"] for entry in replaced)]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    # Compare exact types, since True is an instance of int.
    has_types = all(type(number) is int for number in [step["step"], *numbers]) and all(
        type(name) is str for name in names
    )
    return {**step, "replaced": replaced} if has_types and isinstance(step["replaced"], list) else None
