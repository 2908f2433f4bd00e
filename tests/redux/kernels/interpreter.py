"""Three gaps of Triton's interpreter (3.6 to 3.9), closed for tests. Import this module before kernels run.

NumPy 2.4 no longer converts an array of one element to an int, which loops with computed bounds need (3.6). Products
of bfloat16, which NumPy lacks, multiply the integers that stand for the numbers. A comparison of scalars has the type
of its operands, so combined with a block of booleans it gives a mask of integers, which 3.9 refuses.

The interpreter also replaces the functions of the language at each call of a device function, which took 40 % of the
time. Here a kernel does so once, at its launch.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_language = interpreter._patch_lang
_patch_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch_language_once(function: Any) -> Any:
    languages = [language for language in (tl, tl.core) if language in function.__globals__.values()]
    if any(tl.core.is_builtin(language.load) for language in languages):
        return _patch_language(function)
    return interpreter._LangPatchScope()


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _create_splat_of_data(self: Any, block_type: Any, value: Any) -> Any:
    block = np.full(block_type.shape, value.data.reshape(()), dtype=value.data.dtype)
    return interpreter.TensorHandle(block, value.dtype.scalar)


def _to_float32(value: Any) -> Any:
    if value.dtype.scalar != tl.bfloat16:
        return value
    return interpreter.TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _create_dot_in_float32(self: Any, a: Any, b: Any, *args: Any) -> Any:
    return _create_dot(self, _to_float32(a), _to_float32(b), *args)


interpreter._patch_lang = _patch_language_once
interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter.InterpreterBuilder.create_splat = _create_splat_of_data
interpreter.InterpreterBuilder.create_dot = _create_dot_in_float32
