"""Compile kernels for a GPU of type Hopper, without one, and print their code.

    python -m tests.redux.kernels.hopper_code

Prints a JSON list with (name, stages of the software pipeline, code in Triton's GPU dialect) of each kernel that
multiplies.
"""

import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

# Before the first import of triton: an interpreted kernel has no code.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from redux.kernels.kmeans import cluster_tokens
from redux.kernels.masked_attention import KeyMask, make_key_mask, masked_attention
from redux.kernels.mean_attention import mean_attention

LENGTH, FIRST_ROW = 300, 150


class HopperDriver:
    """A driver that loads and launches nothing."""

    launcher_cls = staticmethod(lambda *_args, **_options: lambda *_args, **_options: None)

    utils = SimpleNamespace(
        load_binary=lambda *_args: (0, 0, 0, 0, 1024),
        get_device_properties=lambda _device: {"max_shared_mem": 232448, "warpSize": 32},
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_kernels() -> None:
    """Call the kernels that multiply, on tensors of the CPU."""
    cluster_tokens(torch.randn(1, 345, 128).bfloat16(), None, 46, 1, "strided")
    query, key, value = (torch.randn(1, 2, LENGTH, 128).bfloat16().requires_grad_() for _ in range(3))
    slots, rows = torch.zeros(1, LENGTH, dtype=torch.int32), torch.zeros(1, LENGTH - FIRST_ROW, 64)
    for is_weight in (True, False):
        mean_attention(query.detach(), key.detach(), slots, rows, FIRST_ROW, 0.1, is_weight, neighbours=True)
    pairs = make_key_mask(1, LENGTH, torch.device("cpu"))
    mask = KeyMask(pairs, torch.tensor([[10, 100]], dtype=torch.int32), FIRST_ROW)
    masked_attention(query, key, value, 0.1, mask=mask).sum().backward()


def main() -> None:
    """Compile, and print the code."""
    kernels: list[tuple[str, int, str]] = []
    compile_kernel: Callable[..., Any] = triton.compiler.compile

    def record_code(*args: Any, **options: Any) -> Any:
        compiled = compile_kernel(*args, **options)
        if "warp_group_dot" in compiled.asm["ttgir"]:
            kernels.append((compiled.metadata.name, compiled.metadata.num_stages, compiled.asm["ttgir"]))
        return compiled

    driver.set_active(HopperDriver())
    triton.compiler.compile = jit.compile = record_code
    compile_kernels()
    print(json.dumps(kernels))


if __name__ == "__main__":
    main()
