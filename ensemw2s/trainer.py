"""`BoostingTrainer`: the rounds of EnsemW2S (phase 1 of the method), resumable at any point."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from ensemw2s import boosting, processes
from ensemw2s.checkpoints import discard_checkpoints
from ensemw2s.cost import total
from ensemw2s.data import QuestionFormat, answer_lengths, check_disjoint, check_questions, tokenize_questions
from ensemw2s.ensemble import TokenEnsemble
from ensemw2s.files import (
    digest_of_files,
    map_array,
    new_array,
    new_folder,
    read_array,
    read_json,
    write_array,
    write_json,
)
from ensemw2s.identity import computes, describe_model, digest_examples, digest_questions, plain
from ensemw2s.models import load_model, load_tokenizer, source_of
from ensemw2s.recipes import RECIPES, BoostingConfig
from ensemw2s.scoring import AnswerScores, score_mixtures
from ensemw2s.store import Store, obtain
from ensemw2s.training import PRESENTATION, TrainingCost, fine_tune, on_device, training_settings

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

WEIGHT_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
# An expert no better than the prior is trained once more with a fresh seed before boosting stops (invariant 4).
ATTEMPTS = 2
# More rounds go on from the ones there are.
_PRESENTATION = PRESENTATION | {"num_rounds"}


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
        store: where experts and their scores are kept for other trainers, and found if another has left them there.

    Raises:
        ValueError: bad data or settings; settings that need validation questions without `eval_dataset`; a question in
            both datasets; too few models; an `output_dir` that belongs to another configuration.
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
        store: Store | None = None,
    ) -> None:
        self.models: list[Any] = list(model) if isinstance(model, list | tuple) else [model]
        if len(self.models) not in (1, args.num_rounds):
            raise ValueError(
                f"model lists {len(self.models)} models for {args.num_rounds} rounds: give one, or one each"
            )
        _check_settings(args, len(self.models), peft_config, eval_dataset)
        self.args = args
        self.peft_config = peft_config
        self.store = store
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
        self._boosted = self._boosted_tokens()
        if args.error_folds is not None and args.error_folds > len(self._train):
            raise ValueError(
                f"error_folds={args.error_folds} leaves folds without an answer: train_dataset has {len(self._train)} "
                "questions, give at most as many folds"
            )
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
        if not records or (records[-1]["round"] == self.args.num_rounds and records[-1]["accepted"]):
            return None
        last = records[-1]
        if not last["accepted"] and last["attempt"] == ATTEMPTS:
            return (
                f"round {last['round']} stopped boosting: two experts with different seeds had weighted errors of "
                f"{records[-2]['error']:.4f} and {last['error']:.4f}, not below the prior error "
                f"{last['prior_error']:.4f}, so their weights would not be positive"
            )
        if self._is_spent(last):
            return (
                f"round {last['round']} stopped boosting: it left an effective sample size of "
                f"{last['effective_sample_size'] / self.num_units:.1%} of the units, below min_effective_sample_size"
            )
        return None

    def train(self) -> TokenEnsemble:
        """Run or continue the rounds and return the ensemble of the accepted experts.

        Raises:
            RuntimeError: no expert beat the prior, not even in round 1.
        """
        processes.on_main(self._claim_folder)
        processes.on_main(self._start_weights)
        for number in range(1, self.args.num_rounds + 1):
            if not self._round(number):
                break
        if not self._accepted():
            raise RuntimeError(
                f"no expert beats the pre-trained model: {self.stop_reason}. Train longer or with another learning "
                f"rate (now {self.args.num_train_epochs:g} epochs at {self.args.learning_rate:g})"
            )
        return self._ensemble(self.expert_folders(), self.mixture()["expert_weights"])

    def expert_folders(self) -> list[Path]:
        """Return where the experts of the ensemble are saved, in their order."""
        return [folder for folder, _ in self._accepted()][: self.mixture()["num_experts"]]

    def mixture(self) -> dict[str, Any]:
        """Return how many of the accepted experts the ensemble has, and their weights.

        Returns:
            `num_experts`, `expert_weights` (as many), and `log_likelihoods`: where validation questions decided, the
            mean log-probability (nats) of a validation token under the mixture of the first 1, 2, ... experts.
        """
        weights = self._mixing([weight for _, weight in self._accepted()])
        record = {"kind": "mixture", "num_experts": len(weights), "expert_weights": weights, "log_likelihoods": None}
        if not self.args.needs_validation:
            return record
        file = self.folder / f"mixture-of-{len(weights)}.json"
        if not processes.on_main(file.exists):
            decided = self._fitted(weights) if self.args.mixture_weights == "validation" else self._chosen(weights)
            processes.on_main(write_json, file, record | decided)
        return dict(processes.on_main(read_json, file))

    def _mixing(self, expert_weights: list[float]) -> list[float]:
        return [1.0] * len(expert_weights) if self.args.mixture_weights == "uniform" else expert_weights

    def _fitted(self, weights: list[float]) -> dict[str, Any]:
        count = len(weights)
        scores = self._validation_scores({str(t): [float(s == t) for s in range(count)] for t in range(count)})
        fitted = boosting.fit_mixture_weights([scores[str(t)].token_log_probs for t in range(count)])
        return {"expert_weights": fitted.tolist()}

    def _chosen(self, weights: list[float]) -> dict[str, Any]:
        count = len(weights)
        scores = self._validation_scores({str(t): weights[:t] + [0.0] * (count - t) for t in range(1, count + 1)})
        reached = [float(scores[str(t)].token_log_probs.mean()) for t in range(1, count + 1)]
        best = int(np.argmax(reached)) + 1
        return {"num_experts": best, "expert_weights": weights[:best], "log_likelihoods": reached}

    def _validation_scores(self, mixtures: Mapping[str, Sequence[float]]) -> dict[str, AnswerScores]:
        folders = [folder for folder, _ in self._accepted()]
        return self._score(self._ensemble(folders, [1.0] * len(folders)), self._eval, mixtures, "validation")

    def record(self) -> dict[str, Any]:
        """Return the run's account, to be saved with the ensemble: settings, records, why it stopped."""
        settings = {name: getattr(self.args, name) for name in RECIPES["paper"]}
        return {
            "recipe": self.args.recipe, **settings, "unit": self.args.unit, "combine": self.args.combine,
            "seed": self.args.seed, "rounds": self.records, "stop_reason": self.stop_reason,
        }  # fmt: skip

    # One round

    def _round(self, number: int) -> bool:
        """Train the round's expert and return whether another round follows."""
        for attempt in range(1, ATTEMPTS + 1):
            file = self._attempt_folder(number, attempt) / "record.json"
            if not processes.on_main(file.exists):
                processes.on_main(self._keep_record, file, self._attempt(number, attempt))
            record = processes.on_main(read_json, file)
            if record["accepted"]:
                return not self._is_spent(record)
        return False

    def _is_spent(self, record: Mapping[str, Any]) -> bool:
        return bool(record["effective_sample_size"] < self.args.min_effective_sample_size * self.num_units)

    def _keep_record(self, file: Path, record: dict[str, Any]) -> None:
        write_json(file, record)
        self.on_round(record)

    def _attempt(self, number: int, attempt: int) -> dict[str, Any]:
        start = time.perf_counter()
        folder = self._attempt_folder(number, attempt)
        weights = self._weights(number)
        self._train_expert(number, attempt)
        losses = self._losses(number, attempt)
        error, clamped = boosting.clamp_error(boosting.weighted_error(weights, losses), self.num_units)
        # The baselines have equal votes and no update: an error under uniform weights decides nothing.
        prior_error = None if self.args.is_baseline else self._prior_error(weights)
        expert_weight = 1.0 if prior_error is None else boosting.expert_weight(error, prior_error)
        accepted = expert_weight > 0
        update = expert_weight if accepted and prior_error is not None else None
        spread = processes.on_main(self._next_weights, number, losses, update, accepted)
        validate = accepted and self.args.validate_rounds
        return {
            "kind": "round", "round": number, "attempt": attempt, "error": error, "prior_error": prior_error,
            "expert_weight": expert_weight, "clamped": clamped, "accepted": accepted,
            "num_units": self.num_units, **spread, "num_processes": processes.count(),
            "validation": self._validate(number, folder, expert_weight) if validate else None,
            **{f"train_{name}": value for name, value in _spent(folder).items()},
            "seconds": time.perf_counter() - start,
        }  # fmt: skip

    def _next_weights(self, number: int, losses: np.ndarray, update: float | None, keep: bool) -> dict[str, Any]:
        """Update the weights by `update` (None leaves them), keep them for the next round, and say how they spread."""
        following = self._weights(number)
        if keep:
            with new_array(self._round_folder(number + 1) / "weights.npy", self.num_units) as updated:
                if update is None:
                    updated[:] = following
                else:
                    self.args.update(following, losses, update, out=updated)
            following = self._weights(number + 1)
        quantiles = boosting.weight_quantiles(following, WEIGHT_QUANTILES)
        return {
            "effective_sample_size": boosting.effective_sample_size(following),
            "weight_quantiles": {str(q): float(v) for q, v in zip(WEIGHT_QUANTILES, quantiles, strict=True)},
        }

    # Experts

    def _train_expert(self, number: int, attempt: int) -> None:
        seed = self._seeds(number, attempt)[1]
        folder = self._attempt_folder(number, attempt) / "expert"
        everything = np.arange(len(self._train))
        self._train_on(folder, number, attempt, everything, seed, f"round {number}: training expert")

    def _train_on(self, folder: Path, number: int, attempt: int, rows: np.ndarray, seed: int, description: str) -> None:
        """Train a model on the answers in `rows` with the round's weights, and leave it in `folder`."""
        if processes.on_main(folder.exists):
            return
        token_weights = self._token_weights(number, attempt)
        # A sentence of which no token was drawn has no loss.
        kept = [int(row) for row in rows if token_weights[row].any()]
        chosen, examples = [token_weights[row] for row in kept], self._train.select(kept)
        peft_config = self._round_peft_config(number)
        model = self._starting_model(number, folder.name)
        new_adapter = None if hasattr(model, "peft_config") else peft_config

        def make() -> None:
            trained, cost = fine_tune(
                model,
                examples,
                self.args,
                pad_token_id=self.processing_class.eos_token_id,
                seed=seed,
                description=description,
                token_weights=chosen,
                peft_config=new_adapter,
            )
            if peft_config is not None and not self._adapters:
                trained = trained.merge_and_unload()
            processes.on_main(self._keep_expert, folder, trained, cost)

        def key() -> dict[str, Any]:
            return {
                "training": training_settings(self.args) | {"seed": seed, "num_processes": processes.count()},
                "model": computes(model),
                "peft_config": None if peft_config is None else peft_config.to_dict(),
                "saved_as": "adapter" if self._adapters else "model",
                "examples": digest_examples(examples),
                "token_weights": hashlib.blake2b(np.concatenate(chosen).tobytes()).hexdigest(),
            }

        obtain(self.store, folder, key, make)

    def _starting_model(self, number: int, name: str) -> Any:
        """Return the pre-trained model, or with `warm_start` the one called `name` of the round before."""
        if number == 1 or not self.args.warm_start:
            return self._load_model(number)
        before = next(r for r in reversed(self.records) if r["accepted"] and r["round"] == number - 1)
        folder = self._attempt_folder(number - 1, before["attempt"]) / name
        if not self._adapters:
            return on_device(load_model(folder), self.args)
        from peft import PeftModel

        return PeftModel.from_pretrained(self._load_model(number), str(folder), is_trainable=True)

    def _round_peft_config(self, number: int) -> Any:
        if self.args.lora_ranks is None:
            return self.peft_config
        config: Any = copy.deepcopy(self.peft_config)
        rank = self.args.lora_ranks[number - 1]
        config.lora_alpha, config.r = config.lora_alpha * rank / config.r, rank
        return config

    def _seeds(self, number: int, attempt: int) -> tuple[int, int]:
        """Return the seeds of the round's draws and of its training."""
        draw, training = np.random.SeedSequence(self.args.seed, spawn_key=(number, attempt)).generate_state(2)
        if not self.args.vary_seed:
            training = np.random.SeedSequence(self.args.seed, spawn_key=(1, attempt)).generate_state(2)[1]
        return int(draw), int(training)

    def _token_weights(self, number: int, attempt: int) -> list[np.ndarray]:
        """Return the weight of each answer's tokens in the round's loss, float32: views of one array."""
        drawn = self._attempt_folder(number, attempt) / "loss_weights.npy"
        processes.on_main(self._keep_loss_weights, drawn, self._weights(number), self._seeds(number, attempt)[0])
        token_weights = self._per_answer(map_array(drawn))
        # Once every process has its own copy; they can be drawn again.
        processes.start().wait_for_everyone()
        processes.on_main(drawn.unlink)
        return token_weights

    def _keep_loss_weights(self, file: Path, weights: np.ndarray, seed: int) -> None:
        with new_array(file, self.num_units) as out:
            self.args.loss_weights(weights, np.random.default_rng(seed), out)

    def _per_answer(self, unit_weights: np.ndarray) -> list[np.ndarray]:
        units = map_array(self.folder / "units.npy")
        boosted = np.empty(units.size, dtype=np.float32)
        for start in range(0, units.size, boosting.BLOCK):
            boosted[start : start + boosting.BLOCK] = unit_weights[units[start : start + boosting.BLOCK]]
        tokens = boosted
        if self._boosted is not None:
            tokens = np.ones(self._boosted.size, dtype=np.float32)
            tokens[self._boosted] = boosted
        return np.split(tokens, np.cumsum(self._lengths)[:-1])

    def _keep_expert(self, folder: Path, trained: Any, cost: TrainingCost) -> None:
        with new_folder(folder) as aside:
            trained.save_pretrained(aside)
            write_json(aside / "cost.json", asdict(cost))
        discard_checkpoints(self.args.output_dir)

    # Errors

    def _losses(self, number: int, attempt: int) -> np.ndarray:
        """Return each unit's loss [N] for the round's expert: measured from its saved form, and kept."""
        folder = self._attempt_folder(number, attempt)
        file = folder / "losses.npy"
        if not processes.on_main(file.exists):
            if self.args.error_folds is None:
                self._score_training(folder / "training_scores", folder / "expert", np.arange(len(self._train)))
                token_losses = self._token_losses(folder / "training_scores")
            else:
                token_losses = self._losses_out_of_fold(number, attempt, self.args.error_folds)
            processes.on_main(write_array, file, self._unit_losses(token_losses))
        return map_array(file)

    def _losses_out_of_fold(self, number: int, attempt: int, count: int) -> np.ndarray:
        """Return the loss of every answer token under a model that was not trained on its answer."""
        folder = self._attempt_folder(number, attempt)
        of_row = np.random.default_rng(self.args.seed).permutation(len(self._train)) % count
        of_token = np.repeat(of_row, self._lengths)
        losses = np.empty(of_token.size, dtype=bool if self.args.errors == "hard" else np.float32)
        for fold in range(count):
            name = f"fold-{fold + 1}"
            seed = self._seeds(number, attempt)[1]
            description = f"round {number}: out of fold {fold + 1} of {count}"
            self._train_on(folder / name, number, attempt, np.flatnonzero(of_row != fold), seed, description)
            scores = folder / f"{name}-scores"
            self._score_training(scores, folder / name, np.flatnonzero(of_row == fold))
            losses[of_token == fold] = self._token_losses(scores)
        return losses

    def _score_training(self, target: Path, model: Path | None, rows: np.ndarray) -> None:
        """Leave in `target` how a saved model, or the one before fine-tuning, does on the answers in `rows`."""
        if processes.on_main(target.exists):
            return
        examples = self._train.select(rows)

        def make() -> None:
            if model is None:
                ensemble = TokenEnsemble.from_models([self._load_model(1)], [1.0])
            else:
                # "vote" would make probabilities of 0 and 1 of one expert's own.
                ensemble = self._ensemble([model], [1.0], combine="prob")
            scores = self._score(ensemble, examples, {"model": [1.0]}, "weighted error")["model"]
            processes.on_main(_keep_scores, target, scores)

        def key() -> dict[str, Any]:
            return {
                "expert": None if model is None else digest_of_files(_expert_files(model)),
                "base": self._base_computes if model is None or self._adapters else None,
                "examples": digest_examples(examples),
                # Which rows share a batch, and so a length, is in the last bits of the scores.
                "batch_size": self.args.per_device_eval_batch_size,
            }

        obtain(self.store, target, key, make)

    def _token_losses(self, scores: Path) -> np.ndarray:
        if self.args.errors == "hard":
            return map_array(scores / "token_wrong.npy")
        return np.clip(-np.expm1(read_array(scores / "token_log_probs.npy")), 0.0, 1.0)

    def _unit_losses(self, token_losses: np.ndarray) -> np.ndarray:
        boosted = token_losses if self._boosted is None else token_losses[self._boosted]
        return boosting.unit_losses(boosted, map_array(self.folder / "units.npy"))

    def _prior_error(self, weights: np.ndarray) -> float:
        pretrained = None
        if self.args.prior == "pretrained":
            scores = self.folder / "pretrained_scores"
            self._score_training(scores, None, np.arange(len(self._train)))
            measured_under = self._weights(1) if self.args.prior_weights == "initial" else weights
            error = boosting.weighted_error(measured_under, self._unit_losses(self._token_losses(scores)))
            pretrained, _ = boosting.clamp_error(error, self.num_units)
        classes = self.args.num_classes or len(self.processing_class)
        return boosting.prior_error(self.args.prior, pretrained, classes, self.args.unit)

    def _validate(self, number: int, folder: Path, expert_weight: float) -> dict[str, float] | None:
        if self._eval is None:
            return None
        earlier = self._accepted(before=number)
        weights = self._mixing([weight for _, weight in earlier] + [expert_weight])
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
        lengths = self._lengths
        if self._boosted is not None:
            lengths = np.add.reduceat(self._boosted.astype(np.int64), np.cumsum(lengths) - lengths)
        return boosting.unit_index(lengths, self.args.unit, self.args.window)

    def _boosted_tokens(self) -> np.ndarray | None:
        """Return bool [n_tokens], the answer tokens that carry a weight; None if all do."""
        if self.args.boosted_tokens == "all":
            return None
        answers = [row["input_ids"][row["prompt_length"] :] for row in self._train]
        trivial = {
            token for token in {token for answer in answers for token in answer}
            if token == self.processing_class.eos_token_id or not self.processing_class.decode([token]).strip()
        }  # fmt: skip
        informative = [np.array([token not in trivial for token in answer]) for answer in answers]
        # An answer of nothing else (white space that is to be written) keeps all its tokens.
        return np.concatenate([mask if mask.any() else np.ones_like(mask) for mask in informative])

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
            shutil.rmtree(self.folder / "pretrained_scores", ignore_errors=True)
            for chosen in self.folder.glob("mixture-of-*.json"):
                chosen.unlink()
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
            # Where validation questions only measure, a run may go on with others.
            "eval_dataset": self._digest_of_deciding_questions(),
        }

    def _digest_of_deciding_questions(self) -> str | None:
        if self.eval_questions is None or not self.args.needs_validation:
            return None
        return digest_questions(self.eval_questions)

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

    @functools.cached_property
    def _base_computes(self) -> dict[str, Any]:
        return computes(self._load_model(1))

    def _ensemble(self, folders: list[Path], expert_weights: list[float], combine: str | None = None) -> TokenEnsemble:
        combine = combine or self.args.combine
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
    saved losses of the units. It holds for hard errors and weights without a cap.

    Args:
        output_dir: of a `BoostingTrainer`.

    Returns:
        For each accepted round `round`, `identity_gap` (None where e was clamped, the identity does not hold or there
        was no update) and `sum_gap` = |sum D - 1|, of the updated weights.
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
        holds = config["errors"] == "hard" and config["weight_cap"] is None
        if holds and not record["clamped"] and record["prior_error"] is not None:
            wrong = read_array(file.parent / "losses.npy")
            factor = np.exp(config["shrinkage"] * record["expert_weight"]) * record["error"]
            gap = abs(boosting.weighted_error(after, wrong) - factor / (factor + 1 - record["error"]))
        checks.append({
            "kind": "identity", "round": number, "identity_gap": gap, "sum_gap": abs(float(after.sum()) - 1.0),
        })  # fmt: skip
    return checks


def _check_settings(args: BoostingConfig, num_models: int, peft_config: Any, eval_dataset: Dataset | None) -> None:
    if args.needs_validation and eval_dataset is None:
        name = "choose_num_experts" if args.choose_num_experts else 'mixture_weights="validation"'
        raise ValueError(f"{name} needs validation questions: pass eval_dataset")
    if args.warm_start and num_models > 1:
        raise ValueError("warm_start goes on from the expert before, so it needs one model for all rounds, not a list")
    if args.lora_ranks is not None and not hasattr(peft_config, "lora_alpha"):
        raise ValueError("lora_ranks needs a LoRA configuration: pass peft_config=LoraConfig(...)")


def _keep_scores(target: Path, scores: AnswerScores) -> None:
    with new_folder(target) as aside:
        write_array(aside / "token_wrong.npy", scores.token_wrong)
        write_array(aside / "token_log_probs.npy", scores.token_log_probs)


def _expert_files(folder: Path) -> list[Path]:
    """Return the files that make a saved expert what it is."""
    return sorted(file for file in folder.iterdir() if file.name != "cost.json")


def _spent(folder: Path) -> dict[str, float | None]:
    """Return what the models of a round took in all: the expert, and those that judged it out of fold."""
    costs = [read_json(file) for file in sorted(folder.glob("*/cost.json"))]
    return {name: total([cost[name] for cost in costs]) for name in costs[0]}
