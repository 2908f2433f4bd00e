"""What of the training state lies on this rank: pieces of parameters in fp32 and their Adam moments.

DeepSpeed lays weights and moments out by ZeRO stage and number of workers: whole (0), in one flat vector a parameter
group that is cut into equal parts (1, 2), parameter by parameter (3).  Here every layout becomes the same list of
pieces, "elements start to stop of the parameter of this name", so that what one layout saved another can load.  It
leans on attributes of DeepSpeed's optimizers that are no documented interface; tests hold each of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("weight", *MOMENTS)


@dataclass(frozen=True)
class Fragment:
    """Elements from `start` on of the flattened parameter `name`; states: live tensors, each of `length`."""

    name: str
    start: int
    states: dict[str, Tensor]

    @property
    def length(self) -> int:
        return self.states["weight"].numel()

    @property
    def stop(self) -> int:
        return self.start + self.length


def held(engine: Any) -> list[Fragment]:
    """What this rank computes with; moments that are not there before the first step are made, zeros."""
    inner = _inner(engine)
    for master in _masters(engine):
        if not inner.state[master]:
            inner.state[master] = {
                "step": torch.zeros((), device=master.device),
                **{name: torch.zeros_like(master) for name in MOMENTS},
            }
    of = _layout(engine)
    trained = ((name, one) for name, one in engine.module.named_parameters() if one.requires_grad)
    return [fragment for name, one in trained if (fragment := of(name, one)) is not None]


def owned(engine: Any) -> list[Fragment]:
    """What this rank saves: all ranks together have every element once."""
    if engine.zero_optimization_stage():
        return held(engine)
    rank, workers = engine.global_rank, engine.dp_world_size
    return [part for whole in held(engine) if (part := _share(whole, rank, workers)).length]


def _share(whole: Fragment, rank: int, workers: int) -> Fragment:
    size = -(-whole.length // workers)
    start = min(rank * size, whole.length)
    size = min(size, whole.length - start)
    return Fragment(
        whole.name, whole.start + start, {name: one.narrow(0, start, size) for name, one in whole.states.items()}
    )


def updates(engine: Any) -> int:
    """How often the weights were changed, by AdamW's own count."""
    return max((int(state["step"].item()) for state in _inner(engine).state.values()), default=0)


def refresh(engine: Any, count: int) -> None:
    """After weights and moments were written into `held`: compute with them, after `count` updates.  A collective."""
    for state in _inner(engine).state.values():
        state["step"].fill_(count)
    optimizer = engine.optimizer
    match engine.zero_optimization_stage():
        case 0 if optimizer is not _inner(engine):
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for mine, master in zip(low, high, strict=True):
                    mine.data.copy_(master.data)
        case 1 | 2:
            optimizer.update_lp_params()
        case 3:
            optimizer._partition_all_parameters()
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            optimizer._post_step([])


def _inner(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer, within DeepSpeed's."""
    return engine.basic_optimizer


def _masters(engine: Any) -> Iterator[Tensor]:
    """The tensors that torch's optimizer updates on this rank."""
    optimizer = engine.optimizer
    if optimizer is _inner(engine):
        yield from (one for group in optimizer.param_groups for one in group["params"])
        return
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            yield from getattr(optimizer, name)
            return
    yield from (one for group in optimizer.fp32_groups for one in group)


def _layout(engine: Any) -> Callable[[str, torch.nn.Parameter], Fragment | None]:
    """From a parameter to what of it lies here, None where nothing does."""
    optimizer, inner = engine.optimizer, _inner(engine)

    def whole(name: str, one: torch.nn.Parameter) -> Fragment:
        master = masters[one]
        states = {"weight": master.data, **{moment: inner.state[master][moment] for moment in MOMENTS}}
        return Fragment(name, 0, {state: tensor.view(-1) for state, tensor in states.items()})

    def flat(name: str, one: Any) -> Fragment | None:
        if (mapping := one._hp_mapping) is None:
            return None
        # not by mapping.optim_fragment, which of several parameter groups knows only the first one's
        master, place = flats[mapping.param_group_index], mapping.hp_fragment_address
        vectors = {"weight": master.data, **{moment: inner.state[master][moment] for moment in MOMENTS}}
        states = {state: vector.narrow(0, place.start, place.numel) for state, vector in vectors.items()}
        return Fragment(name, mapping.lp_fragment_address.start, states)

    def partitioned(name: str, one: Any) -> Fragment | None:
        parts = {state: optimizer.get_local_fp32_param(one, None if state == "weight" else state) for state in STATES}
        size = parts["weight"].numel()
        start = engine.global_rank * size
        if start >= one.ds_numel:
            return None
        length = min(size, one.ds_numel - start)  # the last part is filled up
        return Fragment(name, start, {state: part.narrow(0, 0, length) for state, part in parts.items()})

    match engine.zero_optimization_stage():
        case 0 if optimizer is inner:
            masters = {one: one for group in optimizer.param_groups for one in group["params"]}
            return whole
        case 0:
            pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            masters = {mine: high for low, group in pairs for mine, high in zip(low, group, strict=True)}
            return whole
        case 1 | 2:
            flats = list(_masters(engine))
            return flat
        case _:
            return partitioned
