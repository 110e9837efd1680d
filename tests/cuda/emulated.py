"""The CUDA kernels compiled for the host and called through ctypes; the threads of a block run as fibers."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ensemw2s.ops.checks import COMBINES
from ensemw2s.ops.mixture_sample import MixtureSample
from ensemw2s.ops.sample_settings import SampleSettings
from ensemw2s.ops.token_adjustments import TokenAdjustments

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
EMULATION = ROOT / "tests" / "emulation"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the order of csrc/include/types.h
# Two warps to a block and few shared candidates: every path is taken at vocabularies that fibers can afford.
SMALL = ("-DENSEMW2S_SCAN_THREADS=64", "-DENSEMW2S_ROW_THREADS=64", "-DENSEMW2S_SHARED_CANDIDATES=128")
SANITIZE = ("-fsanitize=address", "-fsanitize=bounds", "-fno-sanitize-recover=bounds")


def find_compiler() -> str:
    """The host compiler's path; skips the test where there is none."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no host compiler to emulate the CUDA kernels with")
    return compiler


def compile_emulation(output: Path, *flags: str, program: bool = False, kernels: Path = KERNELS) -> Path:
    """Compile the kernels in ``kernels`` and their emulation into a library, or into the program that runs cases."""
    files = [*sorted(kernels.glob("*.cu")), *sorted(EMULATION.glob("*.cpp"))]
    left_out = {"mixture_cuda_ops.cu"} | (set() if program else {"run_cases.cpp"})  # the first is torch's half
    files = [file for file in files if file.name not in left_out]
    includes = [f"-I{path}" for path in (kernels, ROOT / "csrc" / "include", EMULATION)]
    command = [find_compiler(), "-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-DENSEMW2S_EMULATE", *SMALL]
    command += [*(() if program else ("-fPIC", "-shared")), *flags, *includes, "-o", str(output)]
    run = subprocess.run([*command, "-x", "c++", *map(str, files)], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return output


class _Settings(ctypes.Structure):
    """``EmulatedSettings`` of tests/emulation/library.h."""

    _fields_ = (
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("rows", ctypes.c_void_p * 4),
        ("wide", ctypes.c_bool * 4),
        ("seeds", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("listed", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


def _settings(
    settings: SampleSettings,
    seeds: Tensor,
    positions: Tensor,
    adjustments: TokenAdjustments | None,
    mask: Tensor | None,
) -> _Settings:
    numbers, tensors = settings.arguments()[:4], settings.arguments()[4:]
    rows = [x.data_ptr() if x is not None else None for x in tensors]
    wide = [x is not None and x.element_size() == 8 for x in tensors]
    keys = (_pointer(seeds), _pointer(positions))
    offer = [None if x is None else _pointer(x) for x in (mask, *(adjustments or (None,) * 3))]
    count = 0 if adjustments is None else adjustments.tokens.shape[1]
    return _Settings(*numbers, (ctypes.c_void_p * 4)(*rows), (ctypes.c_bool * 4)(*wide), *keys, *offer, count)


class EmulatedKernels:
    """``mixture_log_probs`` and ``mixture_sample`` on a library that ``compile_emulation`` made.

    ``order`` is the seed of the order in which the threads of a block take turns.
    """

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        for name in ("emulated_log_probs", "emulated_sample"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.order = 1

    def mixture_log_probs(self, logits: Sequence[Tensor], weights: Tensor, combine: str = "prob") -> Tensor:
        """As the op; ``logits`` are T tensors ``[rows, V]``, ``weights`` float32 ``[T]`` or ``[rows, T]``."""
        out = torch.full(logits[0].shape, 7.0)
        self._check(self.library.emulated_log_probs(*self._inputs(logits, weights, combine), _pointer(out)))
        return out

    def mixture_sample(
        self,
        logits: Sequence[Tensor],
        weights: Tensor,
        *,
        seeds: Tensor,
        positions: Tensor,
        temperature: float | Tensor = 1.0,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 1.0,
        min_p: float | Tensor = 0.0,
        combine: str = "prob",
        top_logprobs: int = 0,
        adjustments: TokenAdjustments | None = None,
        mask: Tensor | None = None,
    ) -> MixtureSample:
        """As the op; ``logits`` are T tensors ``[rows, V]``, ``weights`` float32 ``[T]`` or ``[rows, T]``."""
        rows = logits[0].shape[0]
        out = MixtureSample(
            torch.full((rows,), -7),
            torch.full((rows,), 7.0),
            torch.full((len(logits), rows), 7.0),
            torch.zeros(rows, dtype=torch.bool),
            torch.full((rows, top_logprobs), -7),
            torch.full((rows, top_logprobs), 7.0),
        )
        if adjustments is not None:
            adjustments = TokenAdjustments(*(x.contiguous() for x in adjustments))
        settings = _settings(SampleSettings(temperature, top_k, top_p, min_p), seeds, positions, adjustments, mask)
        inputs = self._inputs(logits, weights, combine)
        count = ctypes.c_int64(top_logprobs)
        self._check(self.library.emulated_sample(*inputs, ctypes.byref(settings), count, *map(_pointer, out)))
        return out

    def _inputs(self, logits: Sequence[Tensor], weights: Tensor, combine: str) -> tuple:
        first = logits[0]
        assert all(x.shape == first.shape and (x.stride(1) == 1 or x.shape[1] == 1) for x in logits)
        assert weights.dtype == torch.float32 and weights.shape in ((len(logits),), (len(first), len(logits)))
        self._alive = (list(logits), weights)
        pointers = (ctypes.c_void_p * len(logits))(*[x.data_ptr() for x in logits])
        strides = (ctypes.c_int64 * len(logits))(*[x.stride(0) for x in logits])
        return (
            ctypes.c_uint64(self.order),
            pointers,
            strides,
            len(logits),
            ctypes.c_int64(first.shape[0]),
            first.shape[1],
            _pointer(weights),
            ctypes.c_int64(len(logits) if weights.dim() > 1 else 0),
            COMBINES.index(combine),
            DTYPES.index(first.dtype),
        )

    @staticmethod
    def _check(error: bytes | None) -> None:
        if error is not None:
            raise RuntimeError(error.decode())


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
