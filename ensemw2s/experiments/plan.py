"""What an experiment will take, before it is run: tokens, FLOPs, seconds, memory and disk of every phase.

The work is counted from the questions themselves, batch by batch. The machine is measured for less than a minute: each
model is loaded, trained for a few steps, saved, and answers one batch, at the experiment's own shapes and with the code
that the experiment runs. Time is then the counted FLOPs at the measured rates, and memory the peak that was seen.

Four things cannot be known: which questions share a training batch (an order is drawn), how long pseudo-answers will
be (as long as the true ones, in the estimate), whether boosting stops early (it does not), and which questions a rating
by `data.difficulty.folds` will find easy (any, in the estimate).
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import get_peft_model

from ensemw2s.boosting.config import BoostingConfig
from ensemw2s.data.batches import LengthBucketSampler, PromptCollator, by_length
from ensemw2s.data.difficulty import assign_folds
from ensemw2s.data.tokens import answer_lengths, tokenize_prompts, tokenize_questions
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.experiments.config import ExperimentConfig, ModelConfig
from ensemw2s.experiments.evaluation import MEASURED_SPLITS
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.inference.choices import batches_of_choices, score_choice_mixtures, tokenize_choices
from ensemw2s.inference.decoding import MixtureDecoder, Sampling
from ensemw2s.inference.scoring import score_mixtures
from ensemw2s.models.loading import load_model, load_tokenizer
from ensemw2s.runtime.meter import Meter, ModelFlops, Work, measured, metered, model_flops, peak_memory
from ensemw2s.student.trainer import load_trained
from ensemw2s.training.fine_tune import fine_tune, training_settings
from ensemw2s.training.packing import lines_of, width_of
from ensemw2s.training.trainer import AnswerTrainer, AnswerTrainingArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.table import Table


# Training is timed until either is reached; the first step warms up and is not counted.
_TIMED_STEPS, _TIMED_SECONDS = 100, 6.0
_TIMED_PASSES = 5
_DECODING_STEPS = 4
_SCORING_BATCH = 32
# The report, records and scores: a few figures and a list of bits per arm.
_SMALL_FILES = 1_000_000


@dataclass(frozen=True)
class PhaseEstimate:
    """What one phase will take: tokens read, FLOPs, seconds, peak memory and disk space in bytes."""

    phase: str
    tokens: float
    flops: float
    seconds: float
    peak_memory: int
    disk: int


@dataclass(frozen=True)
class _Task:
    """Some work of one kind, with the FLOPs that it takes."""

    tokens: float = 0.0
    flops: float = 0.0

    @classmethod
    def of(cls, work: Work, flops: ModelFlops, times: float = 1) -> _Task:
        return cls(work.tokens * times, flops.of(work) * times)

    def __add__(self, other: _Task) -> _Task:
        return _Task(self.tokens + other.tokens, self.flops + other.flops)


def plan(config: ExperimentConfig) -> list[PhaseEstimate]:
    """Estimate an experiment, phase by phase; models that are not on this machine yet are fetched or made.

    Args:
        config: the experiment. Nothing is written to its folder.

    Raises:
        ValueError: questions or settings that the experiment itself would refuse.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The data phase is cheap, but for a rating: it is run.
        trial = _Trial(dataclasses.replace(config, name="trial", output_dir=folder))
        with peak_memory() as peak, measured() as spent:
            trial.run(("data",))
        data = PhaseEstimate("data", 0, 0, spent["seconds"], peak[0], _size(trial.folder / "data"))
        return list(_Planner(config, trial).phases(data))


class _Trial(Experiment):
    """Loads and splits the questions of an experiment without training models to rate them."""

    # The questions that would be rated, and their folds; None if none would.
    rated: tuple[Dataset, np.ndarray] | None = None

    def _rated(self, questions: Dataset, folds: int) -> Dataset:
        self.rated = questions, assign_folds(questions, folds, self.config.seed)
        # Any: which questions are easy is not known.
        ranks = np.random.default_rng(self.config.seed).permutation(len(questions)) / len(questions)
        kept = [name for name in questions.column_names if name != "difficulty"]
        return questions.select_columns(kept).add_column("difficulty", ranks)


def plan_table(estimates: Sequence[PhaseEstimate]) -> Table:
    """Return the estimate as a table for a terminal, with a last row for the whole."""
    from rich import box
    from rich.table import Table

    table = Table(title="Estimate", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("Phase", "Tokens", "TFLOP", "Time", "Peak memory, GB", "Disk, MB"):
        table.add_column(header, justify="left" if header == "Phase" else "right")
    names = ("tokens", "flops", "seconds", "disk")
    sums = {name: sum(getattr(estimate, name) for estimate in estimates) for name in names}
    highest = max(estimate.peak_memory for estimate in estimates)
    for row in (*estimates, PhaseEstimate("all", peak_memory=highest, **sums)):
        table.add_row(
            row.phase, f"{row.tokens:,.0f}", f"{row.flops / 1e12:,.3g}", _time(row.seconds),
            f"{row.peak_memory / 1e9:.2f}", f"{row.disk / 1e6:,.1f}",
        )  # fmt: skip
    return table


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# Counting work


def training_work(lengths: Sequence[int], answers: Sequence[int], args: AnswerTrainingArguments, seed: int = 0) -> Work:
    """Return the work of training: all batches of all epochs, the rows in a random order.

    Args:
        lengths: tokens of each example.
        answers: answer tokens of each example.
        args: batch size, accumulation, epochs or steps, and whether batches are of similar length.
        seed: fixes the order, which is not the one that training will draw.
    """
    generator = np.random.default_rng(seed)
    size = args.per_device_train_batch_size * max(1, args.n_gpu)
    per_epoch = math.ceil(len(lengths) / size)
    steps_per_epoch = max(1, math.ceil(per_epoch / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    total = Work()
    for epoch in range(math.ceil(steps / steps_per_epoch)):
        order = _training_order(lengths, size, args, generator)
        left = min(steps - epoch * steps_per_epoch, steps_per_epoch) * args.gradient_accumulation_steps
        for start in range(0, min(left, per_epoch) * size, size):
            batch = order[start : start + size]
            total += _training_pass([int(lengths[i]) for i in batch], sum(int(answers[i]) for i in batch), args)
    return total


def _training_pass(lengths: list[int], head: int, args: AnswerTrainingArguments) -> Work:
    if not args.padding_free or len(set(lengths)) == 1:
        return _padded_pass(lengths, head)
    lines = lines_of(lengths)
    return Work.of_pass(len(lines), width_of(lines, lengths), sum(lengths), head)


def _training_order(
    lengths: Sequence[int], size: int, args: AnswerTrainingArguments, generator: np.random.Generator
) -> list[int]:
    if args.train_sampling_strategy == "group_by_length":
        return list(LengthBucketSampler(lengths, size, int(generator.integers(2**31))))
    return generator.permutation(len(lengths)).tolist()


def scoring_work(lengths: Sequence[int], answers: Sequence[int], batch_size: int) -> Work:
    """Return the work of scoring given answers once, in the batches of `ensemw2s.inference.scoring`."""
    order = by_length(lengths)
    total = Work()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        total += _padded_pass([int(lengths[i]) for i in rows], sum(int(answers[i]) for i in rows))
    return total


def decoding_work(
    prompts: Sequence[int], answers: Sequence[int], batch_size: int, max_new_tokens: int
) -> tuple[Work, Work, int]:
    """Return the work of reading prompts, that of decoding answers of given lengths, and the number of steps.

    Args:
        prompts: tokens of each prompt.
        answers: tokens of each answer, end token included; a batch goes on until its longest one ends.
        batch_size: questions decoded together.
        max_new_tokens: the most tokens of an answer.
    """
    order = by_length(prompts)
    reading, writing, steps = Work(), Work(), 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        count, length = len(batch), prompts[batch[-1]]
        reading += _padded_pass([prompts[i] for i in batch], count)
        more = min(max_new_tokens, max(answers[i] for i in batch)) - 1
        steps += more
        for past in range(length, length + more):
            writing += Work.of_pass(count, 1, count, count, past)
    return reading, writing, steps


def choosing_work(rows: Sequence[Any], batches: Sequence[Sequence[int]]) -> Work:
    """Return the work of answering questions (`choices.tokenize_choices`) by likelihood in given batches."""
    total = Work()
    for batch in batches:
        prompts = [len(rows[i].prompt) for i in batch]
        total += _padded_pass(prompts, len(prompts))
        choices = [choice for i in batch for choice in rows[i].choices]
        longest = max(map(len, choices)) - 1
        if longest:
            size = len(choices) * longest
            total += Work.of_pass(len(choices), longest, size, size, max(prompts))
    return total


def _padded_pass(lengths: Sequence[int], head: int) -> Work:
    return Work.of_pass(len(lengths), max(lengths), sum(lengths), head)


# Measuring the machine


class _TimedTrainer(AnswerTrainer):
    """Stops after a few steps, whose beginnings it notes."""

    def __init__(self, *args: Any, notes: list[tuple[float, float]], meter: Meter, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.notes, self.meter = notes, meter

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Note when the step begins and what was counted before it."""
        self.notes.append((time.perf_counter(), self.meter.flops))
        timed = self.notes[-1][0] - self.notes[0][0]
        if len(self.notes) > _TIMED_STEPS or (len(self.notes) > 3 and timed > _TIMED_SECONDS):
            self.control.should_training_stop = True
        return super().training_step(*args, **kwargs)


@dataclass(frozen=True)
class _Speed:
    """A measured pace: seconds once, and per FLOP; the peak memory seen in bytes."""

    setup: float
    per_flop: float
    memory: int

    def seconds(self, task: _Task) -> float:
        return self.setup + self.per_flop * task.flops


@dataclass(frozen=True)
class _Side:
    """One of the two pre-trained models as it was measured.

    Attributes:
        load: seconds to load it.
        load_trained: seconds to load what was trained.
        save: seconds to save that.
        size: bytes of that on the disk.
        tokenizer_size: bytes of the tokenizer among them.
        training: pace of training.
        trains: FLOPs of training.
        infers: FLOPs of the trained model's answers.
        infers_plain: the same of the model before training.
    """

    load: float
    load_trained: float
    save: float
    size: int
    tokenizer_size: int
    training: _Speed
    trains: ModelFlops
    infers: ModelFlops
    infers_plain: ModelFlops


class _Planner:
    """Measures this machine with one experiment's models and questions."""

    def __init__(self, config: ExperimentConfig, trial: _Trial) -> None:
        self.config, self.trial = config, trial
        self.format = config.data.format
        self.with_choices = "choices" in trial.files.questions("unlabelled").column_names
        with measured() as loading:
            self.weak_tokenizer = load_tokenizer(config.weak.source)
        # A large vocabulary takes a second to load, and every arm loads it.
        self.load_tokenizer = loading["seconds"]
        self.strong_tokenizer = load_tokenizer(config.strong.source)
        self.weak = self._measure(config.weak, "train", config.ensemble_config("single_expert", trial.folder))
        self.strong = self._measure(config.strong, "unlabelled", config.student_config(trial.folder / "students"))

    def phases(self, data: PhaseEstimate) -> Iterator[PhaseEstimate]:
        """Yield the estimates of all phases; `data` is what that phase took here, without a rating."""
        rounds = self._args("ensemble").num_rounds
        plain = self._scoring(self.config.weak, 1, self.weak)
        strong = self._scoring(self.config.strong, 1, self.strong)
        mixed = self._scoring(self.config.weak, rounds, self.weak)
        yield self._data(data, plain)
        yield self._boost(plain, mixed)
        yield self._label()
        yield self._student()
        yield self._evaluate(plain, strong, mixed)

    # Phases

    def _data(self, data: PhaseEstimate, plain: _Speed) -> PhaseEstimate:
        """Return what the data phase took here, with an estimate of the rating if there is to be one."""
        if self.trial.rated is None:
            return data
        questions, fold = self.trial.rated
        weak, args = self.weak, self._args("single_expert")
        examples = tokenize_questions(questions, self.weak_tokenizer, self.format)
        lengths, answers = np.array([len(ids) for ids in examples["input_ids"]]), answer_lengths(examples)
        task, seconds = _Task(), data.seconds + self.load_tokenizer
        for number in range(fold.max() + 1):
            others, asked = fold != number, fold == number
            training = _Task.of(training_work(lengths[others], answers[others], args), weak.trains)
            scoring = scoring_work(lengths[asked], answers[asked], args.per_device_eval_batch_size)
            score = _Task.of(scoring, weak.infers)
            task = task + training + score
            seconds += weak.load + weak.training.seconds(training) + plain.seconds(score)
        memory = max(data.peak_memory, weak.training.memory, plain.memory)
        return dataclasses.replace(data, tokens=task.tokens, flops=task.flops, seconds=seconds, peak_memory=memory)

    def _boost(self, plain: _Speed, mixed: _Speed) -> PhaseEstimate:
        weak = self.weak
        arms = [self._rounds(arm, plain, mixed) for arm in self.config.expert_arms()]
        task, seconds = sum((task for task, _ in arms), _Task()), sum(seconds for _, seconds in arms)
        experts = sum(self._args(arm).num_rounds for arm in self.config.expert_arms())
        memory = max(weak.training.memory, plain.memory, mixed.memory)
        expert_size = weak.size - weak.tokenizer_size
        units = 9 * int(np.sum(self._lengths("train", self.config.weak)[1])) * (experts + 1)
        disk = 2 * experts * expert_size + len(arms) * weak.tokenizer_size + units
        return PhaseEstimate("boost", task.tokens, task.flops, seconds, memory, disk)

    def _rounds(self, arm: str, plain: _Speed, mixed: _Speed) -> tuple[_Task, float]:
        """Return what the rounds of one arm take."""
        weak, args = self.weak, self._args(arm)
        lengths, answers = self._lengths("train", self.config.weak)
        expert = _Task.of(training_work(lengths, answers, args), weak.trains)
        errors = scoring_work(lengths, answers, args.per_device_eval_batch_size)
        checks = scoring_work(*self._lengths("validation", self.config.weak), args.per_device_eval_batch_size)
        score, validate = _Task.of(errors, weak.infers), _Task.of(checks, weak.infers)
        task, seconds = _Task(), self.load_tokenizer
        if args.prior == "pretrained" and arm == "ensemble" and not args.is_baseline:
            before = _Task.of(errors, weak.infers_plain)
            task, seconds = task + before, seconds + weak.load + plain.seconds(before)
        # Those that judge out of fold see all answers but a fold's each, and score that fold.
        models = 1 if args.error_folds is None else args.error_folds
        for number in range(1, args.num_rounds + 1):
            if not (number == 1 and self._is_single_expert(arm)):
                seconds += weak.load + models * (weak.training.seconds(expert) + weak.save)
                seconds += weak.load_trained + plain.seconds(score)
                task = task + score
                task = task + _Task(models * expert.tokens, models * expert.flops)
            if arm == "ensemble" and args.validate_rounds:
                valid = _Task(validate.tokens * number, validate.flops * number)
                seconds += self._load_experts(number) + mixed.seconds(valid)
                task = task + valid
        return task, seconds + self._load_experts(args.num_rounds) + args.num_rounds * weak.save

    def _args(self, arm: str) -> BoostingConfig:
        args = self.config.ensemble_config(arm, self.trial.folder)
        if arm == "equal_cost":
            args.num_train_epochs *= self._args("ensemble").num_rounds
        return args

    def _is_single_expert(self, arm: str) -> bool:
        """Say whether an arm's first expert is the single expert, which is trained before and kept."""
        args, single = self._args(arm), self._args("single_expert")
        alike = training_settings(args) == training_settings(single)
        return arm not in ("single_expert", "equal_cost") and args.sampling in ("reweight", "all") and alike

    def _label(self) -> PhaseEstimate:
        task, seconds, memory = _Task(), 0.0, 0
        for count in (self._args(teacher).num_rounds for teacher in self.config.teachers()):
            with peak_memory() as peak:
                made, taken = self._choose(count) if self.with_choices else self._decode(count)
            task, seconds, memory = task + made, seconds + taken, max(memory, peak[0])
        disk = 2 * _size(self.trial.folder / "data" / "unlabelled.jsonl")
        return PhaseEstimate("label", task.tokens, task.flops, seconds, memory, disk)

    def _student(self) -> PhaseEstimate:
        strong = self.strong
        args = self.config.student_config(self.trial.folder / "students")
        work = training_work(*self._lengths("unlabelled", self.config.strong), args)
        task = _Task.of(work, strong.trains)
        times = len(self.config.students)
        seconds = times * (self.load_tokenizer + strong.load + strong.training.seconds(task) + strong.save)
        return PhaseEstimate(
            "student", times * task.tokens, times * task.flops, seconds, strong.training.memory, times * strong.size
        )

    def _evaluate(self, plain: _Speed, strong: _Speed, mixed: _Speed) -> PhaseEstimate:
        arms = self.config.expert_arms()
        # Experts that arms share are scored once; choices once more for every way to combine distributions, of which
        # the majority vote is one.
        experts = sum(self._args(arm).num_rounds - self._is_single_expert(arm) for arm in arms)
        ways = len({"prob", "vote", *(self._args(arm).combine for arm in arms)})
        # Every arm turns the test questions into tokens, as this does.
        with measured() as preparing:
            weak = self._test_work(self.config.weak)
        mixtures = self._test_work(self.config.weak, ways)
        other = self._test_work(self.config.strong)
        parts = [
            (_Task.of(weak, self.weak.infers_plain), plain, self.weak.load),
            (_Task.of(mixtures, self.weak.infers, experts), mixed, self._load_experts(experts)),
            (_Task.of(other, self.strong.infers_plain), strong, self.strong.load),
            *[(_Task.of(other, self.strong.infers), strong, self.strong.load_trained)] * len(self.config.students),
        ]
        task = sum((part for part, _, _ in parts), _Task())
        prepare = self.load_tokenizer + preparing["seconds"]
        seconds = sum(speed.seconds(part) + load + prepare for part, speed, load in parts)
        memory = max(speed.memory for _, speed, _ in parts)
        return PhaseEstimate("evaluate", task.tokens, task.flops, seconds, memory, _SMALL_FILES)

    # Work of this experiment

    def _lengths(self, split: str, model: ModelConfig) -> tuple[list[int], list[int]]:
        examples = self._examples(split, model)
        return [len(ids) for ids in examples["input_ids"]], answer_lengths(examples).tolist()

    def _examples(self, split: str, model: ModelConfig) -> Dataset:
        return self.trial.files.examples(split, model)

    def _tokenizer(self, model: ModelConfig) -> Any:
        return self.weak_tokenizer if model is self.config.weak else self.strong_tokenizer

    def _test_work(self, model: ModelConfig, ways: int = 1) -> Work:
        """Return the work of one model on all test questions, choices being scored in several ways."""
        total = Work()
        for split in MEASURED_SPLITS.values():
            total += scoring_work(*self._lengths(split, model), _SCORING_BATCH)
            if self.with_choices:
                rows = tokenize_choices(self.trial.files.questions(split), self._tokenizer(model), self.format)
                total += choosing_work(rows, list(batches_of_choices(rows, _SCORING_BATCH))) * ways
        return total

    # Measurements

    def _load_experts(self, count: int) -> float:
        """Return the seconds to load some experts: adapters share a base, whole models do not."""
        weak = self.weak
        if self.config.lora is None:
            return count * weak.load_trained
        return weak.load + count * max(0.0, weak.load_trained - weak.load)

    def _measure(self, model: ModelConfig, split: str, args: Any) -> _Side:
        tokenizer = self._tokenizer(model)
        # Warm: the file is in memory, and what takes a run a second only once is behind us.
        fresh: Any = load_model(model.source, **model.init_kwargs)
        peft_config = self.config.peft_config()
        fresh = fresh if peft_config is None else get_peft_model(fresh, peft_config)
        trains = model_flops(fresh.train(), training=True)
        del fresh
        with measured() as loading:
            pretrained = load_model(model.source, **model.init_kwargs)
        infers_plain = model_flops(pretrained)
        folder = self._folder(model)
        with peak_memory() as peak:
            trained, training = self._train(pretrained, self._examples(split, model), args, tokenizer)
        with measured() as saving:
            trained.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        tokenizer.save_pretrained(folder / "tokenizer")
        tokenizer_size = _size(folder / "tokenizer")
        infers = model_flops(trained)
        del trained, pretrained
        gc.collect()
        with measured() as loading_trained:
            load_trained(folder, model.source, **model.init_kwargs)
        return _Side(
            loading["seconds"], loading_trained["seconds"], saving["seconds"], _size(folder) - tokenizer_size,
            tokenizer_size, dataclasses.replace(training, memory=peak[0]), trains, infers, infers_plain,
        )  # fmt: skip

    def _train(self, model: Any, examples: Dataset, args: Any, tokenizer: Any) -> tuple[Any, _Speed]:
        notes: list[tuple[float, float]] = []
        args = copy.copy(args)
        # Enough for a pace, however short the training itself is.
        args.max_steps = _TIMED_STEPS + 1
        start = time.perf_counter()
        with metered() as meter:
            trained, _ = fine_tune(
                model, examples, args, pad_token_id=tokenizer.eos_token_id, seed=self.config.seed,
                description="timing", peft_config=self.config.peft_config(), trainer_class=_TimedTrainer,
                notes=notes, meter=meter,
            )  # fmt: skip
        total = time.perf_counter() - start
        times, flops = np.diff([when for when, _ in notes]), np.diff([done for _, done in notes])
        # The first step warms up, unless there is no other.
        kept = slice(1, None) if len(times) > 1 else slice(None)
        per_flop = float(np.median(times[kept] / flops[kept])) if len(times) else total / meter.flops
        return trained, _Speed(max(0.0, total - per_flop * meter.flops), per_flop, 0)

    def _ensemble(self, model: ModelConfig, count: int) -> TokenEnsemble:
        """Return `count` copies of what was trained: their answers do not matter, what they cost does."""
        folder = self._folder(model)
        if self.config.lora is None:
            models = [load_trained(folder) for _ in range(count)]
            return self.trial.files.placed(TokenEnsemble.from_models(models, [1.0] * count))
        base = self.trial.files.placed(load_model(model.source, **model.init_kwargs))
        return TokenEnsemble.from_adapters(base, [folder] * count, [1.0] * count)

    def _scoring(self, model: ModelConfig, count: int, side: _Side) -> _Speed:
        """Time one batch of given answers, the longest ones of a test set, under all mixtures of `count` experts."""
        tokenizer = self._tokenizer(model)
        with peak_memory() as peak:
            ensemble = self._ensemble(model, count)
            mixtures = {"all": [1.0] * count}
            if count > 1:
                mixtures |= {f"expert {t}": np.eye(count)[t].tolist() for t in range(count)} | {"same": [1.0] * count}
            examples = self._examples("test_ood", model)
            order = by_length([len(ids) for ids in examples["input_ids"]])
            score_mixtures(ensemble, examples.select(order[:2]), mixtures, pad_token_id=tokenizer.eos_token_id)
            longest = examples.select(order[-_SCORING_BATCH:])
            paces: list[float] = []
            start = time.perf_counter()
            while len(paces) < _TIMED_PASSES and time.perf_counter() - start < _TIMED_SECONDS:
                with measured() as spent:
                    score_mixtures(ensemble, longest, mixtures, pad_token_id=tokenizer.eos_token_id)
                paces.append(spent["seconds"] / spent["flops"])
        return _Speed(0.0, float(np.median(paces)), peak[0])

    def _decode(self, count: int) -> tuple[_Task, float]:
        """Time one batch of prompts and a few tokens of their answers; return all labelling's work and seconds."""
        settings = self.config.labelling
        with measured() as preparing:
            tokenizer = self.weak_tokenizer
            ids = tokenize_prompts(self.trial.files.questions("unlabelled"), tokenizer, self.format)["input_ids"]
        prompts = [len(prompt) for prompt in ids]
        _, answers = self._lengths("unlabelled", self.config.weak)
        reading, writing, steps = decoding_work(prompts, answers, settings.batch_size, settings.max_new_tokens)
        batch = by_length(prompts)[-settings.batch_size :]
        ensemble = self._ensemble(self.config.weak, count)
        inputs = PromptCollator(tokenizer.eos_token_id)([{"input_ids": ids[i]} for i in batch])
        decoder = MixtureDecoder(
            ensemble, inputs["input_ids"].to(ensemble.device), inputs["attention_mask"].to(ensemble.device),
            torch.zeros(len(batch), dtype=torch.int64, device=ensemble.device), Sampling(),
        )  # fmt: skip
        with torch.no_grad(), measured() as read:
            decoder.append(decoder.step().tokens)
        times = []
        for _ in range(_DECODING_STEPS):
            with torch.no_grad(), measured() as written:
                decoder.append(decoder.step().tokens)
            times.append(written["seconds"])
        seconds = (
            self.load_tokenizer + preparing["seconds"] + self._load_experts(count) + steps * float(np.median(times))
        )
        read_all = _Task.of(reading, self.weak.infers, count)
        seconds += read["seconds"] / read["flops"] * read_all.flops
        return read_all + _Task.of(writing, self.weak.infers, count), seconds

    def _choose(self, count: int) -> tuple[_Task, float]:
        """Time one batch of choices; return all labelling's work and seconds."""
        size = self.config.labelling.batch_size
        with measured() as preparing:
            tokenizer = self.weak_tokenizer
            questions = self.trial.files.questions("unlabelled")
            rows = tokenize_choices(questions, tokenizer, self.format)
        order = by_length([len(row.prompt) for row in rows])
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        task = _Task.of(choosing_work(rows, batches), self.weak.infers, count)
        ensemble = self._ensemble(self.config.weak, count)
        batch = questions.select(batches[-1])
        with measured() as spent:
            score_choice_mixtures(
                ensemble, batch, tokenizer, {"all": [1.0] * count}, question_format=self.format, batch_size=10**9
            )
        answering = spent["seconds"] / spent["flops"] * task.flops
        return task, self.load_tokenizer + preparing["seconds"] + self._load_experts(count) + answering

    def _folder(self, model: ModelConfig) -> Path:
        return self.trial.folder / "measured" / ("weak" if model is self.config.weak else "strong")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
