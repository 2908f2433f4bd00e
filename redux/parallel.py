"""Tensor parallelism: attention modules whose heads are split over ranks, as by transformers' `tp_plan`.

A mean over heads is then the mean of the ranks' means, as all have equally many.  The weights tell where the heads are:
projections that are split are DTensors.
"""

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def head_mesh(attention: nn.Module, heads: int) -> "DeviceMesh | None":
    """Find the ranks that share the heads of an attention module; None where all heads are on this one.

    Args:
        attention: a module of transformers, whose `config` has the number of all heads.
        heads: heads that this rank computes.

    Raises:
        ValueError: heads are missing here, and no weight tells where they are.
    """
    config = getattr(attention, "config", None)
    total = getattr(config, "num_attention_heads", heads)
    if heads == total or not isinstance(total, int) or not (dist.is_available() and dist.is_initialized()):
        return None
    for weight in attention.parameters():
        if isinstance(weight, DTensor):
            for axis, placement in enumerate(weight.placements):
                if placement.is_shard() and weight.device_mesh.size(axis) * heads == total:
                    mesh = weight.device_mesh
                    return mesh if mesh.ndim == 1 else mesh[(mesh.mesh_dim_names or ())[axis]]
    raise ValueError(
        f"heads: got {heads} of {total} in {type(attention).__name__}, allowed: all of them, or equal parts that "
        "DTensor splits over ranks, as transformers' tp_plan does"
    )


def mean_over_ranks(part: Float[Tensor, "*shape"], mesh: "DeviceMesh | None") -> Float[Tensor, "*shape"]:
    """Mean over all heads, from the mean over the heads of each rank; a gradient reaches each rank's own part."""
    return part if mesh is None else _gather_from_ranks(part / mesh.size(), mesh, Partial())


def join_heads(part: Float[Tensor, "*shape width"], mesh: "DeviceMesh | None") -> Float[Tensor, "*shape all_width"]:
    """Put the ranks' heads side by side in the last dimension."""
    return part if mesh is None else _gather_from_ranks(part, mesh, Shard(part.dim() - 1))


def _gather_from_ranks(part: Tensor, mesh: "DeviceMesh", placement: "Placement") -> Tensor:
    parts = DTensor.from_local(part, mesh, [placement], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local()
