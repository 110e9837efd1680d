"""These tests run in a process of their own, which ``tests/kernels/test_interpreter.py`` starts."""

from __future__ import annotations

import os

from tests.ops.conftest import generator  # noqa: F401

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
