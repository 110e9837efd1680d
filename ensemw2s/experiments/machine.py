"""What an experiment's models take on this machine, measured at its own shapes with the code that it runs."""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ensemw2s.data.batches import by_length, pad_prompts
from ensemw2s.data.tokens import answer_lengths
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.experiments.config import ModelConfig
from ensemw2s.experiments.folder import RunFolder
from ensemw2s.inference.choices import ChoiceSettings, score_choice_mixtures
from ensemw2s.inference.decoding import MixtureDecoder, Sampling
from ensemw2s.inference.scoring import score_mixtures
from ensemw2s.models.loading import load_model
from ensemw2s.runtime.meter import Meter, ModelFlops, Work, measured, metered, model_flops, peak_memory
from ensemw2s.student.trainer import load_trained
from ensemw2s.training.fine_tune import fine_tune
from ensemw2s.training.trainer import AnswerTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

# Training is timed until either is reached; the first step warms up and is not counted.
_TIMED_STEPS, _TIMED_SECONDS = 100, 6.0
_TIMED_PASSES = 5
_DECODING_STEPS = 4
SCORING_BATCH = 32


@dataclass(frozen=True)
class PhaseEstimate:
    """What a phase or a part of one will take: tokens read, FLOPs, seconds, peak memory and disk space in bytes."""

    phase: str = ""
    tokens: float = 0
    flops: float = 0
    seconds: float = 0
    peak_memory: int = 0
    disk: int = 0

    def __add__(self, other: PhaseEstimate) -> PhaseEstimate:
        return PhaseEstimate(
            self.phase, self.tokens + other.tokens, self.flops + other.flops, self.seconds + other.seconds,
            max(self.peak_memory, other.peak_memory), self.disk + other.disk,
        )  # fmt: skip

    def __mul__(self, times: int) -> PhaseEstimate:
        return dataclasses.replace(
            self, tokens=self.tokens * times, flops=self.flops * times, seconds=self.seconds * times,
            disk=self.disk * times,
        )  # fmt: skip


def waiting(seconds: float) -> PhaseEstimate:
    """Return what takes time alone."""
    return PhaseEstimate(seconds=seconds)


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
class Pace:
    """A measured pace: seconds once, and per FLOP; the peak memory seen in bytes."""

    setup: float
    per_flop: float
    memory: int

    def of(self, work: Work, flops: ModelFlops) -> PhaseEstimate:
        """Return what some work of a model of these FLOPs takes."""
        total = flops.of(work)
        return PhaseEstimate("", work.tokens, total, self.setup + self.per_flop * total, self.memory)


@dataclass(frozen=True)
class Side:
    """One of the two pre-trained models as it was measured; `folder` is where what was trained is saved."""

    model: ModelConfig
    folder: Path
    # Seconds to load the model, to load what was trained, and to save that.
    load: float
    load_trained: float
    save: float
    # Bytes on the disk: of what was trained, and of the tokenizer beside it.
    size: int
    tokenizer_size: int
    training: Pace
    # FLOPs: of training, of the trained model's answers, and of those of the model before training.
    trains: ModelFlops
    infers: ModelFlops
    infers_plain: ModelFlops


class Machine:
    """Measures this machine with the questions of a run, in whose folder what is trained here is saved."""

    def __init__(self, files: RunFolder) -> None:
        self.files = files

    def side(self, model: ModelConfig, name: str, split: str, args: TrainingArguments) -> Side:
        """Load a model, train it for a few steps on a split, save it as `name`, and load that."""
        tokenizer, folder = self.files.tokenizer(model), self.files.path / "measured" / name
        # Then the file is in memory, and what takes a run a second only once is behind us.
        load_model(model.source, **model.init_kwargs)
        with measured() as loading:
            pretrained = load_model(model.source, **model.init_kwargs)
        infers_plain = model_flops(pretrained)
        with peak_memory() as peak:
            trained, training = self._train(pretrained, self.files.examples(split, model), args, tokenizer)
        with measured() as saving:
            trained.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        tokenizer.save_pretrained(folder / "tokenizer")
        tokenizer_size = size_of(folder / "tokenizer")
        trains, infers = model_flops(trained, training=True), model_flops(trained)
        del trained, pretrained
        gc.collect()
        with measured() as loading_trained:
            load_trained(folder, model.source, **model.init_kwargs)
        return Side(
            model, folder, loading["seconds"], loading_trained["seconds"], saving["seconds"],
            size_of(folder) - tokenizer_size, tokenizer_size, dataclasses.replace(training, memory=peak[0]), trains,
            infers, infers_plain,
        )  # fmt: skip

    def _train(self, model: Any, examples: Dataset, args: TrainingArguments, tokenizer: Any) -> tuple[Any, Pace]:
        notes: list[tuple[float, float]] = []
        args = copy.copy(args)
        # Enough for a pace, however short the training itself is.
        args.max_steps = _TIMED_STEPS + 1
        start = time.perf_counter()
        with metered() as meter:
            trained, _ = fine_tune(
                model, examples, args, pad_token_id=tokenizer.eos_token_id, seed=self.files.config.seed,
                description="timing", peft_config=self.files.config.peft_config(), trainer_class=_TimedTrainer,
                notes=notes, meter=meter,
            )  # fmt: skip
        total = time.perf_counter() - start
        times, flops = np.diff([when for when, _ in notes]), np.diff([done for _, done in notes])
        # The first step warms up, unless there is no other.
        kept = slice(1, None) if len(times) > 1 else slice(None)
        per_flop = float(np.median(times[kept] / flops[kept])) if len(times) else total / meter.flops
        return trained, Pace(max(0.0, total - per_flop * meter.flops), per_flop, 0)

    def ensemble(self, side: Side, count: int) -> TokenEnsemble:
        """Return `count` copies of what was trained: their answers do not matter, what they cost does."""
        return self.files.combined(side.model, [side.folder] * count)

    def scoring(self, side: Side, count: int) -> Pace:
        """Time one batch of given answers, the longest ones of a test set, under all mixtures of `count` experts."""
        pad = self.files.tokenizer(side.model).eos_token_id
        with peak_memory() as peak:
            ensemble = self.ensemble(side, count)
            mixtures = {"all": [1.0] * count}
            if count > 1:
                mixtures |= {f"expert {t}": np.eye(count)[t].tolist() for t in range(count)} | {"same": [1.0] * count}
            examples = self.files.examples("test_ood", side.model)
            order = by_length(lengths_of(examples)[0])
            score_mixtures(ensemble, examples.select(order[:2]), mixtures, pad_token_id=pad)
            longest = examples.select(order[-SCORING_BATCH:])
            paces: list[float] = []
            start = time.perf_counter()
            while len(paces) < _TIMED_PASSES and time.perf_counter() - start < _TIMED_SECONDS:
                with measured() as spent:
                    score_mixtures(ensemble, longest, mixtures, pad_token_id=pad)
                paces.append(spent["seconds"] / spent["flops"])
        return Pace(0.0, float(np.median(paces)), peak[0])

    def decoding(self, side: Side, count: int, prompts: Sequence[Sequence[int]]) -> tuple[Pace, float]:
        """Time a batch of prompts and a few tokens of their answers; return reading's pace and a step's seconds."""
        ensemble = self.ensemble(side, count)
        pad = self.files.tokenizer(side.model).eos_token_id
        seeds = torch.zeros(len(prompts), dtype=torch.int64, device=ensemble.device)
        decoder = MixtureDecoder(ensemble, *pad_prompts(prompts, pad, ensemble.device), seeds, Sampling())
        taken = []
        for _ in range(1 + _DECODING_STEPS):
            with torch.no_grad(), measured() as spent:
                decoder.append(decoder.choose(decoder.logits()).tokens)
            taken.append(spent)
        # The first step reads the prompts.
        reading = Pace(0.0, taken[0]["seconds"] / taken[0]["flops"], 0)
        return reading, float(np.median([spent["seconds"] for spent in taken[1:]]))

    def choosing(self, side: Side, count: int, questions: Dataset) -> Pace:
        """Time a batch of questions that are answered by choosing."""
        tokenizer, ensemble = self.files.tokenizer(side.model), self.ensemble(side, count)
        settings = ChoiceSettings(self.files.config.data.format, batch_size=10**9)
        with measured() as spent:
            score_choice_mixtures(ensemble, questions, tokenizer, {"all": [1.0] * count}, settings)
        return Pace(0.0, spent["seconds"] / spent["flops"], 0)


def lengths_of(examples: Dataset) -> tuple[list[int], list[int]]:
    """Return the tokens of each example, and of its answer."""
    return [len(ids) for ids in examples["input_ids"]], answer_lengths(examples).tolist()


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
