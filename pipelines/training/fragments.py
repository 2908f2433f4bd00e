"""Training state of one rank: fragments of parameters in fp32 with their Adam moments.

DeepSpeed stores weights and moments in a layout that depends on the ZeRO stage and the number of workers:

    ZeRO 0     whole parameters
    ZeRO 1, 2  one flat vector per parameter group, cut into equal parts
    ZeRO 3     equal parts of each parameter

This module maps every layout to one list of fragments, "elements start to stop of the parameter with this name", so
that every layout loads what another layout saved. It reads attributes of DeepSpeed's optimizers that are not a
documented interface; tests cover each of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from redux.rounding import divide_up

if TYPE_CHECKING:
    from pipelines.training.engine import DeepSpeedEngineProtocol

MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("weight", *MOMENTS)


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of a flattened parameter.

    Args:
        name: name of the parameter.
        start: index of its first element in the flattened parameter.
        states: live tensors of shape (length,), by name: "weight", and the moments of Adam.
    """

    name: str
    start: int
    states: dict[str, Tensor]

    @property
    def length(self) -> int:
        return self.states["weight"].numel()

    @property
    def stop(self) -> int:
        return self.start + self.length


def local_fragments(engine: "DeepSpeedEngineProtocol") -> list[Fragment]:
    """Return the fragments that this rank updates. Creates zero moments if there are none before the first step."""
    optimizer = engine.basic_optimizer
    for master in _iterate_masters(engine):
        if not optimizer.state[master]:
            optimizer.state[master] = {
                "step": torch.zeros((), device=master.device),
                **{name: torch.zeros_like(master) for name in MOMENTS},
            }
    find_fragment = _fragment_finder(engine)
    fragments = [
        find_fragment(name, parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    ]
    return [fragment for fragment in fragments if fragment is not None]


def owned_fragments(engine: "DeepSpeedEngineProtocol") -> list[Fragment]:
    """Return the fragments that this rank saves. Over all ranks, every element occurs once."""
    if engine.zero_optimization_stage():
        return local_fragments(engine)
    # With ZeRO 0 every rank has all elements, so each rank saves an equal share of every parameter.
    rank, workers = engine.global_rank, engine.dp_world_size
    shares = [_cut_share(fragment, rank, workers) for fragment in local_fragments(engine)]
    return [share for share in shares if share.length]


def _cut_share(fragment: Fragment, rank: int, workers: int) -> Fragment:
    """Cut the share of one rank; the last shares may be shorter or empty."""
    size = divide_up(fragment.length, workers)
    start = min(rank * size, fragment.length)
    size = min(size, fragment.length - start)
    states = {name: tensor.narrow(0, start, size) for name, tensor in fragment.states.items()}
    return Fragment(fragment.name, fragment.start + start, states)


def count_updates(engine: "DeepSpeedEngineProtocol") -> int:
    """Count the updates of the weights, from the step counter of AdamW."""
    return max((int(state["step"].item()) for state in engine.basic_optimizer.state.values()), default=0)


def copy_masters_to_model(engine: "DeepSpeedEngineProtocol", count: int) -> None:
    """Copy the fp32 master weights into the weights that compute, and set AdamW's step counter. A collective.

    Call it after weights and moments were written into the fragments of `local_fragments`.

    Args:
        engine: engine of this rank.
        count: number of updates that the loaded weights have had.
    """
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(count)
    optimizer = engine.optimizer
    match engine.zero_optimization_stage():
        # In fp32 the masters are the model's weights.
        case 0 if optimizer is not engine.basic_optimizer:
            for low_group, master_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for weight, master in zip(low_group, master_group, strict=True):
                    weight.data.copy_(master.data)
        case 1 | 2:
            optimizer.update_lp_params()
        # The calls that DeepSpeed's ZeRO-3 optimizer makes at the end of its own step.
        case 3:
            optimizer._partition_all_parameters()
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            optimizer._post_step([])


def _iterate_masters(engine: "DeepSpeedEngineProtocol") -> Iterator[Tensor]:
    """Yield the fp32 tensors that torch's optimizer updates on this rank."""
    optimizer = engine.optimizer
    # ZeRO 0 in fp32: DeepSpeed uses torch's optimizer directly.
    if optimizer is engine.basic_optimizer:
        yield from (parameter for group in optimizer.param_groups for parameter in group["params"])
        return
    # ZeRO 1 and 2, ZeRO 0 in bf16 with flat groups, ZeRO 3.
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            yield from getattr(optimizer, name)
            return
    yield from (master for group in optimizer.fp32_groups for master in group)


def _list_states(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Return an fp32 tensor that torch's optimizer updates, and its moments, by state."""
    return {"weight": master.data, **{moment: optimizer.state[master][moment] for moment in MOMENTS}}


def _fragment_finder(engine: "DeepSpeedEngineProtocol") -> Callable[[str, torch.nn.Parameter], Fragment | None]:
    """Return a function from a parameter to its local fragment; the function returns None if the rank has no part."""
    optimizer, inner = engine.optimizer, engine.basic_optimizer

    def find_whole(name: str, parameter: torch.nn.Parameter) -> Fragment:
        """ZeRO 0."""
        states = _list_states(inner, masters[parameter])
        return Fragment(name, 0, {state: tensor.view(-1) for state, tensor in states.items()})

    def find_in_flat_vector(name: str, parameter: Any) -> Fragment | None:
        """ZeRO 1 and 2."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        # DeepSpeed's mapping.optim_fragment knows the first parameter group only, so read the flat vector instead.
        master, address = flat_masters[mapping.param_group_index], mapping.hp_fragment_address
        vectors = _list_states(inner, master)
        states = {state: vector.narrow(0, address.start, address.numel) for state, vector in vectors.items()}
        return Fragment(name, mapping.lp_fragment_address.start, states)

    def find_partition(name: str, parameter: Any) -> Fragment | None:
        """ZeRO 3."""
        parts = {
            state: optimizer.get_local_fp32_param(parameter, None if state == "weight" else state) for state in STATES
        }
        size = parts["weight"].numel()
        start = engine.global_rank * size
        if start >= parameter.ds_numel:
            return None
        # DeepSpeed pads the last partition; the padding is not saved.
        length = min(size, parameter.ds_numel - start)
        return Fragment(name, start, {state: part.narrow(0, 0, length) for state, part in parts.items()})

    match engine.zero_optimization_stage():
        case 0 if optimizer is inner:
            masters = {parameter: parameter for group in optimizer.param_groups for parameter in group["params"]}
            return find_whole
        case 0:
            groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            masters = {
                weight: master
                for low_group, master_group in groups
                for weight, master in zip(low_group, master_group, strict=True)
            }
            return find_whole
        case 1 | 2:
            flat_masters = list(_iterate_masters(engine))
            return find_in_flat_vector
        case _:
            return find_partition
