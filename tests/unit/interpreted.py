"""Triton's interpreter, mended: it runs kernels on a processor, so that tests need no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


def interpreter_that_knows_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's own multiplies the 16 bits of such numbers as if they were whole numbers.

    It also prepares the whole language anew at each call of a function by a kernel, which takes
    most of its time; here once a test for each module that functions are of.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:  # newer numpy makes no index of an array of one
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        def wide(x: Any) -> Any:
            is_bits = x.dtype.scalar.is_bf16()
            return (x.data.astype("uint32") << 16).view("float32") if is_bits else x.data

        return interpreter.TensorHandle(wide(a) @ wide(b) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    prepare, prepared = interpreter._patch_lang, {}

    def prepare_once(function: Any) -> Any:
        module = function.__globals__["__name__"]
        if module not in prepared:
            prepared[module] = prepare(function)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_patch_lang", prepare_once)
    yield
    for scope in reversed(prepared.values()):
        scope.restore()
