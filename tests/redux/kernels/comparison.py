"""Inputs and choices with which tests compare fused kernels with plain code."""

import torch
from torch import Tensor

from redux.settings import KernelChoice

PLAIN_AND_FUSED: tuple[KernelChoice, KernelChoice] = ("plain", "fused")


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
