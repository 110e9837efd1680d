"""Builds the compiled half of ensemw2s; everything else is declared in pyproject.toml.

``ENSEMW2S_BUILD`` says what is built: ``auto`` (default: the CPU kernels, or a pure-torch package with a warning
when there is no C++ compiler), ``cpu`` (the CPU kernels or an error), ``cuda`` (an error while the package has no
CUDA sources), ``none`` (a pure-torch package).
"""

import os
import shlex
import shutil
import warnings
from pathlib import Path

from setuptools import find_namespace_packages, setup

BUILD_MODES = ("auto", "cpu", "cuda", "none")
ROOT = Path(__file__).parent
STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10: the library then works with every later torch


def sources(*patterns: str) -> list[str]:
    """Source files as paths relative to the root, which is what setuptools wants."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def find_compiler() -> str | None:
    command = shlex.split(os.environ.get("CXX", "c++"))
    return shutil.which(command[0]) or (None if "CXX" in os.environ else shutil.which("g++"))


def build_mode() -> str:
    """``cpu`` or ``none``, after ``ENSEMW2S_BUILD`` and what this machine has."""
    mode = os.environ.get("ENSEMW2S_BUILD", "auto")
    if mode not in BUILD_MODES:
        raise SystemExit(f"ENSEMW2S_BUILD={mode!r} is not one of {', '.join(BUILD_MODES)}")
    if mode == "cuda" and not sources("csrc/cuda/*.cu"):
        raise SystemExit("ENSEMW2S_BUILD=cuda: this version has no CUDA kernels; use auto, cpu or none")
    if mode == "none" or find_compiler():
        return "none" if mode == "none" else "cpu"
    message = (
        "no C++ compiler was found (looked for $CXX, c++ and g++). Install one (Debian: apt install g++) to get "
        "the compiled kernels, or set ENSEMW2S_BUILD=none for the pure-torch package"
    )
    if mode == "cpu":
        raise SystemExit(f"ENSEMW2S_BUILD=cpu: {message}")
    warnings.warn(f"building the pure-torch package: {message}", stacklevel=1)
    return "none"


def extensions() -> dict:
    """Keyword arguments of ``setup`` that add the two compiled modules."""
    if build_mode() == "none":
        return {}
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = [
        "-O3",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ]
    flags += shlex.split(os.environ.get("ENSEMW2S_CXXFLAGS", ""))
    ops = CppExtension(
        "ensemw2s._C",
        sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc" / "include")],
        extra_compile_args={"cxx": [*flags, f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}"]},
        extra_link_args=shlex.split(os.environ.get("ENSEMW2S_LDFLAGS", "")),
        depends=sources("csrc/**/*.h", "csrc/**/*.inc"),
        py_limited_api=True,
    )
    host = Pybind11Extension(
        "ensemw2s._host",
        sources("csrc/host/*.cpp"),
        include_dirs=[str(ROOT / "csrc" / "include")],
        extra_compile_args=flags,
        depends=sources("csrc/include/*.h"),
    )
    return {"ext_modules": [ops, host], "cmdclass": {"build_ext": BuildExtension}}


setup(packages=find_namespace_packages(include=["ensemw2s*"]), **extensions())
