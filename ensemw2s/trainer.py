"""`BoostingTrainer`: the rounds of EnsemW2S (phase 1 of the method), resumable at any point."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ensemw2s import boosting, processes
from ensemw2s.checkpoints import discard_checkpoints
from ensemw2s.data import QuestionFormat, answer_lengths, check_disjoint, check_questions, tokenize_questions
from ensemw2s.ensemble import COMBINE, TokenEnsemble
from ensemw2s.files import map_array, new_array, new_folder, read_array, read_json, write_array, write_json
from ensemw2s.models import load_model, load_tokenizer, source_of
from ensemw2s.scoring import AnswerScores, score_mixtures
from ensemw2s.training import PRESENTATION, AnswerTrainingArguments, TrainingCost, fine_tune, on_device

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

RECIPES: dict[str, dict[str, Any]] = {
    # The paper's, to the letter.
    "paper": {"sampling": "draw", "shrinkage": 1.0, "uniform_mix": 0.0},
    # Ours: the paper's collapses on real models, because one full update leaves a small effective sample size.
    "stabilised": {"sampling": "reweight", "shrinkage": 0.3, "uniform_mix": 0.5},
    # The baseline: uniform draws, equal votes.
    "bagging": {"sampling": "bagging", "shrinkage": 1.0, "uniform_mix": 0.0},
}
WEIGHT_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
# An expert no better than the prior is trained once more with a fresh seed before boosting stops (invariant 4).
ATTEMPTS = 2
# More rounds go on from the ones there are.
_PRESENTATION = PRESENTATION | {"num_rounds"}


@dataclass
class BoostingConfig(AnswerTrainingArguments):
    """What `BoostingTrainer` does, on top of transformers' `TrainingArguments` (which train each expert).

    Attributes:
        num_rounds: T, the number of experts wanted; at least 1.
        recipe: "stabilised" (ours, the default), "paper" or "bagging": fills in `sampling`, `shrinkage` and
            `uniform_mix` where they are None.
        sampling: "draw" (the paper), "reweight" or "bagging"; see `boosting.loss_weights`.
        shrinkage: s in (0, 1]; the update uses s * a_t, the mixture a_t.
        uniform_mix: m in [0, 1); the loss uses (1-m) D + m/n.
        deduplicate: a token drawn several times counts once.
        prior: "pretrained" (the paper: the error of the model before fine-tuning), "uniform" (SAMME) or a number in
            (0, 1).
        num_classes: K for prior="uniform"; None takes the size of the vocabulary.
        unit: what shares one weight: "token", "window" or "sequence".
        window: tokens in a window, for unit="window".
        combine: how the ensemble combines distributions: "prob", "logprob" or "vote".
        overwrite: delete what another configuration left in `output_dir`.

    Raises:
        ValueError: a value outside its range; names it.
    """

    num_rounds: int = 5
    recipe: str = "stabilised"
    sampling: boosting.Sampling = None  # type: ignore[assignment]
    shrinkage: float = None  # type: ignore[assignment]
    uniform_mix: float = None  # type: ignore[assignment]
    deduplicate: bool = False
    prior: Any = field(default="pretrained")
    num_classes: int | None = None
    unit: boosting.Unit = "token"
    window: int | None = None
    combine: str = "prob"
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.num_rounds < 1:
            raise ValueError(f"num_rounds must be at least 1, got {self.num_rounds}")
        if self.combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {self.combine!r}")
        self._try_values()

    def _try_values(self) -> None:
        """Let the functions that will use a value refuse it now rather than after the first expert."""
        two = boosting.initial_weights(2)
        generator = np.random.default_rng(0)
        boosting.unit_index([2], self.unit, self.window)
        boosting.prior_error(self.prior, pretrained_error=0.5, num_classes=self.num_classes or 2, unit=self.unit)
        boosting.update_weights(two, [True, False], 1.0, self.shrinkage)
        self.loss_weights(two, generator)

    def loss_weights(
        self, weights: np.ndarray, generator: np.random.Generator, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return float64 [N], the weight of each unit in one round's loss; in `out` if given."""
        return boosting.loss_weights(
            weights,
            sampling=self.sampling,
            uniform_mix=self.uniform_mix,
            deduplicate=self.deduplicate,
            generator=generator,
            out=out,
        )


class BoostingTrainer:
    """Train up to T experts in boosting rounds and return their `TokenEnsemble`.

    Every phase of every round (token weights, expert, errors, record) is written whole to `args.output_dir` when it
    is done. `train()` on a folder that a killed run left behind goes on with the first missing phase, and ends with
    the same bits as an uninterrupted run.

    Several processes (`accelerate launch`, `torchrun`) share out every batch: each makes the trainer and calls
    `train()`, and the main one writes. The batch sizes of `args` are those of one process, as transformers has it.
    With the same experts, errors, expert weights, token weights and draws have the same bits for any number of
    processes.

    Args:
        model: folder, hub id or other source of `models.load_model`, or a model; or a list with one for each round.
        args: see `BoostingConfig`.
        train_dataset: easy questions with columns `prompt` and `answer`.
        eval_dataset: validation questions, measured after each round; None measures nothing.
        processing_class: the tokenizer; None loads the one of `model`.
        peft_config: train adapters with this configuration; None trains all weights. With a list of models the
            adapters are merged into them.
        question_format: how a question becomes tokens.
        model_init_kwargs: passed on to `models.load_model` (`dtype`, `keep_layers`, `quantization_config`, ...).
        on_round: called with each round's record as soon as it is known, on the main process.

    Raises:
        ValueError: bad data or settings; a question in both datasets; too few models; an `output_dir` that belongs
            to another configuration.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | Sequence[str | PreTrainedModel],
        args: BoostingConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        question_format: QuestionFormat | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        on_round: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.models: list[Any] = list(model) if isinstance(model, list | tuple) else [model]
        if len(self.models) not in (1, args.num_rounds):
            raise ValueError(
                f"model lists {len(self.models)} models for {args.num_rounds} rounds: give one, or one each"
            )
        self.args = args
        self.peft_config = peft_config
        self.question_format = question_format or QuestionFormat()
        self.model_init_kwargs = dict(model_init_kwargs or {})
        self.on_round = on_round or (lambda record: None)
        self.processing_class = processing_class or load_tokenizer(source_of(self.models[0]))
        self.folder = Path(str(args.output_dir))
        self.train_questions = check_questions(train_dataset, "train_dataset")
        self.eval_questions = None if eval_dataset is None else check_questions(eval_dataset, "eval_dataset")
        if self.eval_questions is not None:
            check_disjoint({"train_dataset": self.train_questions, "eval_dataset": self.eval_questions})
        self._train = self._tokenize(self.train_questions, "train_dataset")
        self._eval = None if self.eval_questions is None else self._tokenize(self.eval_questions, "eval_dataset")
        self._lengths = answer_lengths(self._train)
        self.num_units = int(self._unit_index()[-1]) + 1

    @property
    def records(self) -> list[dict[str, Any]]:
        """Return one record per finished attempt of every round, in order."""
        found = []
        for number in range(1, self.args.num_rounds + 1):
            for attempt in range(1, ATTEMPTS + 1):
                file = self._attempt_folder(number, attempt) / "record.json"
                if file.exists():
                    found.append(read_json(file))
        return found

    @property
    def stop_reason(self) -> str | None:
        """Say why boosting ended before T rounds; None if it did not (or has not ended)."""
        records = self.records
        if records and not records[-1]["accepted"] and records[-1]["attempt"] == ATTEMPTS:
            last = records[-1]
            return (
                f"round {last['round']} stopped boosting: two experts with different seeds had weighted errors of "
                f"{records[-2]['error']:.4f} and {last['error']:.4f}, not below the prior error "
                f"{last['prior_error']:.4f}, so their weights would not be positive"
            )
        return None

    def train(self) -> TokenEnsemble:
        """Run or continue the rounds and return the ensemble of the accepted experts.

        Raises:
            RuntimeError: no expert beat the prior, not even in round 1.
        """
        processes.on_main(self._claim_folder)
        processes.on_main(self._start_weights)
        prior_error = self._prior_error()
        for number in range(1, self.args.num_rounds + 1):
            if not self._round(number, prior_error):
                break
        accepted = self._accepted()
        if not accepted:
            raise RuntimeError(
                f"no expert beats the pre-trained model: {self.stop_reason}. Train longer or with another learning "
                f"rate (now {self.args.num_train_epochs:g} epochs at {self.args.learning_rate:g})"
            )
        return self._ensemble([folder for folder, _ in accepted], [weight for _, weight in accepted])

    def record(self) -> dict[str, Any]:
        """Return the run's account, to be saved with the ensemble: settings, records, why it stopped."""
        settings = {name: getattr(self.args, name) for name in RECIPES["paper"]}
        return {
            "recipe": self.args.recipe, **settings, "unit": self.args.unit, "combine": self.args.combine,
            "seed": self.args.seed, "rounds": self.records, "stop_reason": self.stop_reason,
        }  # fmt: skip

    # One round

    def _round(self, number: int, prior_error: float | None) -> bool:
        for attempt in range(1, ATTEMPTS + 1):
            file = self._attempt_folder(number, attempt) / "record.json"
            if not processes.on_main(file.exists):
                record = self._attempt(number, attempt, prior_error)
                processes.on_main(self._keep_record, file, record)
            if processes.on_main(read_json, file)["accepted"]:
                return True
        return False

    def _keep_record(self, file: Path, record: dict[str, Any]) -> None:
        write_json(file, record)
        self.on_round(record)

    def _attempt(self, number: int, attempt: int, prior_error: float | None) -> dict[str, Any]:
        start = time.perf_counter()
        folder = self._attempt_folder(number, attempt)
        weights = self._weights(number)
        self._train_expert(number, attempt, weights)
        wrong = self._wrong_units(folder)
        error, clamped = boosting.clamp_error(boosting.weighted_error(weights, wrong), self.num_units)
        # Bagging has equal votes and no update: an error under uniform weights decides nothing.
        expert_weight = 1.0 if prior_error is None else boosting.expert_weight(error, prior_error)
        accepted = expert_weight > 0
        update = expert_weight if accepted and prior_error is not None else None
        spread = processes.on_main(self._next_weights, number, wrong, update, accepted)
        return {
            "kind": "round", "round": number, "attempt": attempt, "error": error, "prior_error": prior_error,
            "expert_weight": expert_weight, "clamped": clamped, "accepted": accepted,
            "num_units": self.num_units, **spread, "num_processes": processes.count(),
            "validation": self._validate(number, folder, expert_weight) if accepted else None,
            **{f"train_{name}": value for name, value in read_json(folder / "expert" / "cost.json").items()},
            "seconds": time.perf_counter() - start,
        }  # fmt: skip

    def _next_weights(self, number: int, wrong: np.ndarray, update: float | None, keep: bool) -> dict[str, Any]:
        """Update the weights by `update` (None leaves them), keep them for the next round, and say how they spread."""
        following = self._weights(number)
        if keep:
            with new_array(self._round_folder(number + 1) / "weights.npy", self.num_units) as updated:
                if update is None:
                    updated[:] = following
                else:
                    boosting.update_weights(following, wrong, update, self.args.shrinkage, out=updated)
            following = self._weights(number + 1)
        quantiles = boosting.weight_quantiles(following, WEIGHT_QUANTILES)
        return {
            "effective_sample_size": boosting.effective_sample_size(following),
            "weight_quantiles": {str(q): float(v) for q, v in zip(WEIGHT_QUANTILES, quantiles, strict=True)},
        }

    def _train_expert(self, number: int, attempt: int, weights: np.ndarray) -> None:
        folder = self._attempt_folder(number, attempt) / "expert"
        if processes.on_main(folder.exists):
            return
        draw_seed, training_seed = np.random.SeedSequence(self.args.seed, spawn_key=(number, attempt)).generate_state(2)
        drawn = folder.with_name("loss_weights.npy")
        processes.on_main(self._keep_loss_weights, drawn, weights, np.random.default_rng(draw_seed))
        token_weights = self._per_answer(map_array(drawn))
        # A sentence of which no token was drawn has no loss.
        kept = [i for i, row in enumerate(token_weights) if row.any()]
        trained, cost = fine_tune(
            self._load_model(number),
            self._train.select(kept),
            self.args,
            pad_token_id=self.processing_class.eos_token_id,
            seed=int(training_seed),
            description=f"round {number}: training expert",
            token_weights=[token_weights[i] for i in kept],
            peft_config=self.peft_config,
        )
        if self.peft_config is not None and not self._adapters:
            trained = trained.merge_and_unload()
        processes.on_main(self._keep_expert, folder, trained, cost)

    def _keep_loss_weights(self, file: Path, weights: np.ndarray, generator: np.random.Generator) -> None:
        with new_array(file, self.num_units) as out:
            self.args.loss_weights(weights, generator, out)

    def _per_answer(self, unit_weights: np.ndarray) -> list[np.ndarray]:
        """Return each answer's token weights, float32 as the loss takes them: views of one array."""
        units = map_array(self.folder / "units.npy")
        tokens = np.empty(units.size, dtype=np.float32)
        for start in range(0, units.size, boosting.BLOCK):
            tokens[start : start + boosting.BLOCK] = unit_weights[units[start : start + boosting.BLOCK]]
        return np.split(tokens, np.cumsum(self._lengths)[:-1])

    def _keep_expert(self, folder: Path, trained: Any, cost: TrainingCost) -> None:
        # Every process has trained: none reads the loss's weights any more, and they can be drawn again.
        folder.with_name("loss_weights.npy").unlink(missing_ok=True)
        with new_folder(folder) as aside:
            trained.save_pretrained(aside)
            write_json(aside / "cost.json", asdict(cost))
        discard_checkpoints(self.args.output_dir)

    def _wrong_units(self, folder: Path) -> np.ndarray:
        """Return bool [N] for the expert in `folder`: measured from its saved form, and kept."""
        file = folder / "token_wrong.npy"
        if not processes.on_main(file.exists):
            expert = self._ensemble([folder / "expert"], [1.0])
            scores = self._score(expert, self._train, {"expert": [1.0]}, "weighted error")
            processes.on_main(write_array, file, scores["expert"].token_wrong)
        return boosting.unit_wrong(map_array(file), map_array(self.folder / "units.npy"))

    def _validate(self, number: int, folder: Path, expert_weight: float) -> dict[str, float] | None:
        if self._eval is None:
            return None
        earlier = self._accepted(before=number)
        weights = [weight for _, weight in earlier] + [expert_weight]
        ensemble = self._ensemble([path for path, _ in earlier] + [folder / "expert"], weights)
        mixtures = {"expert": [0.0] * len(earlier) + [1.0], "ensemble": weights}
        scores = self._score(ensemble, self._eval, mixtures, "validation")
        return {
            "expert": scores["expert"].accuracy,
            "ensemble": scores["ensemble"].accuracy,
            "token_error": scores["ensemble"].token_error,
        }

    # What is kept, and where

    def _unit_index(self) -> np.ndarray:
        return boosting.unit_index(self._lengths, self.args.unit, self.args.window)

    def _round_folder(self, number: int) -> Path:
        return self.folder / "rounds" / str(number)

    def _attempt_folder(self, number: int, attempt: int) -> Path:
        return self._round_folder(number) / f"attempt-{attempt}"

    def _weights(self, number: int) -> np.ndarray:
        """Return float64 [N], mapped from the file that the round before wrote."""
        file = self._round_folder(number) / "weights.npy"
        if not file.exists():
            raise FileNotFoundError(f"{file} is gone (round {number - 1} wrote it): delete {self.folder}")
        return map_array(file)

    def _accepted(self, before: int | None = None) -> list[tuple[Path, float]]:
        """Return folder and weight of each accepted expert (of the rounds before `before`)."""
        return [
            (self._attempt_folder(record["round"], record["attempt"]) / "expert", record["expert_weight"])
            for record in self.records
            if record["accepted"] and (before is None or record["round"] < before)
        ]

    def _prior_error(self) -> float | None:
        if self.args.sampling == "bagging":
            return None
        pretrained = None
        if self.args.prior == "pretrained":
            file = self.folder / "pretrained_token_wrong.npy"
            if not processes.on_main(file.exists):
                untrained = TokenEnsemble.from_models([self._load_model(1)], [1.0])
                scores = self._score(untrained, self._train, {"prior": [1.0]}, "error before training")
                processes.on_main(write_array, file, scores["prior"].token_wrong)
            wrong = boosting.unit_wrong(map_array(file), map_array(self.folder / "units.npy"))
            error = boosting.weighted_error(self._weights(1), wrong)
            pretrained, _ = boosting.clamp_error(error, self.num_units)
        classes = self.args.num_classes or len(self.processing_class)
        return boosting.prior_error(self.args.prior, pretrained, classes, self.args.unit)

    def _claim_folder(self) -> None:
        """Refuse a folder in which another configuration has worked, naming what differs."""
        file = self.folder / "boosting_config.json"
        mine = json.loads(json.dumps(self._fingerprint(), default=plain))
        if file.exists() and not self.args.overwrite:
            theirs = read_json(file)
            differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            if differing:
                raise ValueError(
                    f"{self.folder} holds a boosting run with another configuration; differing: "
                    f"{', '.join(differing)}. Choose another output_dir, or pass overwrite=True to delete that run"
                )
            return
        if file.exists() and mine != read_json(file):
            shutil.rmtree(self.folder / "rounds", ignore_errors=True)
            (self.folder / "pretrained_token_wrong.npy").unlink(missing_ok=True)
        write_array(self.folder / "units.npy", self._unit_index())
        write_json(file, mine)

    def _start_weights(self) -> None:
        first = self._round_folder(1) / "weights.npy"
        if not first.exists():
            with new_array(first, self.num_units) as weights:
                boosting.initial_weights(self.num_units, out=weights)

    def _fingerprint(self) -> dict[str, Any]:
        args = {name: value for name, value in self.args.to_dict().items() if name not in _PRESENTATION | {"overwrite"}}
        return {
            **args,
            "model": [describe_model(model) for model in self.models],
            "model_init_kwargs": self.model_init_kwargs,
            "peft_config": None if self.peft_config is None else self.peft_config.to_dict(),
            "question_format": asdict(self.question_format),
            "train_dataset": digest_questions(self.train_questions),
        }

    # Models

    @property
    def _adapters(self) -> bool:
        return self.peft_config is not None and len(self.models) == 1

    def _score(
        self,
        ensemble: TokenEnsemble,
        examples: Dataset,
        mixtures: Mapping[str, Sequence[float]],
        description: str,
    ) -> dict[str, AnswerScores]:
        return score_mixtures(
            ensemble,
            examples,
            mixtures,
            pad_token_id=self.processing_class.eos_token_id,
            batch_size=self.args.per_device_eval_batch_size,
            description=None if self.args.disable_tqdm else description,
        )

    def _model_of(self, number: int) -> Any:
        return self.models[0] if len(self.models) == 1 else self.models[number - 1]

    def _load_model(self, number: int) -> Any:
        model = self._model_of(number)
        if isinstance(model, PreTrainedModel):
            return copy.deepcopy(model)
        return on_device(load_model(model, **self.model_init_kwargs), self.args)

    def _ensemble(self, folders: list[Path], expert_weights: list[float]) -> TokenEnsemble:
        combine = self.args.combine
        if not self._adapters:
            models = [on_device(load_model(folder), self.args) for folder in folders]
            return TokenEnsemble.from_models(models, expert_weights, combine=combine)
        source = self.models[0]
        reference = None if isinstance(source, PreTrainedModel) else {"source": source, **self.model_init_kwargs}
        return TokenEnsemble.from_adapters(
            self._load_model(1), folders, expert_weights, combine=combine, base_reference=reference
        )

    def _tokenize(self, questions: Dataset, name: str) -> Dataset:
        return tokenize_questions(questions, self.processing_class, self.question_format, name)


def closing_identity(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Check a finished run's own files: token weights that sum to 1, and the closing identity (method, invariant 2).

    After the update with shrinkage s the expert just added has the weighted error
    `exp(s a) e / (exp(s a) e + 1 - e)`, which is e_0 for s = 1. It is recomputed here from the saved weights and the
    saved per-token wrong bits.

    Args:
        output_dir: of a `BoostingTrainer`.

    Returns:
        For each accepted round `round`, `identity_gap` (None where e was clamped or there was no update) and
        `sum_gap` = |sum D - 1|, of the updated weights.
    """
    folder = Path(output_dir)
    config = read_json(folder / "boosting_config.json")
    checks = []
    for file in sorted(folder.glob("rounds/*/attempt-*/record.json"), key=lambda f: int(f.parts[-3])):
        record = read_json(file)
        if not record["accepted"]:
            continue
        number = record["round"]
        after = read_array(folder / "rounds" / str(number + 1) / "weights.npy")
        gap = None
        if not record["clamped"] and record["prior_error"] is not None:
            wrong = boosting.unit_wrong(read_array(file.parent / "token_wrong.npy"), read_array(folder / "units.npy"))
            factor = np.exp(config["shrinkage"] * record["expert_weight"]) * record["error"]
            gap = abs(boosting.weighted_error(after, wrong) - factor / (factor + 1 - record["error"]))
        checks.append({
            "kind": "identity", "round": number, "identity_gap": gap, "sum_gap": abs(float(after.sum()) - 1.0),
        })  # fmt: skip
    return checks


def describe_model(model: str | os.PathLike[str] | PreTrainedModel) -> str:
    """Name a model: a source by itself, a model by a hash of its weights."""
    if not isinstance(model, PreTrainedModel):
        return str(model)
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return f"{type(model).__name__}:{digest.hexdigest()}"


def digest_questions(questions: Dataset) -> str:
    """Name questions by a hash of their prompts and answers, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in questions.select_columns(["prompt", "answer"]):
        digest.update(json.dumps([row["prompt"], row["answer"]]).encode())
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Turn what JSON does not know (sets, enums, paths) into what it does."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
