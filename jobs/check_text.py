"""Text of `redux check`: samples, steps, cost and memory."""

from collections.abc import Sequence

import numpy as np

from pipelines.evaluation.overlap import Overlap
from pipelines.training.inspection import SetInspection
from pipelines.training.memory import MemoryEstimate
from pipelines.training.step_trace import Device

MAX_FORMATS = 6


def format_bytes(count: float) -> str:
    """Format bytes with three digits.

    >>> format_bytes(1_500_000), format_bytes(80 * 2**30)
    ('1.43 MiB', '80 GiB')
    """
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def format_inspection(inspected: SetInspection, max_length: int | None) -> str:
    """Format what the drawn samples of a set are."""
    lines = [f"  {inspected.name}: {inspected.samples:,} samples, {inspected.drawn:,} drawn"]
    if inspected.num_unusable:
        kinds = sorted(inspected.unusable.items(), key=lambda item: -item[1].count)
        lines.append(
            f"    not usable   {inspected.num_unusable}: "
            + ", ".join(f"{examples.count} {kind}" for kind, examples in kinds[:MAX_FORMATS])
        )
    # A set without a usable sample has no lengths.
    if not inspected.shapes:
        return "\n".join(lines)
    lengths = np.array([shape.length for shape in inspected.shapes])
    learned = np.array([shape.learned for shape in inspected.shapes])
    # A contrastive stage compares whole captions and learns no single token.
    if not inspected.learns_tokens:
        lines.append(f"    tokens       {_format_range(lengths)}")
    else:
        lines += [
            f"    tokens       {_format_range(lengths)}"
            + (f", {inspected.truncated} of {len(lengths)} cut at {max_length}" if max_length else ""),
            f"    learned      {learned.sum() / lengths.sum():.1%} of the tokens, "
            f"{int((learned == 0).sum())} samples without any",
        ]
    if inspected.formats:
        formats = ", ".join(f"{count} {name}" for name, count in inspected.formats.most_common(MAX_FORMATS))
        width, height = np.array(inspected.sides).T if inspected.sides else (np.zeros(1), np.zeros(1))
        lines.append(
            f"    images       {formats}; width {_format_range(width)}; height {_format_range(height)}; "
            f"{len(inspected.image_hashes)} different"
        )
    text_only = sum(not shape.has_image for shape in inspected.shapes)
    if text_only:
        lines.append(f"    text only    {text_only} of {len(lengths)}")
    return "\n".join(lines)


def _format_range(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, (0, 50, 100))
    return f"{low:.0f} to {high:.0f}, median {middle:.0f}"


def format_steps(steps: int, batch: int, tokens: float, rate: float | None, workers: int, price: float | None) -> str:
    """Format steps, tokens, hours and cost of a stage.

    Args:
        steps: number of steps.
        batch: samples of a step.
        tokens: tokens of the stage.
        rate: tokens per second of all workers; None if unknown.
        workers: number of workers.
        price: price of a GPU-hour; None if unknown.
    """
    text = f"  steps: {steps:,} of {batch:,} samples, {tokens / 1e6:,.4g} million tokens"
    if rate is None:
        return f"{text}; hours unknown without --tokens-per-s"
    hours = tokens / rate / 3600
    text += f"; {_format_hours(hours)} at {rate:,.0f} tokens/s, {_format_hours(hours * workers)} of GPUs"
    return text if price is None else f"{text}, cost {hours * workers * price:,.2f} at {price:g} per GPU-hour"


def _format_hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.2g} minutes"


def format_memory(
    estimate: MemoryEstimate,
    device: Device,
    memory_per_worker: int | None,
    micro_batch_size: int,
    largest: int | None,
    samples_per_worker: int,
    queued: int,
) -> str:
    """Format the peak memory of a worker by part.

    Args:
        estimate: the estimate.
        device: device of the workers.
        memory_per_worker: memory of a worker in bytes; None if unknown.
        micro_batch_size: samples of a micro-batch.
        largest: largest micro-batch that fits; None if unknown.
        samples_per_worker: samples of a global batch that a worker has, the largest micro-batch there is.
        queued: bytes of micro-batches that are queued for a worker.
    """
    parts: Sequence[tuple[str, int]] = (
        ("weights", estimate.weights),
        ("gradients", estimate.gradients),
        ("optimizer", estimate.optimizer),
        ("activations", estimate.activations),
    )
    where = "GPU memory" if device == "cuda" else "memory"
    listing = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts)
    lines = [f"  {where} of a worker: {format_bytes(estimate.total)} at the peak ({estimate.phase}): {listing}"]
    host = [f"queued micro-batches {format_bytes(queued)}"]
    if estimate.host:
        host.append(f"offloaded states {format_bytes(estimate.host)}")
    lines.append(f"  host memory of a worker, besides its process: {', '.join(host)}")
    if memory_per_worker:
        limit = format_bytes(memory_per_worker)
        fits = f"largest that fits into {limit}: {largest}" if largest else "no micro-batch fits"
        if largest == samples_per_worker:
            fits = f"all {largest} samples of a worker (global_batch_size / workers) fit into {limit}"
        lines.append(f"  micro_batch_size: {micro_batch_size}; {fits}")
    return "\n".join(lines)


def format_overlap(overlap: Overlap, name: str, samples: int) -> str:
    """Format the overlap of an evaluation and a set."""
    compared = "all" if overlap.compared == samples else f"{overlap.compared:,} of {samples:,}"
    return (
        f"overlap: {len(overlap.pairs)} of {overlap.questions:,} questions of {overlap.task} are in {name} "
        f"({compared} samples compared, {overlap.drawn:,} of them also by thumbnails)"
    )


def format_evaluation(task: str, cache: tuple[int, int], tokens: int, batch_size: int) -> str:
    """Format the memory of an evaluation.

    Args:
        task: name of the task.
        cache: bytes of the weights, and of the caches of one sequence.
        tokens: text tokens of the longest prompt and its answer.
        batch_size: questions that are answered together.
    """
    weights, kv = cache
    return (
        f"memory of an actor that answers {task}: weights {format_bytes(weights)}, KV cache "
        f"{format_bytes(kv * batch_size)} for batch_size {batch_size} of an image and up to {tokens} text tokens"
    )
