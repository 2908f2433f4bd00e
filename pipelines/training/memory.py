"""Peak memory of a worker in a stage, by part, before anything is trained.

Activations and temporary tensors are counted in a step on shapes, see `step_trace`. What DeepSpeed keeps and makes
around the step follows from the ZeRO stage, the precision and the number of workers; the formulas are those of
DeepSpeed 0.19 with the configuration of `engine.make_config`. Tests compare the sums with measured peaks.

    weights       weights that compute
    gradients     gradients between backward and update, and the buffers in which DeepSpeed sums them
    optimizer     fp32 copies of the trained weights, and two moments
    activations   tensors for the backward pass, and temporary ones, at their peak
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipelines.training.engine import DTYPES, MAX_REDUCE_BUCKET_SIZE, add_loss, build_module, select_trained
from pipelines.training.plan import StagePlan
from pipelines.training.step_trace import (
    Device,
    SampleShape,
    StepTrace,
    make_captions,
    make_conversations,
    trace_shapes,
    trace_step,
)
from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration

FP32_BYTES = 4

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
    """

    module: torch.nn.Module
    plan: StagePlan
    trained: tuple[int, ...]
    frozen: int
    image_id: int

    @property
    def num_trained(self) -> int:
        """Number of trained elements."""
        return sum(self.trained)

    @property
    def num_elements(self) -> int:
        """Number of elements of the model."""
        return self.num_trained + self.frozen


def build_shape(plan: StagePlan, config: ReduxConfig | None) -> ModelShape:
    """Build the model of a stage without memory.

    Args:
        plan: plan of the stage, whose tokenizer exists.
        config: configuration of a pretrained model; None builds `plan.model`.
    """
    dtype = DTYPES[plan.stage.precision]
    with torch.device("meta"):
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
    return ModelShape(module, plan, trained, elements - sum(trained), image_id)


def trace(shape: ModelShape, samples: Sequence[SampleShape], device: Device, is_fused: bool) -> StepTrace:
    """Trace the forward and backward pass of a micro-batch."""
    plan = shape.plan
    dtype = DTYPES[plan.stage.precision]

    def make_batch() -> dict[str, torch.Tensor]:
        if plan.stage.objective == "contrastive":
            return make_captions(samples, plan.image_size, dtype)
        return make_conversations(samples, plan.image_tokens, shape.image_id, plan.image_size, dtype)

    return trace_step(shape.module, make_batch, device, takes_gradients(plan), is_fused)


def takes_gradients(plan: StagePlan) -> bool:
    """Tell if gradients leave the backward pass at once."""
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
    plan, step = shape.plan, trace(shape, samples, device, is_fused)
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
    stage = shape.plan.stage
    width = DTYPES[stage.precision].itemsize
    trained, part = shape.num_trained, -(-shape.num_trained // workers)
    largest_group = -(-max(shape.trained) // workers)
    bucket = min(trained, MAX_REDUCE_BUCKET_SIZE)
    accumulates = stage.count_accumulation_steps(workers) > 1
    weights = width * (trained + shape.frozen)
    match stage.zero_stage, stage.precision:
        case 0, "fp32":
            flat = FP32_BYTES * bucket if workers > 1 else 0
            gradients = FP32_BYTES * trained
            return _States(weights, 8 * trained, gradients * accumulates, 0, gradients + flat, gradients)
        case 0, "bf16":
            flat = width * bucket if workers > 1 else 0
            gradients = width * trained
            return _States(
                weights, 12 * trained, gradients * accumulates, 0, gradients + flat, gradients + FP32_BYTES * trained
            )
        case 1, "fp32":
            gradients = FP32_BYTES * trained
            return _States(
                weights, 12 * part, gradients * accumulates, FP32_BYTES * bucket, FP32_BYTES * (bucket + part),
                FP32_BYTES * (part + largest_group),
            )  # fmt: skip
        case 1, "bf16":
            gradients = FP32_BYTES * trained
            return _States(
                weights, 12 * part, gradients, width * bucket, gradients + width * bucket + FP32_BYTES * part,
                FP32_BYTES * (part + largest_group),
            )  # fmt: skip
        case 2, "fp32":
            return _States(
                weights, 12 * part, FP32_BYTES * part * accumulates, FP32_BYTES * bucket, FP32_BYTES * (bucket + part),
                FP32_BYTES * (part + largest_group),
            )  # fmt: skip
        case 2, "bf16":
            return _States(
                weights, 12 * part, FP32_BYTES * part * accumulates, width * bucket,
                width * bucket + FP32_BYTES * part, FP32_BYTES * part,
            )  # fmt: skip
    gathered = min(trained + shape.frozen, 1_000_000_000)
    own = -(-(trained + shape.frozen) // workers)
    optimizer = 8 * part if stage.precision == "fp32" else 12 * part
    gradients = FP32_BYTES * part + width * bucket
    return _States(width * (own + gathered), optimizer, gradients, 0, gradients, gradients)


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


def find_largest_micro_batch(
    shape: ModelShape,
    samples: Sequence[SampleShape],
    workers: int,
    device: Device,
    is_fused: bool,
    capacity: int,
) -> int | None:
    """Find the largest micro-batch whose step fits into the memory of a worker; None if none does.

    Args:
        shape, workers, device, is_fused: as for `estimate_memory`.
        samples: sizes of samples of the stage.
        capacity: memory of a worker in bytes, of which SPARE_SHARE stays free.
    """
    sizes = list_micro_batches(shape.plan, workers)

    def fits(size: int) -> bool:
        stage = replace(shape.plan.stage, micro_batch_size=size)
        changed = replace(shape, plan=replace(shape.plan, stage=stage))
        total = estimate_memory(changed, choose_largest(samples, size), workers, device, is_fused).total
        return total <= (1 - SPARE_SHARE) * capacity

    # the bytes rise with the size, so a binary search needs few traces
    return sizes[found - 1] if (found := bisect_left(sizes, True, key=lambda size: not fits(size))) else None
