"""Triton's interpreter, without the work that it does again and again for nothing."""

from __future__ import annotations

from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once() -> None:
    """Let `triton.language` work on arrays for as long as the process lives.

    The interpreter patches the language anew for each kernel and for each function that a kernel calls, and takes the
    patches away behind it. That is more than half of its time, and only code that is compiled would miss the original.
    """
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
