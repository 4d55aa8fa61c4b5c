"""What Triton's interpreter lacks for our tests; imported by those that may run kernels on the CPU. On a GPU it changes nothing.

It cuts fp32 down to bf16 where a GPU rounds to nearest, multiplies the bits of bf16 matrices as if they were integers, and makes loop
bounds in a way that numpy 2.4 refuses; numpy warns of infinities that are meant (1 / (1 + exp(x))); and it looks through the whole
language again for each call of a helper, which takes twice as long as the helper. Triton 3.6 and 3.7.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

__all__: list[str] = []


def _install() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    from zamba2.model.ops import triton_step

    cut = interpreter._convert_float
    language, patch = interpreter._patch_lang_tensor, interpreter._patch_lang
    run, multiply = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.create_dot

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            floats = torch.from_numpy(np.ascontiguousarray(values.view(np.float32)))
            return floats.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return (np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16).reshape(values.shape)
        return cut(values, source, target, mode)

    patched: list[set[str]] = []  # for each kernel that runs: the names of what it and its helpers have patched

    def quiet(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.append(set())
        try:
            with np.errstate(over="ignore"):
                return run(self, *arguments, **options)
        finally:
            patched.pop()

    def once(fn: Any) -> Any:
        modules = {module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core}
        if modules <= patched[-1]:
            return interpreter._LangPatchScope()
        patched[-1] |= modules
        return patch(fn)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [
            interpreter.TensorHandle(rounded(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
            if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        ]  # fmt: skip
        return multiply(self, *wide, *rest)

    def with_bounds(tensor: Any, scope: Any) -> None:
        language(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor, interpreter._patch_lang = with_bounds, once
    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.GridExecutor.__call__ = quiet
    triton_step.MOST_SPLITS = 2  # each of eight would be a program of its own


if not torch.cuda.is_available():
    with contextlib.suppress(ImportError):  # no Triton: those tests are skipped
        _install()
