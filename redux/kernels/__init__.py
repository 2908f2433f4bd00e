"""Fused Triton kernels for GPUs, and the choice between them and the plain code in torch.

The plain code is the definition: it runs on any device, and tests compare every kernel with it. A kernel replaces it
where many small launches, or large intermediate tensors, cost more than the arithmetic.

The choice holds for the whole process, like torch.backends:

    auto    fused on a GPU where the kernel supports the call, else plain
    plain   never a kernel
    fused   a kernel, or a ValueError with the reason why there is none

Kernels run on CPU tensors if TRITON_INTERPRET=1 is set before the first import of triton. Tests use that.
"""

import logging
import os
from importlib.util import find_spec
from typing import get_args

import torch

from redux.settings import KernelChoice

# Found once: a call from compiled code must not search for modules.
_HAS_TRITON = find_spec("triton") is not None

_logger = logging.getLogger(__name__)
_choice: KernelChoice = "auto"
_logged_choices: set[tuple[str, str]] = set()


def set_kernels(choice: KernelChoice) -> None:
    """Choose fused kernels or plain code, for all models of this process.

    Raises:
        ValueError: the choice is none of auto, plain and fused.
    """
    global _choice
    if choice not in get_args(KernelChoice):
        raise ValueError(f"kernels: got {choice!r}, allowed: {', '.join(get_args(KernelChoice))}")
    _choice = choice


def get_kernels() -> KernelChoice:
    """Return the current choice."""
    return _choice


def is_interpreting() -> bool:
    """Return True if Triton interprets kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_fused(part: str, device: torch.device, unsupported: str = "") -> bool:
    """Decide if a call takes the fused kernel, and log each decision once.

    Args:
        part: the part of the method, for messages, such as "K-means".
        device: device of the call's tensors.
        unsupported: reason why the kernel cannot serve this call; "" if it can.

    Raises:
        ValueError: the choice is "fused", and there is no kernel for this call.
    """
    if _choice == "plain" or (_choice == "auto" and device.type != "cuda"):
        return False
    reason = unsupported or _missing_support(device)
    if torch.compiler.is_compiling():
        return not reason
    if reason and _choice == "fused":
        raise ValueError(f"kernels: got fused, allowed for {part}: auto or plain, because {reason}")
    if (part, reason) not in _logged_choices:
        _logged_choices.add((part, reason))
        if reason:
            _logger.warning("%s: plain code, because %s", part, reason)
        else:
            _logger.info("%s: fused kernel", part)
    return not reason


def _missing_support(device: torch.device) -> str:
    """Return why no kernel can run on a device, or "" if one can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if device.type != "cuda" and not is_interpreting():
        return f"tensors are on {device.type}, and kernels need a GPU"
    return ""
