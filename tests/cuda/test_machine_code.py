"""What can be known of the CUDA kernels' speed without a GPU: the machine code for an H100."""

from __future__ import annotations

import pytest

from tests.cuda.emulated import KERNELS
from tests.cuda.machine_code import DOUBLE, EARLY_START, LOAD_16_BYTES, LOCAL, POWER, compile_kernels
from tests.cuda.test_nvcc import nvcc  # noqa: F401

DTYPES = ("float", "BFloat16", "Half")
GROUP = 32  # logits of one lane, kGroup in mixture.cuh


@pytest.fixture(scope="module")
def kernels(nvcc, tmp_path_factory):  # noqa: F811
    """The scan, the finish and the last pass of mixture_log_probs. Every op has this scan."""
    return compile_kernels(nvcc, KERNELS / "mixture_log_probs.cu", tmp_path_factory.mktemp("code"))


@pytest.fixture(scope="module")
def sampler(nvcc, tmp_path_factory):  # noqa: F811
    return compile_kernels(nvcc, KERNELS / "mixture_sample.cu", tmp_path_factory.mktemp("sampler"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_loads_of_a_chunk_are_under_way_together(kernels, dtype):
    # One lane's part of a chunk is 128 bytes of float32 or 64 of 16-bit types. If the compiler puts what uses a load
    # between the loads, every one of them waits for memory alone.
    loads = GROUP * (4 if dtype == "float" else 2) // 16
    assert kernels[f"scan_kernel<{dtype}, 0>"].longest_run(LOAD_16_BYTES, between=2) == loads


@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions_of_a_logit(kernels, dtype):
    # A logit takes a maximum, a difference, a product, a power and a sum: five. What the lanes exchange and write is
    # shared among 32. What leads to a chunk and turns it into float32 is as much again; all of it takes an H100 0.6 of
    # the time in which it reads 16-bit logits.
    scan = kernels[f"scan_kernel<{dtype}, 0>"]
    assert scan.count(POWER) == GROUP, "powers that are subnormal would be scaled one by one"
    assert scan.straight_line_to_last(POWER) <= 6 * GROUP


@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_leaves_room_for_enough_warps(kernels, dtype):
    # 8 blocks of 128 threads have 64 registers each: 32 warps with 64 bytes a lane under way are 64 KiB for each
    # multiprocessor, where 18 KiB cover the time that memory takes. The product keeps all scores of a chunk and takes
    # 3 blocks, 24 KiB.
    assert kernels[f"scan_kernel<{dtype}, 0>"].registers <= 64
    assert kernels[f"scan_kernel<{dtype}, 1>"].registers <= 168


def test_nothing_spills_into_local_memory(kernels):
    for kernel in kernels.values():
        assert kernel.stack == 0 and kernel.count(*LOCAL) == 0, kernel.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_done_for_every_token_is_done_in_float32(kernels, dtype):
    assert kernels[f"write_kernel<{dtype}, 0>"].count(*DOUBLE) == 0
    assert kernels[f"write_kernel<{dtype}, 1>"].count(*DOUBLE) == 0
    # In the scan, what there is sums up the weights of a product.
    assert kernels[f"scan_kernel<{dtype}, 0>"].count(*DOUBLE) <= 4


def test_kernels_start_before_those_before_them_end(kernels):
    for name, kernel in kernels.items():
        if not name.startswith("write"):
            assert kernel.count(EARLY_START["lets others start"]) == 1, name
        if not name.startswith("scan"):
            assert kernel.count(EARLY_START["waits for the others"]) == 1, name


@pytest.mark.slow  # two minutes of compiling
def test_the_sampler_is_small(sampler):
    # It runs once a row, from a cold instruction cache: of 66,000 instructions, which it once had, an H100 would fetch
    # a megabyte. Double arithmetic is for the tokens that can still win, the weights and a row's totals.
    finish = [kernel for name, kernel in sampler.items() if name.startswith("sample")]
    assert len(finish) == 6
    for kernel in finish:
        assert len(kernel.instructions) <= 22_000, kernel.name
        assert kernel.count(*DOUBLE) <= 850, kernel.name
        assert kernel.registers <= 128 and kernel.stack <= 64, kernel.name
        assert kernel.count(EARLY_START["waits for the others"]) == 1, kernel.name
