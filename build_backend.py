"""setuptools as build backend, which fetches torch for an isolated build only where there are kernels to compile."""

import os
from collections.abc import Callable
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the other hooks of a backend, as they are)
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

KERNELS = ["packaging", "torch>=2.10", "pybind11>=2.13", "ninja", "numpy"]


def _requires(hook: Callable[[Any], list[str]], config_settings: Any) -> list[str]:
    # Where kernels are built, setup.py imports torch, so setuptools cannot run it to answer before torch is there.
    return hook(config_settings) if os.environ.get("ENSEMW2S_BUILD") == "none" else KERNELS


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what a wheel is built with."""
    return _requires(build_meta.get_requires_for_build_wheel, config_settings)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return what an editable install is built with."""
    return _requires(build_meta.get_requires_for_build_editable, config_settings)


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    """Return what an sdist is made with."""
    return _requires(build_meta.get_requires_for_build_sdist, config_settings)
