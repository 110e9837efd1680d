"""These tests run in a process of their own, which ``tests/kernels/test_interpreter.py`` starts."""

from __future__ import annotations

import os

from tests.ops.conftest import fresh_compiler, generator

__all__ = ["fresh_compiler", "generator"]

# Kernels run on CPU tensors, which needs the variable before anything is imported.
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels.interpreting import patch_language_once

    patch_language_once()
else:
    collect_ignore_glob = ["test_*.py"]
