"""Kernels run on CPU tensors, which needs TRITON_INTERPRET=1 before anything is imported."""

from __future__ import annotations

import os

from tests.ops.conftest import fresh_compiler, generator

__all__ = ["fresh_compiler", "generator"]

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
