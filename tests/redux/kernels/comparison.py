"""Inputs and choices with which tests compare fused kernels with plain code."""

import torch
from torch import Tensor

from redux.settings import KernelChoice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels run: on a GPU, or interpreted on tensors of the CPU."""

PLAIN_AND_FUSED: tuple[KernelChoice, KernelChoice] = ("plain", "fused")


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
