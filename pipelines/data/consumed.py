"""Which samples a run used: gathered from its workers, a line a step that counted, and the proof from these lines.

    consumed.jsonl   {"stage", "step", "samples": {SET: [numbers]},
                      "replaced": [{"set", "at", "due", "used", "reason"}]}

Numbers are rows of the set's index, in the order of the global batch, as readers told them after the bytes they read
had that row's checksum.  The proof knows nothing of the order that asked for them.
replaced: at this place of the set's numbers stands `used` where `due` was to come.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

CONSUMED_FILE = "consumed.jsonl"
MAX_LISTED_SAMPLES = 5
"""Sample numbers that a fault names at most."""


@dataclass(frozen=True)
class ConsumedSamples:
    """Samples of a global batch by set, and those among them that stand in for others."""

    samples: dict[str, list[int]]
    replaced: list[dict[str, Any]]


def gather_samples(mine: Sequence[dict[str, Any]], names: Sequence[str], device: "torch.device") -> ConsumedSamples:
    """What all ranks used in a global batch, from each rank's micro-batches as `ingest.Reader` made them.

    names: of the sources, in the order's order.  A collective: every rank calls it.
    """
    import torch  # which the process that writes the log does without
    import torch.distributed as dist

    own = torch.from_numpy(np.array([[one["source"], one["sample"]] for one in mine])).to(device)
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    # micro-batches go round the ranks: (turns, ranks, 2, size) is the order of the global batch
    source, sample = torch.stack(ranks, 1).movedim(2, 0).flatten(1).cpu().numpy()
    replaced = [entry for one in mine for entry in json.loads(one["replaced"])]
    count = torch.tensor(len(replaced), device=device)
    dist.all_reduce(count)
    if count.item():
        lists: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(lists, replaced)
        replaced = [_locate_replacement(entry, source) for entries in lists for entry in entries]
    return ConsumedSamples({name: sample[source == number].tolist() for number, name in enumerate(names)}, replaced)


def _locate_replacement(entry: dict[str, Any], source: np.ndarray) -> dict[str, Any]:
    """The entry with its place in the stream turned into that among the set's samples of the batch."""
    place = entry["place"] % len(source)
    at = int((source[:place] == source[place]).sum())
    return {"set": entry["set"], "at": at, **{name: entry[name] for name in ("due", "used", "reason")}}


@dataclass
class Coverage:
    """What a stage used of a set: steps of the stage, samples, whole epochs, samples of the epoch begun, replaced ones.

    Samples count as due: one that was replaced was used in its place.
    """

    stage: str
    steps: int = 0
    samples: int = 0
    epochs: int = 0
    begun: int = 0
    replaced: int = 0


def verify_coverage(lines: Iterable[bytes], log: str, name: str, samples: int) -> tuple[list[Coverage], list[str]]:
    """What each stage used of a set, and what is wrong, a line each: none where every epoch has each sample once.

    lines: of the log, with their ends; one without is what a crash left of the last, and is ignored.  log: its name.
    name: the set's in the run.  samples: how many the set has.

    Shown of each stage are that its steps are 1, 2, 3, ..., of one size, and that its samples, with those due in place
    of those that replaced them, cut into epochs of `samples`, are each number from 0 once in a whole epoch, and none
    twice in the epoch begun.  Epochs count from 0.  In memory is a byte a sample for each stage.
    """
    stages: dict[str, _StageProgress] = {}
    wrong = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        step = _parse_step(line)
        if step is None:
            wrong.append(f"{log}: line {number}: no step, allowed: an object with stage, step, samples of each set")
            continue
        if (key := step["stage"]) not in stages:
            stages[key] = _StageProgress(Coverage(key), bytearray(samples))
        wrong += [f"{log}: stage {key}: {fault}" for fault in stages[key].take(step, name)]
    wrong += [f"{log}: stage {key}: {fault}" for key, stage in stages.items() for fault in stage.repeated()]
    proofs = [stage.proof for stage in stages.values() if stage.proof.samples]
    if not proofs:
        wrong.append(f"{log}: no step used a sample of {name}")
    return proofs, wrong


@dataclass
class _StageProgress:
    """How far a stage is.  seen: of each sample whether the epoch begun has had it.  size: of its global batches."""

    proof: Coverage
    seen: bytearray
    size: int = 0
    again: list[int] = field(default_factory=list)

    def take(self, step: dict[str, Any], name: str) -> Iterator[str]:
        """Count one step; what is wrong with it, or with the epochs that end in it."""
        number, numbers, proof = step["step"], list(step["samples"].get(name, [])), self.proof
        if number != proof.steps + 1:
            yield f"step {number} follows step {proof.steps}, allowed: {proof.steps + 1}"
        proof.steps = number
        size = sum(map(len, step["samples"].values()))
        self.size = self.size or size
        if size != self.size:
            yield f"step {number}: {size} samples, allowed: {self.size}, as in the first"
        for entry in step["replaced"]:
            if entry["set"] == name:
                used = entry["used"]
                if numbers[entry["at"] : entry["at"] + 1] != [used] or not 0 <= used < len(self.seen):
                    yield f"step {number}: sample {used} is said to replace another, but was not used there"
                    continue
                numbers[entry["at"]] = entry["due"]
                proof.replaced += 1
        if outside := [sample for sample in numbers if not 0 <= sample < len(self.seen)]:
            yield f"step {number}: samples {_format_samples(outside)}, allowed: 0 to {len(self.seen) - 1}"
        for sample in numbers:
            if sample not in outside:
                if self.seen[sample]:
                    self.again.append(sample)
                self.seen[sample] = 1
            proof.samples += 1
            proof.begun += 1
            if proof.begun == len(self.seen):
                yield from self._end()

    def repeated(self) -> Iterator[str]:
        if self.again:
            yield f"epoch {self.proof.epochs}: {len(self.again)} samples came again: {_format_samples(self.again)}"

    def _end(self) -> Iterator[str]:
        yield from self.repeated()
        if count := self.seen.count(0):
            lost = [at for at, seen in enumerate(self.seen) if not seen]
            yield f"epoch {self.proof.epochs}: {count} samples did not come: {_format_samples(lost)}"
        self.seen, self.again = bytearray(len(self.seen)), []
        self.proof.epochs += 1
        self.proof.begun = 0


def _format_samples(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:MAX_LISTED_SAMPLES])) + (", ..." if len(samples) > MAX_LISTED_SAMPLES else "")


def _parse_step(line: bytes) -> dict[str, Any] | None:
    """The log's line; None for one that is not of its form."""
    try:
        step = json.loads(line)
        numbers = [number for each in step["samples"].values() for number in each]
        numbers += [entry[key] for entry in step["replaced"] for key in ("at", "due", "used")]
        names = [step["stage"], *(entry["set"] for entry in step["replaced"])]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    # True is an int, too
    good = all(type(number) is int for number in [step["step"], *numbers]) and all(type(one) is str for one in names)
    return step if good and isinstance(step["replaced"], list) else None
