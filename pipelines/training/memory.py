"""Peak memory of a worker in a stage, by part, before anything is trained.

Activations and temporary tensors are counted in a step on shapes, see `step_trace`. What DeepSpeed keeps and makes
around the step follows from the ZeRO stage, the precision and the number of workers; the formulas are those of
DeepSpeed 0.19 with the configuration of `engine.make_config`. Tests compare the sums with measured peaks.

    weights       weights that compute
    gradients     gradients between backward and update, and the buffers in which DeepSpeed sums them
    optimizer     fp32 copies of the trained weights, and two moments
    activations   tensors for the backward pass, and temporary ones, at their peak
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipelines.data.features import FeatureFormat, StoredFeatures
from pipelines.data.ingest import Segment
from pipelines.training.engine import DTYPES, MAX_REDUCE_BUCKET_SIZE, add_loss, build_module, select_trained
from pipelines.training.plan import StagePlan, StageWork
from pipelines.training.step_trace import (
    Device,
    SampleShape,
    StepTrace,
    make_caption_batch,
    make_conversation_batch,
    make_pixels,
    trace_shapes,
    trace_step,
)
from redux.configuration import ReduxConfig
from redux.cost import compute_cost
from redux.model import ReduxForConditionalGeneration
from redux.rounding import divide_up

FP32_BYTES = 4

MAX_LIVE_PARAMETERS = 1_000_000_000
"""Elements that DeepSpeed's ZeRO 3 gathers on a worker at most, by default."""

SPARE_SHARE = 0.1
"""Share of the memory that is left for the CUDA context, communication and fragmentation."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes of a worker on its device, by part. The parts are those at the time of the peak.

    Args:
        weights: weights that compute.
        gradients: gradients and the buffers in which they are summed.
        optimizer: fp32 weights and moments.
        activations: activations and temporary tensors.
        host: bytes of states that are offloaded to the memory of the host.
        phase: part of the step with the peak: "forward", "backward" or "update".
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int
    phase: str

    @property
    def total(self) -> int:
        """Peak bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class ModelShape:
    """Model of a stage on torch's device "meta".

    Args:
        module: module with its loss.
        plan: plan of the stage.
        trained: number of trained elements of each part that trains.
        frozen: number of other elements.
        image_id: id of the token `<image>`; -1 without a language model.
        features: form of the stored features that the stage reads in place of pixels; None if its tower runs.
    """

    module: torch.nn.Module
    plan: StagePlan
    trained: tuple[int, ...]
    frozen: int
    image_id: int
    features: FeatureFormat | None = None

    @property
    def num_trained(self) -> int:
        """Number of trained elements."""
        return sum(self.trained)

    @property
    def num_elements(self) -> int:
        """Number of elements of the model."""
        return self.num_trained + self.frozen

    def measure_cache(self, text: int) -> tuple[int, int]:
        """Measure the bytes of an evaluation: weights, and the caches of one sequence with an image.

        Args:
            text: text tokens of the prompt and the answer.
        """
        width = DTYPES[self.plan.stage.precision].itemsize
        llava: Any = getattr(self.module, "llava", None)
        if llava is None:
            return width * self.num_elements, 0
        cost = compute_cost(llava.config, text, bytes_per_number=width)
        return width * self.num_elements, cost.kv_bytes + cost.focus_bytes


def build_shape(
    plan: StagePlan, config: ReduxConfig | None, features: Mapping[str, StoredFeatures] | None = None
) -> ModelShape:
    """Build the model of a stage without memory.

    Args:
        plan: plan of the stage, whose tokenizer exists.
        config: configuration of a pretrained model; None builds `plan.model`.
        features: stored features of the sets, of one form.
    """
    dtype = DTYPES[plan.stage.precision]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 renames gradient checkpointing
        if config is None:
            module, parts = build_module(replace(plan, start=None))
        else:
            module, parts = add_loss(ReduxForConditionalGeneration(config), plan)
        module.to(dtype)
    groups = select_trained(module, parts, plan.stage)
    trained = tuple(sum(parameter.numel() for parameter in group) for group in groups.values())
    elements = sum(parameter.numel() for parameter in module.parameters())
    llava = getattr(module, "llava", None)
    image_id = llava.config.image_token_id if llava is not None else -1
    stored = next(iter((features or {}).values()), None)
    return ModelShape(module, plan, trained, elements - sum(trained), image_id, stored.format if stored else None)


def trace(shape: ModelShape, samples: Sequence[SampleShape], device: Device, is_fused: bool) -> StepTrace:
    """Trace the forward and backward pass of a micro-batch."""
    plan = shape.plan
    dtype = DTYPES[plan.stage.precision]

    def make_batch() -> dict[str, torch.Tensor]:
        if plan.stage.objective == "contrastive":
            return make_caption_batch(samples, plan.image_size, dtype)
        images = sum(sample.has_image for sample in samples)
        if shape.features is not None:
            features = torch.empty(images, shape.features.tokens, shape.features.width, dtype=dtype, device="meta")
            columns = {"image_features": features}
        else:
            columns = {"pixel_values": make_pixels(images, plan.image_size, dtype)}
        return columns | make_conversation_batch(samples, plan.image_tokens, shape.image_id)

    return trace_step(shape.module, make_batch, device, takes_gradients(plan), is_fused)


def takes_gradients(plan: StagePlan) -> bool:
    """Return True if gradients leave the backward pass at once."""
    stage = plan.stage
    return stage.zero_stage >= 2 or (stage.zero_stage == 1 and stage.precision == "bf16")


def estimate_memory(
    shape: ModelShape, samples: Sequence[SampleShape], workers: int, device: Device, is_fused: bool = False
) -> MemoryEstimate:
    """Estimate the peak memory of a worker.

    Args:
        shape: model of the stage.
        samples: sizes of the samples of the largest micro-batch.
        workers: number of workers.
        device: device of the workers.
        is_fused: fused kernels compute CMAI.
    """
    return sum_memory(shape, trace(shape, samples, device, is_fused), workers)


def sum_memory(shape: ModelShape, step: StepTrace, workers: int) -> MemoryEstimate:
    """Sum the memory of a worker in each phase of a step, and return that of the largest."""
    states = _count_states(shape, workers)
    phases = {
        "forward": (states.kept_gradients, step.forward_peak_bytes),
        "backward": (states.kept_gradients + states.buckets, step.backward_peak_bytes),
        "reduction": (states.reduction, 0),
        "update": (states.update, 0),
    }
    phase = max(phases, key=lambda name: sum(phases[name]))
    gradients, activations = phases[phase]
    return MemoryEstimate(states.weights, gradients, states.optimizer, activations, states.host, phase)


@dataclass(frozen=True)
class _States:
    """Bytes around the step.

    Args:
        weights, optimizer: see `MemoryEstimate`.
        kept_gradients: gradients of earlier micro-batches, during forward and backward.
        buckets: buffers of gradients that exist during the backward pass.
        reduction: gradients and buffers while gradients are summed over ranks, after the backward pass.
        update: gradients and temporary tensors of the update.
        host: offloaded states.
    """

    weights: int
    optimizer: int
    kept_gradients: int
    buckets: int
    reduction: int
    update: int
    host: int = 0


def _count_states(shape: ModelShape, workers: int) -> _States:
    """Count what DeepSpeed 0.19 keeps and makes, in bytes."""
    stage = shape.plan.stage
    width = DTYPES[stage.precision].itemsize
    trained = shape.num_trained
    share_of_rank = divide_up(trained, workers)
    bucket = width * min(trained, MAX_REDUCE_BUCKET_SIZE)
    weights = width * shape.num_elements
    # Gradients in fp32 of one part of the model, as its optimizer gets them.
    update = FP32_BYTES * divide_up(max(shape.trained), workers)
    # Sums of earlier micro-batches.
    accumulates = stage.count_accumulation_steps(workers) > 1
    accumulated = FP32_BYTES * share_of_rank if accumulates else 0
    if stage.zero_stage == 0:
        return _count_whole_states(shape, workers)
    if stage.zero_stage == 1:
        # The gradients of all weights stay until the update, as fp32.
        return _States(
            weights=weights,
            optimizer=12 * share_of_rank,
            kept_gradients=FP32_BYTES * trained if accumulates else 0,
            buckets=bucket,
            reduction=FP32_BYTES * trained + bucket,
            update=FP32_BYTES * share_of_rank + update,
        )
    if stage.zero_stage == 2:
        states = _States(
            weights=weights,
            optimizer=12 * share_of_rank,
            kept_gradients=accumulated,
            buckets=bucket,
            reduction=bucket + FP32_BYTES * share_of_rank,
            update=FP32_BYTES * share_of_rank + update,
        )
    else:
        # This worker's share, and the weights that are gathered while they are used.
        gathered = width * min(shape.num_elements, MAX_LIVE_PARAMETERS)
        weights = divide_up(weights, workers) + gathered
        gradient_bytes = FP32_BYTES * share_of_rank + bucket
        # A full bucket is copied when it is summed, within the backward pass unless it holds all gradients.
        bucket_copy = bucket if trained > MAX_REDUCE_BUCKET_SIZE else 0
        states = _States(
            weights=weights,
            optimizer=12 * share_of_rank,
            kept_gradients=gradient_bytes,
            buckets=bucket_copy,
            reduction=gradient_bytes + bucket,
            update=gradient_bytes + update,
        )
    return _offload(states, shape, workers)


def _count_whole_states(shape: ModelShape, workers: int) -> _States:
    """Count the states of ZeRO 0, which divides nothing."""
    stage, trained = shape.plan.stage, shape.num_trained
    width = DTYPES[stage.precision].itemsize
    gradients = width * trained
    accumulates = stage.count_accumulation_steps(workers) > 1
    # A flat copy in which gradients are summed over ranks.
    flat_copy = width * min(trained, MAX_REDUCE_BUCKET_SIZE) if workers > 1 else 0
    is_half = stage.precision == "bf16"
    return _States(
        weights=width * shape.num_elements,
        optimizer=(12 if is_half else 8) * trained,
        kept_gradients=gradients if accumulates else 0,
        buckets=0,
        reduction=gradients + flat_copy,
        update=gradients + (FP32_BYTES * trained if is_half else 0),
    )


def _offload(states: _States, shape: ModelShape, workers: int) -> _States:
    """Move states to the memory of the host, as the stage says."""
    stage, share_of_rank = shape.plan.stage, divide_up(shape.num_trained, workers)
    width = DTYPES[stage.precision].itemsize
    if stage.offload_parameters:
        share = divide_up(width * shape.num_elements, workers)
        states = replace(states, weights=states.weights - share, host=states.host + share)
    if stage.offload_optimizer:
        # The host has fp32 weights, moments, fp32 gradients, and a copy of the weights that compute.
        host = states.host + 12 * share_of_rank + FP32_BYTES * share_of_rank + width * share_of_rank
        states = replace(states, optimizer=0, host=host)
    return states


# --- micro-batches ---------------------------------------------------------------------------------------------------


def count_tower_tokens(shape: ModelShape) -> int | None:
    """Count the tokens that the tower makes of an image, by running it on shapes; None without a language model."""
    llava = getattr(shape.module, "llava", None)
    if llava is None:
        return None
    size, dtype = shape.plan.image_size, DTYPES[shape.plan.stage.precision]
    with torch.no_grad(), trace_shapes():
        pixels = torch.empty(1, 3, size, size, dtype=dtype, device="meta")
        return len(llava.model.get_image_features(pixels).pooler_output[0])


def choose_largest(samples: Sequence[SampleShape], count: int) -> list[SampleShape]:
    """Choose the samples of the largest micro-batch that may occur: the longest, those with most learned tokens first.

    Fewer samples than `count` are repeated.
    """
    ordered = sorted(samples, key=lambda sample: (sample.length, sample.learned, sample.has_image), reverse=True)
    return [ordered[number % len(ordered)] for number in range(count)]


def list_micro_batches(plan: StagePlan, workers: int) -> list[int]:
    """List the sizes of micro-batches with which the workers share a global batch evenly."""
    per_worker = plan.stage.global_batch_size // workers
    fewest = 2 if plan.stage.objective == "contrastive" else 1
    return [size for size in range(fewest, per_worker + 1) if per_worker % size == 0]


def plan_memory(
    shape: ModelShape, samples: Sequence[SampleShape], workers: int, device: Device, is_fused: bool = False
) -> tuple[MemoryEstimate, Callable[[int], int | None]]:
    """Estimate the memory of a worker, and find the largest micro-batch.

    The bytes of activations rise by the same amount with each sample, so two traces tell those of all sizes.

    Args:
        shape, workers, device, is_fused: as for `estimate_memory`.
        samples: sizes of samples of the stage, of which the longest make a micro-batch.

    Returns:
        The estimate for micro_batch_size, and a function from the memory of a worker in bytes, of which SPARE_SHARE
        stays free, to the largest micro-batch that fits; None if none does.
    """
    size = shape.plan.stage.micro_batch_size
    sizes = list_micro_batches(shape.plan, workers)
    other = sizes[0] if size > sizes[0] else size + 1
    step, other_step = (trace(shape, choose_largest(samples, count), device, is_fused) for count in (size, other))

    def estimate(count: int) -> MemoryEstimate:
        stage = replace(shape.plan.stage, micro_batch_size=count)
        changed = replace(shape, plan=replace(shape.plan, stage=stage))
        return sum_memory(changed, _interpolate((step, other_step), (size, other), count), workers)

    def find_largest(capacity: int) -> int | None:
        limit = (1 - SPARE_SHARE) * capacity
        return max((count for count in sizes if estimate(count).total <= limit), default=None)

    return sum_memory(shape, step, workers), find_largest


def count_queued_bytes(work: StageWork, workers: int) -> int:
    """Count the bytes of the micro-batches that are queued for a worker in the memory of its host."""
    stage = work.plan.stage
    stop = work.steps * stage.count_accumulation_steps(workers) * workers
    segment = Segment(work.reader, 0, stop)
    samples = segment.lay_out_blocks(workers).size * stage.micro_batch_size
    # The block that it reads, those ahead, and two that Ray Data's iterator holds.
    blocks = 3 + segment.count_prefetched_blocks(workers)
    return blocks * samples * work.reader.sample_bytes


def _interpolate(steps: Sequence[StepTrace], sizes: tuple[int, int], size: int) -> StepTrace:
    """Compute the trace of a micro-batch from those of two others."""
    share = (size - sizes[0]) / (sizes[1] - sizes[0])
    return StepTrace(*(round(low + share * (high - low)) for low, high in zip(*steps, strict=True)))
