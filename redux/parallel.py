"""Tensor parallelism: attention modules whose heads are split over ranks, as by transformers' `tp_plan`.

Every rank has the same number of heads, so the mean over heads is the mean of the ranks' means. The weights show the
split: split projections are DTensors.
"""

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def head_mesh(attention: nn.Module, heads: int) -> "DeviceMesh | None":
    """Find the ranks that share the heads of an attention module.

    Args:
        attention: a module of transformers, whose `config` has the number of all heads.
        heads: heads that this rank computes.

    Returns:
        A mesh of one dimension; None if this rank has all heads.

    Raises:
        ValueError: heads are missing on this rank, and no weight is split accordingly.
    """
    # A module without a configuration counts as whole.
    config = getattr(attention, "config", None)
    total = getattr(config, "num_attention_heads", heads)
    if heads == total or not isinstance(total, int) or not (dist.is_available() and dist.is_initialized()):
        return None
    for weight in attention.parameters():
        if isinstance(weight, DTensor):
            # A mesh may have more axes, for data parallelism; only the axis of the split heads counts.
            for axis, placement in enumerate(weight.placements):
                if placement.is_shard() and weight.device_mesh.size(axis) * heads == total:
                    mesh = weight.device_mesh
                    return mesh if mesh.ndim == 1 else mesh[(mesh.mesh_dim_names or ())[axis]]
    raise ValueError(
        f"heads: got {heads} of {total} in {type(attention).__name__}, allowed: all of them, or equal parts that "
        "DTensor splits over ranks, as transformers' tp_plan does"
    )


def mean_over_ranks(local: Float[Tensor, "*shape"], mesh: "DeviceMesh | None") -> Float[Tensor, "*shape"]:
    """Compute the mean over all heads from the mean of each rank. A gradient flows back to each rank's part."""
    return local if mesh is None else _gather_from_ranks(local / mesh.size(), mesh, Partial())


def join_heads(local: Float[Tensor, "*shape width"], mesh: "DeviceMesh | None") -> Float[Tensor, "*shape all_width"]:
    """Concatenate the ranks' heads in the last dimension."""
    return local if mesh is None else _gather_from_ranks(local, mesh, Shard(local.dim() - 1))


def _gather_from_ranks(local: Tensor, mesh: "DeviceMesh", placement: "Placement") -> Tensor:
    # run_check=False: no collective that compares the ranks' shapes.
    distributed = DTensor.from_local(local, mesh, [placement], run_check=False)
    return distributed.redistribute(placements=[Replicate()]).to_local()
