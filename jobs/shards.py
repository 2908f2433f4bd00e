"""Make, index and verify sets of shards from the command line (`redux shards`)."""

import argparse
from collections import Counter
from pathlib import Path

from jobs import schema
from jobs.layout import locate_sets
from pipelines.core import cluster, storage
from pipelines.data import audit, consumed, easy_vqa, records, shard_index, shard_writer, tars
from pipelines.data.options import ShardOptions
from pipelines.training import metrics
from pipelines.training.checkpoint import JOB_FILE


def make(arguments: argparse.Namespace) -> None:
    """Make shards from a JSON file in LLaVA's form and its images, or from easy-VQA."""
    if arguments.easy_vqa:
        given, images = easy_vqa.make_conversations(arguments.easy_vqa), str(easy_vqa.PACKAGE_IMAGES)
    else:
        given, images = records.parse_records(storage.read(arguments.json), arguments.json), arguments.images
    making = ShardOptions(
        samples_per_shard=arguments.samples_per_shard,
        max_words=arguments.max_words,
        image_size=arguments.image_size,
        image_aspect_ratio=arguments.image_aspect_ratio,
        max_bad_fraction=arguments.max_bad_fraction,
    )
    finished = shard_index.is_finished(arguments.out)
    with cluster.open_session():
        summary = shard_writer.make_shards(given, images, arguments.out, making)
    if finished:
        print(
            f"{arguments.out}: already finished and unchanged; images were not read again. To make the set again, "
            "delete the folder or name another"
        )
    print(f"{arguments.out}: {summary['kept']} of {summary['records']} records kept")
    for reason, count in summary["quarantined"].items():
        print(f"{count:>10} {reason}: {records.RECORD_REASONS.get(reason, 'kept out by an older version')}")


def index(arguments: argparse.Namespace) -> None:
    """Write the index of tars from elsewhere, and print the counts of their samples and members."""
    with cluster.open_session():
        found = audit.index_tars(arguments.folder, arguments.max_bad_fraction)
    print(f"{arguments.folder}: indexed {found.samples} samples in {found.tars} tars")
    for reason, count in found.quarantined.items():
        print(f"{count:>10} rejected samples: {reason}")
    print(f"{found.members:>10} members, of which")
    print(f"{found.used.total():>10} used{_by_kind(found.used)}")
    print(f"{found.ignored.total():>10} ignored{_by_kind(found.ignored)}")
    print(f"{found.refused:>10} refused, in rejected samples")
    for note in found.notes:
        print(note)


def _by_kind(counts: Counter[str]) -> str:
    """Format counts by suffix or kind, largest first."""
    listing = ", ".join(f"{count} {tars.escape_unprintable(kind)}" for kind, count in counts.most_common(20))
    more = f", and {len(counts) - 20} other kinds" if len(counts) > 20 else ""
    return f": {listing}{more}" if listing else ""


def verify(arguments: argparse.Namespace) -> None:
    """Check a set against its index, or that a run used each sample once per epoch.

    Raises:
        ValueError: there are faults; each was printed on a line.
    """
    if arguments.consumed:
        proven, wrong = _consumed(arguments.folder, arguments.consumed)
    else:
        decoded = ", and every image decodes" if arguments.decode else ""
        proven = [f"{arguments.folder}: every byte is as the index says{decoded}"]
        with cluster.open_session():
            wrong = audit.verify_set(arguments.folder, arguments.decode)
    for line in wrong:
        print(line)
    if wrong:
        raise ValueError(f"{arguments.folder}: {len(wrong)} faults, allowed: none")
    print("\n".join(proven))


def _consumed(folder: str, run: Path) -> tuple[list[str], list[str]]:
    """Check the set against the log of a run; returns what is proven and what is wrong."""
    job = schema.load(run / JOB_FILE)
    used = {name for stage in job.train.values() for name in stage.mixture}
    sets = {name: url for name, url in locate_sets(job, run.resolve()).items() if name in used}
    names = [name for name, url in sets.items() if url == storage.make_absolute(folder)]
    if not names:
        raise ValueError(f"{folder}: {run} did not train on it, allowed: {', '.join(sets.values())}")
    log, samples, proven, wrong = run / consumed.CONSUMED_FILE, len(shard_index.Shards(folder)), [], []
    if not log.exists():
        raise ValueError(f"{log}: not there, allowed: a run that has trained")
    for name in names:
        with log.open("rb") as lines:
            proofs, found = consumed.verify_coverage(lines, str(log), name, samples)
        wrong += found
        for proof in proofs:
            if (steps := metrics.read_last_step(run, proof.stage)) != proof.steps:
                wrong.append(
                    f"{log}: stage {proof.stage} ends with step {proof.steps}, {metrics.METRICS_FILE} with {steps}"
                )
            proven.append(
                f"{proof.stage}: {proof.steps} steps used {proof.samples} samples of {name}: each of its {samples} "
                f"once in each of {proof.epochs} epochs, {proof.partial_samples} once in the epoch begun; "
                f"{proof.replaced} replaced"
            )
    return proven, wrong
