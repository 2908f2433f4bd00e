"""Triton's interpreter, which runs kernels on a CPU."""

import sys
from dataclasses import replace
from typing import Any


def omit_overflow_checks() -> None:
    """Let the interpreter compile arithmetic as the compiler for GPUs does: without checks that nothing reads.

    Triton 3.9 computes each sum and product again with 64 bits, and then drops the comparison unless it debugs. That is
    a quarter of the time. Does nothing if Triton is not imported.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter:
        builder = interpreter.interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=False)
