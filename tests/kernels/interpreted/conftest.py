"""These tests run in a process of their own, which ``tests/kernels/test_interpreter.py`` starts."""

from __future__ import annotations

import os

from tests.ops.conftest import fresh_compiler, generator

__all__ = ["fresh_compiler", "generator"]

# Kernels run on CPU tensors, which needs the variable before anything is imported.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
