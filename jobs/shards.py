"""Make, index and verify sets of shards, and store features, from the command line (`redux shards`)."""

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from jobs import schema
from jobs.cli.arguments import build_options
from jobs.layout import find_model, locate_sets, require_folder
from pipelines.core import cluster, storage
from pipelines.data import audit, consumed, easy_vqa, quarantine, shard_index, shard_writer, tars
from pipelines.data.held_out import select_held_out
from pipelines.data.index_file import rewrite_former
from pipelines.data.options import ColumnName, SetSource, ShardOptions
from pipelines.data.sources.opened import RecordSource
from pipelines.training import metrics
from pipelines.training.files import JOB_FILE, METRICS_FILE
from pipelines.training.stage import DEFAULT_IMAGE_ASPECT_RATIO


def make_set(arguments: argparse.Namespace) -> None:
    """Make shards from data in any form that is read, or from easy-VQA.

    Raises:
        ValueError: the set cannot be made. If that is because of rejected records, they were explained before.
    """
    options = build_options(ShardOptions, arguments)
    entries: Iterable[Any]
    if arguments.easy_vqa:
        entries, images = easy_vqa.make_conversations(arguments.easy_vqa), str(easy_vqa.PACKAGE_IMAGES)
    else:
        source = build_options(SetSource, arguments, columns=_read_columns(arguments))
        entries = RecordSource(source)
        images = entries.images
    # Asked before, because afterwards the set is finished in any case.
    finished = shard_index.is_finished(arguments.out)
    try:
        with cluster.open_session():
            summary = shard_writer.make_shards(entries, images, arguments.out, options)
    except quarantine.QuarantineError as error:
        print("\n".join(error.rejections.explain()))
        raise
    if finished:
        print(
            f"{arguments.out}: already finished and unchanged; images were not read again. To make the set again, "
            "delete the folder or name another"
        )
    print(f"{arguments.out}: {summary['samples']} of {summary['records']} records kept")
    for reason, count in summary.get("repaired", {}).items():
        print(f"{count:>10} repaired, {reason}")
    if summary["quarantined"]:
        path = storage.join(arguments.out, shard_index.QUARANTINE_FILE)
        rejections = quarantine.RejectionSummary(quarantine.read_list(path))
        print("\n".join([*rejections.explain(), f"all are listed in {path}"]))


def _read_columns(arguments: argparse.Namespace) -> dict[ColumnName, str]:
    """Read the column map of the command line."""
    columns = dict(arguments.columns)
    if arguments.image_key:
        columns["image"] = arguments.image_key
    if arguments.text_key:
        columns["text"] = arguments.text_key
    if unknown := columns.keys() - set(get_args(ColumnName)):
        raise ValueError(f"--columns: got {min(unknown)}, allowed: {', '.join(get_args(ColumnName))}")
    return columns


def index_set(arguments: argparse.Namespace) -> None:
    """Write the index of tars from elsewhere, and print the counts of their samples and members.

    An index of an earlier version is written in its present form.
    """
    _check_folder(arguments.folder)
    if rewrite_former(arguments.folder):
        print(f"{arguments.folder}: wrote the index in blocks; the set and its fingerprint are the same")
        return
    try:
        with cluster.open_session():
            report = audit.index_tars(arguments.folder, arguments.max_bad_fraction)
    except quarantine.QuarantineError as error:
        print("\n".join(error.rejections.explain()))
        raise
    print(f"{arguments.folder}: indexed {report.samples} samples in {report.tars} tars")
    if report.rejections.counts:
        print("\n".join(report.rejections.explain()))
    print(f"{report.members:>10} members, of which")
    print(f"{report.used.total():>10} used{_format_counts(report.used)}")
    print(f"{report.ignored.total():>10} ignored{_format_counts(report.ignored)}")
    print(f"{report.rejected:>10} rejected with their samples")
    for line in report.notes:
        print(line)


def _format_counts(counts: Counter[str]) -> str:
    """Format counts by suffix or kind, largest first."""
    listing = ", ".join(f"{count} {tars.escape_unprintable(kind)}" for kind, count in counts.most_common(20))
    remainder = f", and {len(counts) - 20} other kinds" if len(counts) > 20 else ""
    return f": {listing}{remainder}" if listing else ""


def verify_shards(arguments: argparse.Namespace) -> None:
    """Check a set against its index, or that a run used each sample once per epoch.

    Raises:
        ValueError: there are faults; each was printed on a line.
    """
    _check_folder(arguments.folder)
    if arguments.consumed:
        require_folder(arguments.consumed, "--consumed", "the folder of a run that trained on the shards")
        confirmations, faults = _verify_coverage(arguments.folder, arguments.consumed)
    else:
        decoded = ", and every image decodes" if arguments.decode else ""
        confirmations = [f"{arguments.folder}: every byte is as the index says{decoded}"]
        with cluster.open_session():
            faults = audit.verify_set(arguments.folder, arguments.decode)
    for line in faults:
        print(line)
    if faults:
        raise ValueError(f"{arguments.folder}: {len(faults)} faults, allowed: none")
    print("\n".join(confirmations))


def store_features(arguments: argparse.Namespace) -> None:
    """Write the features of a set by the image tower of a model.

    Raises:
        ValueError: the model is not a LLaVA, the set cannot be read, or the folder has other features.
    """
    # Imports of torch and transformers take seconds, which the other verbs save.
    from pipelines.training import feature_writer
    from pipelines.training.engine import DTYPES
    from redux.hub import local_copy
    from redux.loading import load_model
    from redux.model import ReduxForConditionalGeneration

    _check_folder(arguments.folder)
    path = find_model(arguments.model)
    with local_copy(path, label="--model") as folder:
        dtype = DTYPES[arguments.precision]
        llava = load_model(ReduxForConditionalGeneration, folder, label="--model", dtype=dtype).eval()
    aspect_ratio = arguments.image_aspect_ratio or llava.config.image_aspect_ratio or DEFAULT_IMAGE_ASPECT_RATIO
    form = feature_writer.describe_format(
        llava.model, image_aspect_ratio=aspect_ratio, image_backend=arguments.image_backend
    )
    with cluster.open_session():
        images, unusable = feature_writer.write_features(arguments.folder, arguments.out, llava.model, form)
    print(
        f"{arguments.out}: features of {images} images, {form.tokens} x {form.width} values in {form.precision}, "
        f"{form.record_bytes} bytes for each"
    )
    if unusable:
        print(f"{unusable:>10} images cannot be used; training replaces their samples")


def _check_folder(folder: str) -> None:
    """Raise a ValueError if a local folder does not exist, before Ray starts; URLs are not checked."""
    if "://" not in folder:
        require_folder(Path(folder), "URI", "a folder or URL of tars")


def _verify_coverage(folder: str, run: Path) -> tuple[list[str], list[str]]:
    """Check the set against the log of a run; returns confirmations and faults, as lines."""
    job = schema.load(run / JOB_FILE)
    sets = {name: url for name, url in locate_sets(job, run.resolve()).items() if name in job.trained_sets}
    # Two names may stand for the same folder, and the log has them separately.
    names = [name for name, url in sets.items() if url == storage.make_absolute(folder)]
    if not names:
        raise ValueError(f"{folder}: {run} did not train on it, allowed: {', '.join(sets.values())}")
    log = run / consumed.CONSUMED_FILE
    samples = len(shard_index.Shards(folder))
    held_out = select_held_out(samples, job.data.hold_out, folder).tolist() if job.data.hold_out else []
    confirmations, faults = list[str](), list[str]()
    if not log.exists():
        raise ValueError(f"{log}: does not exist, allowed: a run that has trained")
    for name in names:
        with log.open("rb") as lines:
            coverages, errors = consumed.verify_coverage(lines, str(log), name, samples, held_out)
        faults += errors
        for coverage in coverages:
            # A lost end of the log would look like an early stop, but the metrics have their own count.
            if (steps := metrics.read_last_step(run, coverage.stage)) != coverage.steps:
                faults.append(
                    f"{log}: stage {coverage.stage} ends with step {coverage.steps}, {METRICS_FILE} with {steps}"
                )
            confirmations.append(
                f"{coverage.stage}: {coverage.steps} steps used {coverage.samples} samples of {name}: each of its "
                f"{samples - len(held_out)} once in each of {coverage.epochs} epochs, {coverage.partial_samples} once "
                f"in the epoch that is not finished; {coverage.replaced} replaced"
                + (f"; its {len(held_out)} held-out samples were not used" if held_out else "")
            )
    return confirmations, faults
