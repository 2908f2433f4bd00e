"""`redux shards …`: sets of shards made, indexed and verified from the command line."""

import argparse

from pipelines import audit, cluster, easy_vqa, records, shards, storage


def make(arguments: argparse.Namespace) -> None:
    """Shards of a JSON file of LLaVA's form with its images, or of easy-VQA."""
    if arguments.easy_vqa:
        given, images = easy_vqa.conversations(arguments.easy_vqa), str(easy_vqa.FOLDER)
    else:
        given, images = records.read(storage.read(arguments.json), arguments.json), arguments.images
    making = shards.Making(
        samples_per_shard=arguments.samples_per_shard, words=arguments.words, tolerance=arguments.tolerance
    )
    with cluster.session():
        summary = shards.make(given, images, arguments.out, making)
    print(f"{arguments.out}: {summary['kept']} of {summary['records']} records kept")
    for reason, count in summary["quarantined"].items():
        print(f"{count:>10} {reason}: {records.REASONS[reason]}")


def index(arguments: argparse.Namespace) -> None:
    """An index for tars that others made."""
    with cluster.session():
        print(f"{arguments.folder}: indexed {audit.index_tars(arguments.folder)} samples")


def verify(arguments: argparse.Namespace) -> None:
    """Whether a set is what its index says; ValueError with the first fault where not, after a line for each."""
    with cluster.session():
        wrong = audit.verify(arguments.folder)
    for line in wrong:
        print(line)
    if wrong:
        raise ValueError(f"{arguments.folder}: {len(wrong)} faults, allowed: none")
    print(f"{arguments.folder}: every byte is as the index says")
