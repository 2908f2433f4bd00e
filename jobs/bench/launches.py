"""Count the kernels that a GPU would launch, without a GPU.

    python jobs/bench/launches.py [--paths PATH ...] [--verbose]

Each path is counted with plain code and with fused kernels (interpreted, unless there is a GPU). An operator of torch
below autograd counts as one launch, unless it is a view or an allocation, or `KERNELS` has another number for it. A
path's shapes are small, since its launches do not depend on them.
"""

import argparse
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Before the first import of triton

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KERNELS = {"sort": 3, "argsort": 3, "constant_pad_nd": 2}
"""Launches of an operator on CUDA, where they are not one. A sort copies, numbers and sorts."""

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}

CallBuilder = Callable[[], Callable[[], Any]]
"""Prepares a call, and returns the function whose launches count."""


class LaunchCounter(TorchDispatchMode):
    """Counts launches by operator or kernel while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.fused: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if not is_view and name not in NO_KERNEL:
            self.operators[name] += KERNELS.get(name, 1)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def counting(self) -> Iterator["LaunchCounter"]:
        """Count operators, and Triton's launches without the operators that its interpreter uses."""
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        originals = {kind: kind.run for kind in (InterpretedFunction, JITFunction)}

        def wrap(original: Any) -> Any:
            def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
                self.fused[kernel.fn.__name__] += 1
                # An interpreted kernel calls torch for every instruction of its program.
                operators = self.operators.copy()
                try:
                    return original(kernel, *args, **kwargs)
                finally:
                    self.operators = operators

            return run

        try:
            for kind, original in originals.items():
                setattr(kind, "run", wrap(original))  # noqa: B010  mypy refuses to assign a method
            with self:
                yield self
        finally:
            for kind, original in originals.items():
                setattr(kind, "run", original)  # noqa: B010


def count_launches(path: CallBuilder, kernels: Any) -> LaunchCounter:
    """Count one call of a path, after another that is not counted."""
    from redux.kernels import get_kernels, set_kernels

    former_kernels = get_kernels()
    set_kernels(kernels)
    try:
        call = path()
        call()
        with LaunchCounter().counting() as counter:
            call()
    finally:
        set_kernels(former_kernels)
    return counter


def _tower_block(compresses: bool, has_gradient: bool, kept: int = 6, clusters: int = 3) -> Callable[[], Any]:
    """Build a block of a CLIP tower and a call of it, with the patch assignment if it compresses."""
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    from redux.settings import VMTC, CompressionStage
    from redux.tower import BlockCompression, CompressingBlock, extend_module
    from redux.vmtc import PatchAssignment

    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64)
    config._attn_implementation = "sdpa"
    block = CLIPEncoderLayer(config).eval()
    extend_module(block, CompressingBlock)
    compression = BlockCompression(CompressionStage(0, kept, clusters), VMTC(), 1)
    # 16 patches and a class token.
    hidden = torch.randn(2, 17, 32)
    assignment = PatchAssignment.untouched(2, 16, hidden.device)

    def call() -> None:
        with torch.set_grad_enabled(has_gradient):
            if compresses:
                output, token_of_patch, cluster = block(hidden, compression=compression)
                assignment.then(token_of_patch, cluster)
            else:
                output = block(hidden, attention_mask=None)
        if has_gradient:
            output.sum().backward()

    return call


PATHS: dict[str, CallBuilder] = {
    "tower block, inference": lambda: _tower_block(compresses=False, has_gradient=False),
    "tower block with VMTC, inference": lambda: _tower_block(compresses=True, has_gradient=False),
    "tower block, forward + backward": lambda: _tower_block(compresses=False, has_gradient=True),
    "tower block with VMTC, forward + backward": lambda: _tower_block(compresses=True, has_gradient=True),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), metavar="PATH", help="default: all")
    parser.add_argument("--verbose", action="store_true", help="also print the launches of each operator")
    arguments = parser.parse_args(argv)
    print("| path | plain | fused | of them Triton |\n|---|---|---|---|")
    for name in arguments.paths:
        plain, fused = count_launches(PATHS[name], "plain"), count_launches(PATHS[name], "fused")
        triton = fused.fused.total()
        print(f"| {name} | {plain.operators.total()} | {fused.operators.total() + triton} | {triton} |")
        if arguments.verbose:
            print(plain.operators, fused.operators, fused.fused, sep="\n")


if __name__ == "__main__":
    main()
