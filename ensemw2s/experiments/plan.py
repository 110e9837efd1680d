"""What an experiment will take, before it is run: tokens, FLOPs, seconds, memory and disk of every phase.

The work is counted from the questions themselves, batch by batch. The machine is measured for less than a minute: each
model is loaded, trained for a few steps, saved, and answers one batch, at the experiment's own shapes and with the code
that the experiment runs. Time is then the counted FLOPs at the measured rates, and memory the peak that was seen.

Five things cannot be known: which questions share a batch when an expert is trained (each draws its own order), how
long pseudo-answers will be (as long as the true ones, in the estimate), whether boosting stops early (it does not),
which questions a rating by `data.difficulty.folds` will find easy (any, in the estimate), and on which answers
out-of-fold students will agree (all, in the estimate). Beyond the single expert, what co-boosted arms share with others
is counted for each.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemw2s.boosting.config import BoostingConfig
from ensemw2s.data.batches import batches_by_length, by_length
from ensemw2s.data.difficulty import assign_folds
from ensemw2s.data.shapes import with_column
from ensemw2s.data.tokens import tokenize_prompts, tokenize_questions
from ensemw2s.experiments.config import ExperimentConfig, LabellingConfig
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.machine import SCORING_BATCH, Machine, Pace, PhaseEstimate, Side, lengths_of, size_of, waiting
from ensemw2s.experiments.questions import MEASURED_SPLITS
from ensemw2s.inference.choices import batches_of_choices, choosing_work, tokenize_choices
from ensemw2s.inference.labelling import decoding_work
from ensemw2s.inference.scoring import scoring_work
from ensemw2s.models.loading import load_tokenizer
from ensemw2s.runtime.meter import Work, measured, peak_memory
from ensemw2s.student.trainer import StudentConfig
from ensemw2s.training.fine_tune import training_settings, training_work

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.table import Table

# The report, records and scores: a few figures and a list of bits per arm.
_SMALL_FILES = 1_000_000


def plan(config: ExperimentConfig) -> list[PhaseEstimate]:
    """Estimate an experiment, phase by phase; models that are not on this machine yet are fetched or made.

    Nothing is written to its folder. Questions or settings that it would refuse itself raise ValueError here, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The data phase is cheap, but for a rating: it is run.
        trial = _Trial(dataclasses.replace(config, name="trial", output_dir=folder))
        with peak_memory() as peak, measured() as spent:
            trial.run(("data",))
        data = PhaseEstimate("data", 0, 0, spent["seconds"], peak[0], size_of(trial.folder / "data"))
        return list(_Planner(trial).phases(data))


class _Trial(Experiment):
    """Loads and splits the questions of an experiment without training models to rate them."""

    # The questions that would be rated, and their folds; None if none would.
    rated: tuple[Dataset, np.ndarray] | None = None

    def _rated(self, questions: Dataset, folds: int) -> Dataset:
        self.rated = questions, assign_folds(questions, folds, self.config.seed)
        # Any: which questions are easy is not known.
        ranks = np.random.default_rng(self.config.seed).permutation(len(questions)) / len(questions)
        kept = [name for name in questions.column_names if name != "difficulty"]
        return with_column(questions.select_columns(kept), "difficulty", ranks)


def plan_table(estimates: Sequence[PhaseEstimate]) -> Table:
    """Return the estimate as a table for a terminal, with a last row for the whole."""
    from rich import box
    from rich.table import Table

    table = Table(title="Estimate", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("Phase", "Tokens", "TFLOP", "Time", "Peak memory, GB", "Disk, MB"):
        table.add_column(header, justify="left" if header == "Phase" else "right")
    for row in (*estimates, sum(estimates, PhaseEstimate("all"))):
        table.add_row(
            row.phase, f"{row.tokens:,.0f}", f"{row.flops / 1e12:,.3g}", _time(row.seconds),
            f"{row.peak_memory / 1e9:.2f}", f"{row.disk / 1e6:,.1f}",
        )  # fmt: skip
    return table


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class _Planner:
    """Counts the work of one experiment, and has its machine measured."""

    def __init__(self, trial: _Trial) -> None:
        self.trial, self.config, self.files = trial, trial.config, trial.files
        self.machine = Machine(self.files)
        self.with_choices = "choices" in self.files.questions("unlabelled").column_names
        weak, strong = self.config.weak, self.config.strong
        # A large vocabulary takes a second to load.
        with measured() as loading:
            load_tokenizer(weak.source)
        with measured() as tokenizing:
            for split in MEASURED_SPLITS.values():
                self.files.examples(split, weak)
        self.load_tokenizer, self.tokenize = loading["seconds"], tokenizing["seconds"]
        self.weak = self.machine.side(weak, "weak", "train", self._args("single_expert"))
        self.strong = self.machine.side(strong, "strong", "unlabelled", self.config.student_config(trial.folder))

    def phases(self, data: PhaseEstimate) -> Iterator[PhaseEstimate]:
        """Yield the estimates of all phases; `data` is what that phase took here, without a rating."""
        plain, strong = self.machine.scoring(self.weak, 1), self.machine.scoring(self.strong, 1)
        mixed = self.machine.scoring(self.weak, self._args("ensemble").num_rounds)
        yield self._data(data, plain)
        yield self._boost(plain, mixed)
        yield self._label()
        yield self._student()
        yield self._evaluate(plain, strong, mixed)

    def _data(self, data: PhaseEstimate, plain: Pace) -> PhaseEstimate:
        """Return what the data phase took here, with an estimate of the rating if there is to be one."""
        if self.trial.rated is None:
            return data
        questions, fold = self.trial.rated
        weak, args = self.weak, self._args("single_expert")
        examples = tokenize_questions(questions, self.files.tokenizer(weak.model), self.config.data.format)
        lengths, answers = (np.array(values) for values in lengths_of(examples))
        for number in range(fold.max() + 1):
            others, asked = fold != number, fold == number
            data += weak.training.of(training_work(lengths[others], answers[others], args), weak.trains)
            scoring = scoring_work(lengths[asked], answers[asked], args.per_device_eval_batch_size)
            data += plain.of(scoring, weak.infers) + waiting(weak.load)
        return data + waiting(self.load_tokenizer)

    def _boost(self, plain: Pace, mixed: Pace) -> PhaseEstimate:
        weak, arms = self.weak, self.config.expert_arms()
        experts = sum(self._num_experts(arm) for arm in arms)
        units = 9 * sum(self._lengths("train", weak)[1]) * (experts + 1)
        disk = 2 * experts * (weak.size - weak.tokenizer_size) + len(arms) * weak.tokenizer_size + units
        total = PhaseEstimate("boost", seconds=self.load_tokenizer, peak_memory=mixed.memory, disk=disk)
        total = sum((self._rounds(arm, plain, mixed) for arm in arms), total)
        co_boosted = [arm for arm in arms if self._args(arm).recipe == "co_boosted"]
        return sum((self._generation(arm, plain) * self._args(arm).generations for arm in co_boosted), total)

    def _num_experts(self, arm: str) -> int:
        """Return how many experts an arm trains, those of all generations together."""
        args = self._args(arm)
        return args.num_rounds * (1 + args.generations * (args.recipe == "co_boosted"))

    def _generation(self, arm: str, plain: Pace) -> PhaseEstimate:
        """Return what a generation of experts takes that follows another: their answers, the judges, and training."""
        weak, args, judges = self.weak, self._args(arm), self.config.judge_config(self.trial.folder)
        total = self._answer(weak, args.num_rounds, self.config.labelling)
        total += self._relabelled(judges, *self._lengths("unlabelled", self.strong))
        (easy, easy_answers), (hard, hard_answers) = (self._lengths(name, weak) for name in ("train", "unlabelled"))
        lengths, answers = easy + hard, easy_answers + hard_answers
        args.num_train_epochs = args.num_train_epochs * len(easy) / len(lengths)
        expert = weak.training.of(training_work(lengths, answers, args), weak.trains) + waiting(weak.save + weak.load)
        errors = scoring_work(lengths, answers, args.per_device_eval_batch_size)
        # Each expert by itself, and before it and behind it the mixture so far.
        members = args.num_rounds
        if args.generation_weights == "boosted":
            members += sum(args.num_rounds + number for number in range(args.num_rounds + 1))
            total += plain.of(errors, weak.infers_plain)
        return total + expert * args.num_rounds + plain.of(errors * members, weak.infers)

    @functools.cached_property
    def _equal_cost(self) -> float:
        """Return how many times as much as one expert the experts of `ensemble` take, with all that they need."""
        args = self._args("ensemble")
        if args.recipe != "co_boosted":
            return args.num_rounds
        strong, judges = self.strong, self.config.judge_config(self.trial.folder)
        one = self.weak.trains.of(training_work(*self._lengths("train", self.weak), args))
        judging = self._answer(self.weak, args.num_rounds, self.config.labelling).flops
        judging += self._relabelled(judges, *self._lengths("unlabelled", strong)).flops
        return self._num_experts("ensemble") + args.generations * judging / one

    def _rounds(self, arm: str, plain: Pace, mixed: Pace) -> PhaseEstimate:
        """Return what the rounds of one arm take."""
        weak, args = self.weak, self._args(arm)
        errors = scoring_work(*self._lengths("train", weak), args.per_device_eval_batch_size)
        checks = scoring_work(*self._lengths("validation", weak), args.per_device_eval_batch_size)
        expert = weak.training.of(training_work(*self._lengths("train", weak), args), weak.trains)
        # Those that judge out of fold see all answers but a fold's each, and score that fold.
        made = (expert + waiting(weak.save)) * (1 if args.error_folds is None else args.error_folds)
        made += waiting(weak.load + weak.load_trained) + plain.of(errors, weak.infers)
        total = made * (args.num_rounds - self._is_single_expert(arm))
        if args.prior == "pretrained" and arm == "ensemble" and not args.is_baseline:
            total += plain.of(errors, weak.infers_plain) + waiting(weak.load)
        if arm == "ensemble" and args.validate_rounds:
            rows = self._choices("validation", weak) if self.with_choices else []
            batches = list(batches_of_choices(rows, args.per_device_eval_batch_size))
            for number in range(1, args.num_rounds + 1):
                work = (checks + choosing_work(rows, batches, number)) * number
                total += mixed.of(work, weak.infers) + waiting(self._load_experts(number))
        return total + waiting(self._load_experts(args.num_rounds) + args.num_rounds * weak.save)

    def _args(self, arm: str) -> BoostingConfig:
        args = self.config.ensemble_config(arm, self.trial.folder)
        if arm == "equal_cost":
            args.num_train_epochs *= self._equal_cost
        return args

    def _is_single_expert(self, arm: str) -> bool:
        """Say whether an arm's first expert is the single expert, which is trained before and kept."""
        args, single = self._args(arm), self._args("single_expert")
        alike = training_settings(args) == training_settings(single)
        return arm not in ("single_expert", "equal_cost") and args.sampling in ("reweight", "all") and alike

    def _label(self) -> PhaseEstimate:
        disk = 2 * size_of(self.files.data_file("unlabelled"))
        total = PhaseEstimate("label", seconds=self.load_tokenizer, disk=disk)
        for count in (self._args(teacher).num_rounds for teacher in self.config.teachers()):
            with peak_memory() as peak:
                part = self._answer(self.weak, count, self.config.labelling)
            total += dataclasses.replace(part, peak_memory=peak[0]) + waiting(self._load_experts(count))
        return total

    def _student(self) -> PhaseEstimate:
        total = PhaseEstimate("student", seconds=self.load_tokenizer)
        return sum((self._one_student(arm) for arm in self.config.students), total)

    def _one_student(self, arm: str) -> PhaseEstimate:
        """Return what a student takes; the students of folds that judge for it see as many answers each."""
        strong, args = self.strong, self.config.student_arm_config(arm, self.trial.folder)
        lengths, answers = self._lengths("unlabelled", strong)
        plain = len(lengths)
        if self.config.learns_easy_answers(arm):
            easy = self._lengths("train", strong)
            lengths, answers = lengths + easy[0], answers + easy[1]
        args.num_train_epochs = args.num_train_epochs * plain / len(lengths)
        total = strong.training.of(training_work(lengths, answers, args), strong.trains)
        total += PhaseEstimate(seconds=strong.load + strong.save, disk=strong.size)
        return total + (self._relabelled(args, lengths, answers) if args.relabel is not None else PhaseEstimate())

    def _relabelled(self, args: StudentConfig, lengths: list[int], answers: list[int]) -> PhaseEstimate:
        """Return what the students of folds take, and their answers."""
        strong = self.strong
        work = strong.training.of(training_work(lengths, answers, args), strong.trains)
        one = work + PhaseEstimate(seconds=strong.save + strong.load_trained, disk=strong.size - strong.tokenizer_size)
        longest = LabellingConfig(2 * max(self._lengths("unlabelled", strong)[1]), args.per_device_eval_batch_size)
        # A student of each fold answers its share.
        answering = self._answer(strong, 1, longest)
        return (one * args.relabel_folds + answering) * args.relabel_rounds

    def _evaluate(self, plain: Pace, strong: Pace, mixed: Pace) -> PhaseEstimate:
        arms = self.config.expert_arms()
        # Experts that arms share are scored once; choices once more for every way to combine distributions, of which
        # the majority vote is one.
        experts = sum(self._args(arm).num_rounds - self._is_single_expert(arm) for arm in arms)
        ways = len({"prob", "vote", *(self._args(arm).combine for arm in arms)})
        # Every arm turns choices into tokens, as this does.
        with measured() as choosing:
            weak = self._test_work(self.weak)
        other = self._test_work(self.strong)
        parts = [
            plain.of(weak, self.weak.infers_plain) + waiting(self.weak.load),
            mixed.of(self._test_work(self.weak, experts, ways) * experts, self.weak.infers)
            + waiting(self._load_experts(experts)),
            strong.of(other, self.strong.infers_plain) + waiting(self.strong.load),
            (strong.of(other, self.strong.infers) + waiting(self.strong.load_trained)) * len(self.config.students),
        ]
        prepare = 2 * (self.load_tokenizer + self.tokenize) + (3 + len(self.config.students)) * choosing["seconds"]
        return sum(parts, PhaseEstimate("evaluate", seconds=prepare, disk=_SMALL_FILES))

    def _lengths(self, split: str, side: Side) -> tuple[list[int], list[int]]:
        return lengths_of(self.files.examples(split, side.model))

    def _test_work(self, side: Side, count: int = 1, ways: int = 1) -> Work:
        """Return the work of one of `count` models on all test questions, choices being scored in several ways."""
        total = Work()
        for split in MEASURED_SPLITS.values():
            total += scoring_work(*self._lengths(split, side), SCORING_BATCH)
            if self.with_choices:
                rows = self._choices(split, side)
                total += choosing_work(rows, batches_of_choices(rows, SCORING_BATCH), count) * ways
        return total

    def _choices(self, split: str, side: Side) -> list[Any]:
        questions, tokenizer = self.files.questions(split), self.files.tokenizer(side.model)
        return tokenize_choices(questions, tokenizer, self.config.data.format)

    def _load_experts(self, count: int) -> float:
        """Return the seconds to load some experts: adapters share a base, whole models do not."""
        weak = self.weak
        if self.config.lora is None:
            return count * weak.load_trained
        return weak.load + count * max(0.0, weak.load_trained - weak.load)

    def _answer(self, side: Side, count: int, settings: LabellingConfig) -> PhaseEstimate:
        """Return what it takes `count` models of a side to answer the unlabelled questions together."""
        return (self._choose if self.with_choices else self._decode)(side, count, settings)

    def _decode(self, side: Side, count: int, settings: LabellingConfig) -> PhaseEstimate:
        tokenizer = self.files.tokenizer(side.model)
        with measured() as preparing:
            questions = self.files.questions("unlabelled")
            ids = tokenize_prompts(questions, tokenizer, self.config.data.format)["input_ids"]
        prompts, (_, answers) = [len(prompt) for prompt in ids], self._lengths("unlabelled", side)
        reading, writing, steps = decoding_work(prompts, answers, settings.batch_size, settings.max_new_tokens, count)
        batch = by_length(prompts)[-settings.batch_size :]
        pace, step = self.machine.decoding(side, count, [ids[i] for i in batch])
        written = Pace(steps * step, 0.0, 0).of(writing * count, side.infers)
        return pace.of(reading * count, side.infers) + written + waiting(preparing["seconds"])

    def _choose(self, side: Side, count: int, settings: LabellingConfig) -> PhaseEstimate:
        with measured() as preparing:
            rows = self._choices("unlabelled", side)
        batches = batches_by_length([len(row.prompt) for row in rows], settings.batch_size)
        pace = self.machine.choosing(side, count, self.files.questions("unlabelled").select(batches[-1]))
        return pace.of(choosing_work(rows, batches, count) * count, side.infers) + waiting(preparing["seconds"])
