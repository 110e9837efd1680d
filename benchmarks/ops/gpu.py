"""The ops on a GPU against eager torch, torch.compile and other kernels, with the time of one read as the floor.

    python -m benchmarks.ops.gpu --csv benchmarks/results/gpu-h100.csv --plot benchmarks/results/gpu-h100.png

Medians of `triton.testing.do_bench`, which empties the L2 cache before each call; inputs rotate through several buffers
beside that. `do_bench_cudagraph` tells the time of the card without the host's. The floor is the bytes that must be
read, over the measured bandwidth of a copy on the same card.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.measure import environment
from benchmarks.ops.test_mixture import SETTINGS, TOP_K_TOP_P, eager_log_probs, eager_sample, flat
from ensemw2s.ops import (
    available_backends,
    draw_seeds,
    linear_weighted_cross_entropy,
    mixture_kl,
    mixture_log_probs,
    mixture_sample,
)

FIELDS = [
    "op",
    "case",
    "impl",
    "dtype",
    "T",
    "B",
    "V",
    "median_us",
    "p20_us",
    "p80_us",
    "graph_us",
    "bytes",
    "share_of_copy_bandwidth",
    "peak_mb",
    "ratio_to_op",
    "card",
    "copy_gb_per_s",
    "triton",
    "torch",
    "python",
    "commit",
]
QUANTILES = [0.5, 0.2, 0.8]
SAMPLERS = {name: SETTINGS[name] for name in ("greedy", "top-k 50 + top-p 0.9", "top-p 0.9 at 0.7", "plain")}


def copy_bandwidth() -> float:
    """Bytes per second that a copy within the card's memory reads and writes."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


def peak_megabytes(call: Callable[[], Any]) -> float:
    """Memory that one call allocates at most, beyond what was there, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def graph_microseconds(call: Callable[[], Any]) -> str:
    """Median time of a call out of a CUDA graph, without the host's; empty for one that cannot be captured.

    The buffers do not rotate in a graph: what fits into the cache is read from it.
    """
    from triton.testing import do_bench_cudagraph

    try:
        return f"{do_bench_cudagraph(call, rep=20, return_mode='median') * 1e3:.4g}"
    except RuntimeError:
        return ""


class Table:
    """Rows of the CSV."""

    def __init__(self) -> None:
        import triton

        self.rows: list[dict[str, Any]] = []
        self.bandwidth = copy_bandwidth()
        self.machine = {
            "card": torch.cuda.get_device_name(),
            "copy_gb_per_s": f"{self.bandwidth / 1e9:.0f}",
            "triton": triton.__version__,
            **{name: environment()[name] for name in ("torch", "python", "commit")},
        }

    def compare(self, case: dict[str, Any], variants: dict[str, Callable[[], Any]]) -> None:
        """Time the variants of a case; the first one is the op on its preferred backend."""
        from triton.testing import do_bench

        op = None
        for name, variant in variants.items():
            try:
                median, low, high = do_bench(variant, warmup=25, rep=100, quantiles=QUANTILES)
            except torch.OutOfMemoryError:
                print(f"{case['op']} {case['case']} {name}: out of memory", flush=True)
                continue
            op = median if op is None else op
            row = {
                **case,
                "impl": name,
                "median_us": f"{median * 1e3:.4g}",
                "p20_us": f"{low * 1e3:.4g}",
                "p80_us": f"{high * 1e3:.4g}",
                "graph_us": graph_microseconds(variant) if name in ("cuda", "triton") else "",
                "share_of_copy_bandwidth": f"{case['bytes'] / (median * 1e-3) / self.bandwidth:.3g}",
                "peak_mb": f"{peak_megabytes(variant):.4g}",
                "ratio_to_op": f"{median / op:.3g}",
                **self.machine,
            }
            self.rows.append(row)
            print(*(str(row[field]).ljust(14) for field in FIELDS[:8] + FIELDS[10:15]), flush=True)

    def write(self, path: Path) -> None:
        """The tidy CSV."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)

    def plot(self, path: Path) -> None:
        """Time against bytes with the line of the copy's bandwidth: how far each op is from one read."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 5))
        for impl in dict.fromkeys(row["impl"] for row in self.rows):
            rows = [row for row in self.rows if row["impl"] == impl and row["op"].startswith("mixture_sample")]
            if rows:
                axes.scatter([r["bytes"] for r in rows], [float(r["median_us"]) for r in rows], label=impl, s=18)
        ends = sorted({row["bytes"] for row in self.rows if row["op"].startswith("mixture_sample")})
        axes.plot(ends, [size / self.bandwidth * 1e6 for size in ends], color="black", label="one read")
        axes.set(xscale="log", yscale="log", xlabel="bytes of logits", ylabel="median time, us")
        axes.set_title(f"mixture_sample on {self.machine['card']}")
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=130, bbox_inches="tight")


def rotating(make: Callable[[], Any], count: int = 3) -> Iterator[Any]:
    return cycle([make() for _ in range(count)])


def backends(op: str) -> list[str]:
    return [name for name in available_backends("cuda")[op] if name != "reference"]


def samplers(table: Table) -> None:
    """Greedy, top-k + top-p and plain sampling of eight experts over a large vocabulary."""
    for rows in (1, 8, 32, 256):
        for name, setting in SAMPLERS.items():
            sampler(table, rows, name, setting)


def sampler(table: Table, rows: int, name: str, setting: dict[str, Any]) -> None:
    experts, size = 8, 151936
    weights = torch.softmax(torch.randn(experts), 0).cuda()
    buffers = rotating(lambda: [x.bfloat16().cuda() for x in flat(experts, rows, size)])
    keys = {"seeds": draw_seeds(rows, "cuda"), "positions": torch.zeros(rows, dtype=torch.int64, device="cuda")}
    compiled = torch.compile(eager_sample, dynamic=False)
    variants = {
        impl: lambda impl=impl: mixture_sample(next(buffers), weights, impl=impl, **setting, **keys)
        for impl in backends("mixture_sample")
    }
    variants["eager"] = lambda: eager_sample(next(buffers), weights, **setting)
    variants["compile"] = lambda: compiled(next(buffers), weights, **setting)
    if find_spec("flashinfer") and setting is TOP_K_TOP_P:
        variants["flashinfer, mixed before"] = flashinfer_variant(next(buffers), weights)
    case = {"op": "mixture_sample", "case": name, "dtype": "bfloat16", "T": experts, "B": rows, "V": size}
    table.compare(case | {"bytes": experts * rows * size * 2}, variants)


def flashinfer_variant(logits: list[torch.Tensor], weights: torch.Tensor) -> Callable[[], Any]:
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    mixed = eager_log_probs(logits, weights)
    return lambda: top_k_top_p_sampling_from_logits(mixed, 50, 0.9)


def log_probs(table: Table) -> None:
    """Everything written down: T reads and one write."""
    experts, rows, size = 8, 32, 151936
    weights = torch.softmax(torch.randn(experts), 0).cuda()
    buffers = rotating(lambda: [x.bfloat16().cuda() for x in flat(experts, rows, size)])
    variants = {
        impl: lambda impl=impl: mixture_log_probs(next(buffers), weights, impl=impl)
        for impl in backends("mixture_log_probs")
    }
    compiled = torch.compile(eager_log_probs, dynamic=False)
    variants["eager"] = lambda: eager_log_probs(next(buffers), weights)
    variants["compile"] = lambda: compiled(next(buffers), weights)
    case = {"op": "mixture_log_probs", "case": "prob", "dtype": "bfloat16", "T": experts, "B": rows, "V": size}
    table.compare(case | {"bytes": (experts * 2 + 4) * rows * size}, variants)


def backward_of(loss: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return call


def linear_cross_entropy(table: Table) -> None:
    """Forward and backward with uniform weights."""
    tokens, width, size = 8192, 4096, 128256
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(size, width, device="cuda", dtype=torch.bfloat16) / width**0.5).requires_grad_()
    labels = torch.randint(0, size, (tokens,), device="cuda")
    weights = torch.ones(tokens, device="cuda")

    def eager() -> torch.Tensor:
        return functional.cross_entropy((hidden @ head.T).float(), labels, reduction="sum")

    losses = {
        impl: lambda impl=impl: linear_weighted_cross_entropy(hidden, head, labels, weights, impl=impl)
        for impl in backends("linear_weighted_cross_entropy")
    }
    losses["eager"] = eager
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        losses["liger"] = lambda: liger(head, hidden, labels)
    variants = {name: backward_of(loss, hidden, head) for name, loss in losses.items()}
    case = {"op": "linear_weighted_cross_entropy", "case": "uniform", "dtype": "bfloat16", "T": 1, "B": tokens}
    table.compare(case | {"V": size, "bytes": 3 * size * width * 2}, variants)


def distillation(table: Table) -> None:
    """Forward and backward of `mixture_kl` with five teachers."""
    experts, tokens, size = 5, 4096, 128256
    student = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teachers = [torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16) for _ in range(experts)]
    weights, token_weights = torch.softmax(torch.randn(experts), 0).cuda(), torch.ones(tokens, device="cuda")

    def eager() -> torch.Tensor:
        log_p = eager_log_probs(teachers, weights)
        log_q = student.float().log_softmax(-1)
        return (token_weights * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()

    losses = {
        impl: lambda impl=impl: mixture_kl(student, teachers, weights, token_weights, impl=impl)
        for impl in backends("mixture_kl")
    }
    losses["eager"] = eager
    variants = {name: backward_of(loss, student) for name, loss in losses.items()}
    case = {"op": "mixture_kl", "case": "all", "dtype": "bfloat16", "T": experts, "B": tokens, "V": size}
    table.compare(case | {"bytes": (experts + 2) * tokens * size * 2}, variants)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw time against bytes here")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    table = Table()
    for part in (samplers, log_probs, linear_cross_entropy, distillation):
        part(table)
        torch.cuda.empty_cache()
        if options.csv:
            table.write(options.csv)
    if options.plot:
        table.plot(options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
