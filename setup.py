"""Builds the compiled half of ensemw2s and its page on PyPI; everything else is declared in pyproject.toml.

``ENSEMW2S_BUILD`` says what is built: ``auto`` (default: the CPU kernels, and the CUDA kernels when torch is a CUDA
build and a CUDA toolkit is found, whether or not a GPU is; a pure-torch package with a warning when there is no C++
compiler), ``cpu`` (the CPU kernels or an error), ``cuda`` (both or an error, also beside a CPU torch), ``none`` (a
pure-torch package).

The CUDA kernels go into the same library: nvcc compiles them to objects, with its runtime linked statically. Torch's
``CUDAExtension`` would tie the library to one CUDA torch.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import tomllib
import warnings
from pathlib import Path

from setuptools import find_namespace_packages, setup

BUILD_MODES = ("auto", "cpu", "cuda", "none")
ROOT = Path(__file__).parent
STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10: the library then works with every later torch
# Machine code for A100 and H100 and their kin, and an intermediate form for the chips after them.
CUDA_ARCHITECTURES = (
    "--threads=2",  # one for each
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
)
# A Markdown link or picture whose target is a file of this project: neither an address nor a place on the same page.
RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def long_description(readme: str, project: dict) -> str:
    """The README as PyPI shows it, where a relative link leads nowhere: to the files of this version's tag."""
    repository = project.get("urls", {}).get("Repository")
    if repository is None:
        return readme

    def absolute(found: re.Match) -> str:
        picture, text, path = found.groups()
        folder = "raw" if picture else "blob"
        return f"{picture}[{text}]({repository.rstrip('/')}/{folder}/v{project['version']}/{path})"

    return RELATIVE_LINK.sub(absolute, readme)


def sources(*patterns: str) -> list[str]:
    """Source files as paths relative to the root, which is what setuptools wants."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def find_compiler() -> str | None:
    command = shlex.split(os.environ.get("CXX", "c++"))
    return shutil.which(command[0]) or (None if "CXX" in os.environ else shutil.which("g++"))


def find_cuda_toolkit() -> Path | None:
    """The folder that holds ``nvvm`` and the runtime, from ``CUDA_HOME``, ``CUDA_PATH``, nvcc or the usual place."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = named or [*toolkit_of_nvcc(), Path("/usr/local/cuda")]
    for folder in candidates:
        if (folder / "nvvm").is_dir() and (folder / "bin" / "nvcc").is_file() and cuda_libraries(folder):
            return folder.resolve()
    return None


def toolkit_of_nvcc() -> list[Path]:
    """Where the nvcc on ``PATH`` says that it lives, which sees through links and wrapper scripts."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)
    return [Path(top) for top in re.findall(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)]


def cuda_libraries(toolkit: Path) -> Path | None:
    target = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    found = (toolkit / name for name in ("lib64", "lib", f"targets/{target}-linux/lib"))
    return next((folder for folder in found if (folder / "libcudart_static.a").is_file()), None)


def build_mode() -> str:
    """``cuda``, ``cpu`` or ``none``, after ``ENSEMW2S_BUILD`` and what this machine has."""
    mode = os.environ.get("ENSEMW2S_BUILD", "auto")
    if mode not in BUILD_MODES:
        raise SystemExit(f"ENSEMW2S_BUILD={mode!r} is not one of {', '.join(BUILD_MODES)}")
    if mode == "none":
        return mode
    if not find_compiler():
        message = (
            "no C++ compiler was found (looked for $CXX, c++ and g++). Install one (Debian: apt install g++) to get "
            "the compiled kernels, or set ENSEMW2S_BUILD=none for the pure-torch package"
        )
        if mode != "auto":
            raise SystemExit(f"ENSEMW2S_BUILD={mode}: {message}")
        warnings.warn(f"building the pure-torch package: {message}", stacklevel=1)
        return "none"
    return mode if mode == "cpu" else with_or_without_cuda(mode)


def with_or_without_cuda(mode: str) -> str:
    """``cuda`` if that was asked for or fits torch, else ``cpu``."""
    import torch

    if mode == "auto" and torch.version.cuda is None:
        return "cpu"
    if find_cuda_toolkit():
        return "cuda"
    message = (
        "no CUDA toolkit was found (looked at $CUDA_HOME, $CUDA_PATH, the nvcc on PATH and /usr/local/cuda for a "
        "folder with bin/nvcc, nvvm and libcudart_static.a). Install one or point CUDA_HOME at it"
    )
    if mode == "cuda":
        raise SystemExit(f"ENSEMW2S_BUILD=cuda: {message}, or set ENSEMW2S_BUILD=cpu for the CPU kernels alone")
    warnings.warn(f"building the CPU kernels alone: {message} to get the CUDA kernels", stacklevel=1)
    return "cpu"


def compile_cuda(folder: Path) -> list[str]:
    """Objects of ``csrc/cuda/*.cu``, in ``folder``."""
    from torch.utils.cpp_extension import include_paths

    toolkit = find_cuda_toolkit()
    folder.mkdir(parents=True, exist_ok=True)
    includes = [ROOT / "csrc" / "include", ROOT / "csrc" / "cuda"]
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags += [*CUDA_ARCHITECTURES, "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}"]
    flags += [f"-I{path}" for path in includes] + [f"-isystem={path}" for path in include_paths()]
    if "CXX" in os.environ:
        flags.append(f"-ccbin={shlex.split(os.environ['CXX'])[0]}")
    flags += shlex.split(os.environ.get("ENSEMW2S_NVCCFLAGS", ""))
    objects = []
    for source in sources("csrc/cuda/*.cu"):
        objects.append(str(folder / f"{Path(source).stem}.cuda.o"))
        subprocess.run([str(toolkit / "bin" / "nvcc"), *flags, "-c", source, "-o", objects[-1]], cwd=ROOT, check=True)
    return objects


def extensions() -> dict:
    """Keyword arguments of ``setup`` that add the two compiled modules."""
    mode = build_mode()
    if mode == "none":
        return {}
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildWithKernels(BuildExtension):
        def build_extensions(self) -> None:
            if mode == "cuda":
                ops.extra_objects = compile_cuda(Path(self.build_temp).absolute() / "cuda")
            super().build_extensions()

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
    link_flags = shlex.split(os.environ.get("ENSEMW2S_LDFLAGS", ""))
    if mode == "cuda":
        link_flags += [f"-L{cuda_libraries(find_cuda_toolkit())}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    ops = CppExtension(
        "ensemw2s._C",
        sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc" / "include")],
        extra_compile_args={"cxx": [*flags, f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}"]},
        extra_link_args=link_flags,
        depends=sources("csrc/**/*.h", "csrc/**/*.inc", "csrc/cuda/*"),
        py_limited_api=True,
    )
    host = Pybind11Extension(
        "ensemw2s._host",
        sources("csrc/host/*.cpp"),
        include_dirs=[str(ROOT / "csrc" / "include")],
        extra_compile_args=flags,
        depends=sources("csrc/include/*.h"),
    )
    return {"ext_modules": [ops, host], "cmdclass": {"build_ext": BuildWithKernels}}


setup(
    packages=find_namespace_packages(include=["ensemw2s*"]),
    long_description=long_description(
        (ROOT / "README.md").read_text(encoding="utf-8"),
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"],
    ),
    long_description_content_type="text/markdown",
    **extensions(),
)
