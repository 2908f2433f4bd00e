"""Decisions in float32: which tokens a compression keeps, and which pairs an attention loses."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off, which would round the products behind a decision to half precision.

    Args:
        device: device of the tensors.
    """
    is_on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()
