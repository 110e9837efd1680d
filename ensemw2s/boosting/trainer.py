"""`BoostingTrainer`: the rounds of EnsemW2S (phase 1 of the method), resumable at any point."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from ensemw2s.boosting import algorithm
from ensemw2s.boosting.config import BoostingConfig
from ensemw2s.boosting.factory import ExpertFactory
from ensemw2s.boosting.units import AnswerUnits, informative_tokens
from ensemw2s.data.questions import check_disjoint, check_questions
from ensemw2s.data.tokens import QuestionFormat, check_examples, checked_format, tokenize_questions
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.inference.choices import ChoiceSettings, score_choice_mixtures
from ensemw2s.inference.measuring import measure
from ensemw2s.inference.scoring import AnswerScores
from ensemw2s.models.adapters import check_peft_config
from ensemw2s.models.identity import describe_model
from ensemw2s.models.loading import tokenizer_for
from ensemw2s.models.own_files import refuse_others, whole, withdraw
from ensemw2s.models.saved import read_settings
from ensemw2s.runtime import processes
from ensemw2s.runtime.claims import Kind, claimed, description_of
from ensemw2s.runtime.console import say
from ensemw2s.runtime.files import map_array, new_array, read_array, read_json, write_array, write_json
from ensemw2s.runtime.fingerprint import digest_questions
from ensemw2s.runtime.meter import Ledger, total
from ensemw2s.runtime.records import QUANTILE_LEVELS, IdentityRecord, RoundRecord
from ensemw2s.runtime.store import Store
from ensemw2s.training.arguments import (
    check_resume,
    check_trainer_options,
    questions_to_evaluate,
    require_arguments,
    require_eval_dataset,
)
from ensemw2s.training.checkpoints import discard_checkpoints
from ensemw2s.training.fine_tune import PRESENTATION, optimizer_described

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase


# An expert no better than the prior is trained once more with a fresh seed before boosting stops (invariant 4).
ATTEMPTS = 2
# Where an expert's soft error is smaller than this, boosting was nowhere seen to be more than a deep ensemble [choice].
LEAST_SIGNAL = 0.02
# More rounds go on from the ones there are.
_PRESENTATION = PRESENTATION | {"num_rounds"}
BOOSTING = Kind("boosting", "a boosting run", ("rounds", "pretrained_scores", "units.npy", "mixture-of-*.json"))


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
        model: folder, hub id or other source of `ensemw2s.load_model`, or a model; or a list with one for each round.
        args: see `BoostingConfig`.
        train_dataset: easy questions with answers (`ensemw2s.data.shapes.as_dataset`). Columns `input_ids` and
            `prompt_length`, if it has them, are what `tokenize_questions` made of them with this tokenizer and format;
            nothing is tokenised.
        eval_dataset: validation questions, measured after each round; None measures nothing.
        processing_class: the tokenizer; None loads the one of `model`.
        peft_config: train adapters with this configuration; None trains all weights. With a list of models the
            adapters are merged into them.
        question_format: how a question becomes tokens.
        model_init_kwargs: passed on to `ensemw2s.load_model` (`dtype`, `keep_layers`, `quantization_config`, ...).
        on_round: called with each round's record as soon as it is known, on the main process. None prints `round_line`;
            with `args.disable_tqdm` it warns, and only of a round in which something went wrong.
        store: where experts and their scores are kept for other trainers, and found if another has left them there.
        trainer_options: passed on to the `transformers.Trainer` of each expert: `callbacks` (which another run in the
            same folder must be given as well) and `optimizer_cls_and_kwargs`.

    Raises:
        TypeError: a `trainer_options` that is not passed on; says why. A `question_format` that is none.
        ValueError: bad data or settings; a `peft_config` whose adapters cannot be experts; settings that need
            validation questions without `eval_dataset`; a question in both datasets; too few models; an `output_dir`
            that belongs to another configuration.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | Sequence[str | PreTrainedModel],
        args: BoostingConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        question_format: QuestionFormat | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        on_round: Callable[[dict[str, Any]], None] | None = None,
        store: Store | None = None,
        **trainer_options: Any,
    ) -> None:
        require_arguments("BoostingTrainer", args, BoostingConfig)
        self.models: list[Any] = list(model) if isinstance(model, list | tuple) else [model]
        if len(self.models) not in (1, args.num_rounds):
            raise ValueError(
                f"model lists {len(self.models)} models for {args.num_rounds} rounds: give one, or one each"
            )
        _check_settings(args, len(self.models), peft_config, eval_dataset)
        self._options = check_trainer_options("BoostingTrainer", trainer_options, args)
        if "optimizers" in self._options:
            raise ValueError(
                "optimizers holds one optimizer of one model's weights, and every expert has weights of its own: give "
                "optimizer_cls_and_kwargs=(class, settings)"
            )
        if "callbacks" in self._options and store is not None:
            raise ValueError(
                "callbacks may change what an expert becomes, and a store keeps experts for trainers that do not have "
                "them: leave out callbacks or store"
            )
        require_eval_dataset(args, eval_dataset)
        self.args = args.for_training(adapters=peft_config is not None)
        self.peft_config = peft_config
        self.question_format = checked_format(question_format)
        self.model_init_kwargs = dict(model_init_kwargs or {})
        self.on_round = on_round or self._tell_round
        self.processing_class = tokenizer_for(self.models[0], processing_class)
        self.folder = Path(str(args.output_dir))
        self.train_questions = check_questions(train_dataset, "train_dataset")
        self.eval_questions = None if eval_dataset is None else check_questions(eval_dataset, "eval_dataset")
        if self.eval_questions is not None:
            check_disjoint({"train_dataset": self.train_questions, "eval_dataset": self.eval_questions})
        self._train = self._tokenized(self.train_questions, "train_dataset")
        self._eval = None if self.eval_questions is None else self._tokenized(self.eval_questions, "eval_dataset")
        if args.eval_strategy != "no":
            self._options["eval_dataset"] = self._eval
        self._factory = ExpertFactory(
            self.models,
            self.args,
            processing_class=self.processing_class,
            peft_config=peft_config,
            model_init_kwargs=self.model_init_kwargs,
            store=store,
            trainer_options=self._options,
        )
        informative = args.boosted_tokens == "informative"
        boosted = informative_tokens(self._train, self.processing_class) if informative else None
        self._units = AnswerUnits(self._train, boosted, args.unit, args.window)
        if args.error_folds is not None and args.error_folds > len(self._train):
            raise ValueError(
                f"error_folds={args.error_folds} leaves folds without an answer: train_dataset has {len(self._train)} "
                "questions, give at most as many folds"
            )
        self.num_units = int(self._units.index()[-1]) + 1

    @property
    def records(self) -> list[dict[str, Any]]:
        """Return one record per finished attempt of every round, in order."""
        attempts = itertools.product(range(1, self.args.num_rounds + 1), range(1, ATTEMPTS + 1))
        files = (self._attempt_folder(number, attempt) / "record.json" for number, attempt in attempts)
        return [read_json(file) for file in files if file.exists()]

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

    def train(
        self, save_to: str | os.PathLike[str] | None = None, *, resume_from_checkpoint: bool | None = None
    ) -> TokenEnsemble:
        """Run or continue the rounds, save the ensemble of the accepted experts, and return it.

        It is saved with tokenizer and `record()` in the folder `save_to`; None is `ensemble` in `args.output_dir`.
        An ensemble that an earlier call has saved there is replaced, with a warning if it has more experts. So it is
        with fewer `num_rounds` than before: further rounds stay in `args.output_dir`, and a call with as many rounds as
        then finds them there and saves the larger ensemble again.

        `resume_from_checkpoint=True` says what happens anyway: what an interrupted call left is gone on with.

        Raises:
            FileExistsError: another model is where the ensemble would be saved; nothing is trained.
            InUseError: another process trains in `args.output_dir`.
            RuntimeError: no expert beat the prior, not even in round 1.
            ValueError: `args.output_dir` belongs to another configuration, holds files that are not ours where ours
                would be, or ones of ours that are damaged; or `resume_from_checkpoint` is False or a folder.
        """
        check_resume(resume_from_checkpoint)
        remedy = "pass overwrite=True to delete that run"
        with claimed(self.folder, BOOSTING, self.fingerprint(), overwrite=self.args.overwrite, remedy=remedy):
            place = save_to or self.folder / "ensemble"
            processes.on_main(refuse_others, place, "ensemble")
            if not processes.on_main((self.folder / "rounds").exists):
                # That of a run that was overwritten would be taken for this one's.
                processes.on_main(withdraw, self.folder / "ensemble", "ensemble")
            self._begin()
            for number in range(1, self.args.num_rounds + 1):
                if not self._round(number):
                    break
            # Those of a process that was killed when the last expert was just saved.
            processes.on_main(discard_checkpoints, self.folder)
            if not self._accepted():
                raise RuntimeError(
                    f"no expert beats the pre-trained model: {self.stop_reason}. Train longer or with another learning "
                    f"rate (now {self.args.duration} at {self.args.learning_rate:g})"
                )
            if self.stop_reason and self.on_round == self._tell_round:
                warnings.warn(f"{self.stop_reason}. The ensemble has {len(self._members())} experts", stacklevel=2)
            ensemble = self._ensemble()
            if shrinks := processes.on_main(self._shrinks, Path(place), ensemble.num_experts):
                warnings.warn(shrinks, stacklevel=2)
            saved_with = {"processing_class": self.processing_class, "record": self.record()}
            processes.on_main(ensemble.save_pretrained, place, **saved_with)
            return ensemble

    def _shrinks(self, place: Path, count: int) -> str | None:
        """Say that the ensemble saved in `place` has more experts than the `count` of the one to be saved; or None."""
        if not refuse_others(place, "ensemble"):
            return None
        try:
            before = len(read_settings(whole(place.expanduser()) / "config.json", "the ensemble")["expert_weights"])
        except (OSError, ValueError, KeyError, TypeError):
            # One that is damaged is replaced as any other.
            return None
        if before <= count:
            return None
        last = max(int(file.parts[-3]) for file in self.folder.glob("rounds/*/attempt-*/record.json"))
        kept = (
            f". Rounds {self.args.num_rounds + 1} to {last} stay in {self.folder / 'rounds'}: train() with "
            f"num_rounds={last} finds them there and saves all of them again"
        )
        return (
            f"the ensemble of {before} experts in {place} is replaced by one of {count}"
            f"{kept if last > self.args.num_rounds else ''}"
        )

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Return `eval_accuracy`, `eval_token_error` and `eval_loss` of the trained ensemble; see
        `ensemw2s.inference.measuring.measure`.

        Args:
            eval_dataset: questions with answers; None takes the `eval_dataset` that the trainer was given.

        Raises:
            RuntimeError: there is no trained ensemble yet.
            ValueError: no questions, or questions that `check_questions` refuses.
        """
        if not self._accepted():
            raise RuntimeError("there is no ensemble to evaluate yet: call train() first")
        questions = questions_to_evaluate(eval_dataset, self.eval_questions)
        batch_size = self.args.per_device_eval_batch_size
        return measure(self._ensemble(), questions, self.processing_class, self.question_format, batch_size)

    def _ensemble(self) -> TokenEnsemble:
        ensemble = self._factory.ensemble(self.expert_folders(), self.mixture()["expert_weights"])
        ensemble.question_format = self.question_format
        return ensemble

    def token_weights(self, number: int) -> list[np.ndarray]:
        """Return the weights that round `number` begins with, of the tokens of each training answer.

        Args:
            number: 1 gives the equal weights of the first round; one more than the number of a finished round gives the
                weights that it left.

        Returns:
            For each row of `train_dataset` the float32 weights of its answer tokens, in order, the end token included:
            `N * D`, whose mean over the N units is 1. Recipes that draw their tokens draw them by these. Tokens without
            a weight of their own (`boosted_tokens`) have 1.

        Raises:
            ValueError: no round has left such weights yet.
        """
        file = self._round_folder(number) / "weights.npy"
        if not file.exists():
            count = len(list(self.folder.glob("rounds/*/weights.npy")))
            remedy = f"give a number from 1 to {count}" if count else "call train() first"
            raise ValueError(f"number={number}: {self.folder} has no weights of that round, {remedy}")
        return self._units.token_weights(map_array(file) * self.num_units, map_array(self.folder / "units.npy"))

    def expert_folders(self) -> list[Path]:
        """Return where the experts of the ensemble are saved, in their order."""
        return [folder for folder, _ in self._members()][: self.mixture()["num_experts"]]

    def mixture(self) -> dict[str, Any]:
        """Return how many of the accepted experts the ensemble has, and their weights.

        Returns:
            `num_experts`, `expert_weights` (as many), and `log_likelihoods`: where validation questions decided, the
            mean log-probability (nats) of a validation token under the mixture of the first 1, 2, ... experts.
        """
        expert_weights = self._mixing([weight for _, weight in self._members()])
        count = len(expert_weights)
        record = {"kind": "mixture", "num_experts": count, "expert_weights": expert_weights, "log_likelihoods": None}
        if self.args.mixture_weights != "validation" and not self.args.choose_num_experts:
            return record
        file = self.folder / f"mixture-of-{count}.json"
        if not processes.on_main(file.exists):
            decide = self._fitted if self.args.mixture_weights == "validation" else self._chosen
            decided = decide(expert_weights)
            processes.on_main(write_json, file, record | decided)
        return dict(processes.on_main(read_json, file))

    def _mixing(self, expert_weights: list[float]) -> list[float]:
        return [1.0] * len(expert_weights) if self.args.mixture_weights == "uniform" else expert_weights

    def _fitted(self, expert_weights: list[float]) -> dict[str, Any]:
        count = len(expert_weights)
        scores = self._score_validation({str(t): [float(s == t) for s in range(count)] for t in range(count)})
        fitted = algorithm.fit_mixture_weights([scores[str(t)].token_log_probs for t in range(count)])
        return {"expert_weights": fitted.tolist()}

    def _chosen(self, expert_weights: list[float]) -> dict[str, Any]:
        count = len(expert_weights)
        scores = self._score_validation({str(t): expert_weights[:t] + [0.0] * (count - t) for t in range(1, count + 1)})
        reached = [float(scores[str(t)].token_log_probs.mean()) for t in range(1, count + 1)]
        best = int(np.argmax(reached)) + 1
        return {"num_experts": best, "expert_weights": expert_weights[:best], "log_likelihoods": reached}

    def record(self) -> dict[str, Any]:
        """Return the run's account, to be saved with the ensemble: settings, records, why it stopped."""
        names = ("recipe", "sampling", "errors", "shrinkage", "uniform_mix", "effective_sample_size_floor",
                 "warm_start", "mixture_weights", "unit", "combine", "seed")  # fmt: skip
        settings = {name: getattr(self.args, name) for name in names}
        return {**settings, "rounds": self.records, "stop_reason": self.stop_reason}

    def _round(self, number: int) -> bool:
        """Train the round's expert and return whether another round follows."""
        for attempt in range(1, ATTEMPTS + 1):
            folder = self._attempt_folder(number, attempt)
            file = folder / "record.json"
            if not processes.on_main(self._is_done, number, file):
                with Ledger(folder / "costs.jsonl").running() as costs:
                    judged = self._judged(number, attempt)
                    record = RoundRecord(**judged, seconds=processes.on_main(costs.total)["seconds"]).to_json()
                processes.on_main(self._keep_record, file, record)
            record = processes.on_main(read_json, file)
            if record["accepted"]:
                return not self._is_spent(record)
        return False

    def _is_done(self, number: int, record: Path) -> bool:
        """Say whether an attempt is finished and nothing that it led to was deleted."""
        if not record.exists() or not read_json(record)["accepted"]:
            return record.exists()
        judged = record.with_name("expert").exists() and record.with_name("losses.npy").exists()
        return judged and (self._round_folder(number + 1) / "weights.npy").exists()

    def _is_spent(self, record: Mapping[str, Any]) -> bool:
        return bool(record["effective_sample_size"] < self.args.min_effective_sample_size * self.num_units)

    def _keep_record(self, file: Path, record: dict[str, Any]) -> None:
        write_json(file, record)
        self.on_round(record)

    def _judged(self, number: int, attempt: int) -> dict[str, Any]:
        """Train the expert of an attempt and return the fields of its record, but for the time it took."""
        folder = self._attempt_folder(number, attempt)
        unit_weights = self._unit_weights(number)
        everything = np.arange(len(self._train))
        self._train_on(folder / "expert", number, attempt, everything, f"round {number}: training expert")
        losses = self._losses(number, attempt)
        error, clamped = algorithm.clamp_error(algorithm.weighted_error(unit_weights, losses), self.num_units)
        # The baselines have equal votes and no update: an error under uniform weights decides nothing.
        prior_error = None if self.args.is_baseline else self._prior_error(unit_weights)
        expert_weight = 1.0 if prior_error is None else algorithm.expert_weight(error, prior_error)
        accepted = expert_weight > 0
        update = expert_weight if accepted and prior_error is not None else None
        blamed = losses if update is None else self._blamed(number, folder, losses)
        spread = processes.on_main(self._next_weights, number, blamed, update, accepted)
        validate = accepted and self.args.validate_rounds and self._eval is not None
        return {
            "round": number, "attempt": attempt, "error": error, "prior_error": prior_error,
            "expert_weight": expert_weight, "clamped": clamped, "accepted": accepted,
            "num_units": self.num_units, **spread, "num_processes": processes.count(),
            "validation": self._validate(number, folder, expert_weight) if validate else None,
            "chain": self._chain(number),
            **{f"train_{name}": value for name, value in _spent(folder).items()},
        }  # fmt: skip

    def _next_weights(self, number: int, losses: np.ndarray, update: float | None, keep: bool) -> dict[str, Any]:
        """Update the weights by `update` (None leaves them), keep them for the next round, and say how they spread."""
        following, step = self._unit_weights(number), None
        if keep:
            with new_array(self._round_folder(number + 1) / "weights.npy", self.num_units) as updated:
                if update is None:
                    updated[:] = following
                else:
                    step = self._update(following, losses, update, updated)
            following = self._unit_weights(number + 1)
        quantiles = algorithm.weight_quantiles(following, QUANTILE_LEVELS)
        return {
            "shrinkage": step,
            "effective_sample_size": algorithm.effective_sample_size(following),
            "weight_quantiles": {str(q): float(v) for q, v in zip(QUANTILE_LEVELS, quantiles, strict=True)},
        }

    def _update(self, unit_weights: np.ndarray, losses: np.ndarray, expert_weight: float, out: np.ndarray) -> float:
        """Put the unit weights of the next round in `out`, and return the shrinkage, which a floor may lower."""
        args, step = self.args, self.args.shrinkage
        if args.effective_sample_size_floor > 0:
            floor = args.effective_sample_size_floor
            step = algorithm.tempered_shrinkage(unit_weights, losses, expert_weight, floor, step)
        if step > 0:
            algorithm.update_weights(unit_weights, losses, expert_weight, step, out=out)
        else:
            out[:] = unit_weights
        if args.weight_cap is not None:
            algorithm.cap_weights(out, args.weight_cap, out=out)
        return step

    def _train_on(self, folder: Path, number: int, attempt: int, rows: np.ndarray, description: str) -> None:
        """Train a model on the answers in `rows` with the round's weights, and leave it in `folder`."""
        if self._factory.is_made(folder):
            return
        token_weights = self._token_weights(number, attempt)
        # A sentence of which no token was drawn has no loss.
        kept = [int(row) for row in rows if token_weights[row].any()]
        chosen, examples = [token_weights[row] for row in kept], self._train.select(kept)
        seed, start = self._seeds(number, attempt)[1], self._warm_start(number, folder.name)
        self._factory.train(folder, number, examples, chosen, seed=seed, description=description, start=start)

    def _warm_start(self, number: int, name: str) -> Path | None:
        """Return the model called `name` of the round before, if this round's goes on from it."""
        earlier = self._accepted_records(before=number)
        if not earlier or not self.args.warm_start or self._chain(number) != earlier[-1].get("chain", 0):
            return None
        return self._expert_folder(earlier[-1]).with_name(name)

    def _chain(self, number: int) -> int:
        """Return of which chain the expert of a round is; 0 where there is one chain, or none."""
        if self.args.chain_gain is None:
            return 0
        earlier = self._accepted_records(before=number)
        if not earlier:
            return 1
        chain = int(earlier[-1]["chain"])
        if len(earlier) == 1 or earlier[-2]["chain"] != chain:
            # One expert alone has not yet shown what its chain gains.
            return chain
        before, last = map(self._validation_loss, earlier[-2:])
        return chain + (last > (1 - self.args.chain_gain) * before)

    def _validation_loss(self, record: Mapping[str, Any]) -> float:
        """Return the mean negative log-likelihood of a validation token under an accepted expert (nats)."""
        expert = self._expert_folder(record)
        scores = expert.with_name("validation_scores")
        self._factory.score_alone(scores, expert, self._eval)
        return -float(read_array(scores / "token_log_probs.npy").mean())

    def _expert_folder(self, record: Mapping[str, Any]) -> Path:
        return self._attempt_folder(record["round"], record["attempt"]) / "expert"

    def _seeds(self, number: int, attempt: int) -> tuple[int, int]:
        """Return the seeds of the round's draws and of its training."""
        draw, training = np.random.SeedSequence(self.args.seed, spawn_key=(number, attempt)).generate_state(2)
        if not self.args.vary_seed:
            training = np.random.SeedSequence(self.args.seed, spawn_key=(1, attempt)).generate_state(2)[1]
        return int(draw), int(training)

    def _token_weights(self, number: int, attempt: int) -> list[np.ndarray]:
        """Return the weight of each answer's tokens in the round's loss, float32: views of one array."""
        drawn = self._attempt_folder(number, attempt) / "loss_weights.npy"
        processes.on_main(self._keep_loss_weights, drawn, self._unit_weights(number), self._seeds(number, attempt)[0])
        token_weights = self._units.token_weights(map_array(drawn), map_array(self.folder / "units.npy"))
        # Once every process has its own copy; they can be drawn again.
        processes.start().wait_for_everyone()
        processes.on_main(drawn.unlink)
        return token_weights

    def _keep_loss_weights(self, file: Path, unit_weights: np.ndarray, seed: int) -> None:
        generator = np.random.default_rng(seed)
        with new_array(file, self.num_units) as out:
            algorithm.loss_weights(unit_weights, generator=generator, out=out, **self.args.loss_settings)

    def _losses(self, number: int, attempt: int) -> np.ndarray:
        """Return each unit's loss [N] for the round's expert: measured from its saved form, and kept."""
        folder = self._attempt_folder(number, attempt)
        file = folder / "losses.npy"
        if not processes.on_main(file.exists):
            if self.args.error_folds is None:
                self._factory.score_alone(folder / "training_scores", folder / "expert", self._train)
                token_losses = self._token_losses(folder / "training_scores")
            else:
                token_losses = self._losses_out_of_fold(number, attempt, self.args.error_folds)
            processes.on_main(write_array, file, self._unit_losses(token_losses))
        return map_array(file)

    def _losses_out_of_fold(self, number: int, attempt: int, count: int) -> np.ndarray:
        """Return the loss of every answer token under a model that was not trained on its answer."""
        folder = self._attempt_folder(number, attempt)
        of_row = np.random.default_rng(self.args.seed).permutation(len(self._train)) % count
        of_token = np.repeat(of_row, self._units.lengths)
        losses = np.empty(of_token.size, dtype=bool if self.args.errors == "hard" else np.float32)
        for fold in range(count):
            name = f"fold-{fold + 1}"
            description = f"round {number}: out of fold {fold + 1} of {count}"
            self._train_on(folder / name, number, attempt, np.flatnonzero(of_row != fold), description)
            scores = folder / f"{name}-scores"
            self._factory.score_alone(scores, folder / name, self._train.select(np.flatnonzero(of_row == fold)))
            losses[of_token == fold] = self._token_losses(scores)
        return losses

    def _token_losses(self, scores: Path) -> np.ndarray:
        if self.args.errors == "hard":
            return map_array(scores / "token_wrong.npy")
        return np.clip(-np.expm1(read_array(scores / "token_log_probs.npy")), 0.0, 1.0)

    def _unit_losses(self, token_losses: np.ndarray) -> np.ndarray:
        return self._units.losses(token_losses, map_array(self.folder / "units.npy"))

    def _prior_error(self, unit_weights: np.ndarray) -> float:
        pretrained = None
        if self.args.prior == "pretrained":
            scores = self.folder / "pretrained_scores"
            self._factory.score_alone(scores, None, self._train)
            measured_under = self._initial_weights() if self.args.prior_weights == "initial" else unit_weights
            error = algorithm.weighted_error(measured_under, self._unit_losses(self._token_losses(scores)))
            pretrained, _ = algorithm.clamp_error(error, self.num_units)
        classes = self.args.num_classes or len(self.processing_class)
        return algorithm.prior_error(self.args.prior, pretrained, classes, self.args.unit)

    def _validate(self, number: int, folder: Path, expert_weight: float) -> dict[str, float]:
        earlier = self._members(before=number)
        expert_weights = self._mixing([weight for _, weight in earlier] + [expert_weight])
        mixtures = {"expert": [0.0] * len(earlier) + [1.0], "ensemble": expert_weights}
        folders = [path for path, _ in earlier] + [folder / "expert"]
        ensemble = self._factory.ensemble(folders, [1.0] * len(folders))
        scores = self._factory.score(ensemble, self._eval, mixtures, "validation")
        questions = self.eval_questions
        if questions is not None and "choices" in questions.column_names:
            settings = ChoiceSettings(self.question_format, batch_size=self.args.per_device_eval_batch_size)
            chosen = score_choice_mixtures(ensemble, questions, self.processing_class, mixtures, settings)
            scores = {name: replace(scores[name], chosen_right=chosen[name].correct) for name in mixtures}
        accuracies = {name: scores[name].accuracy for name in mixtures}
        return {**accuracies, "token_error": scores["ensemble"].token_error}

    def _score_validation(self, mixtures: Mapping[str, Sequence[float]]) -> dict[str, AnswerScores]:
        """Score mixtures of all accepted experts on the answers to the validation questions."""
        folders = [folder for folder, _ in self._members()]
        ensemble = self._factory.ensemble(folders, [1.0] * len(folders))
        return self._factory.score(ensemble, self._eval, mixtures, "validation")

    def _round_folder(self, number: int) -> Path:
        return self.folder / "rounds" / str(number)

    def _attempt_folder(self, number: int, attempt: int) -> Path:
        return self._round_folder(number) / f"attempt-{attempt}"

    def _unit_weights(self, number: int) -> np.ndarray:
        """Return float64 [N], mapped from the file that the round before wrote."""
        return map_array(self._round_folder(number) / "weights.npy")

    def _accepted_records(self, before: int | None = None) -> list[dict[str, Any]]:
        return [r for r in self.records if r["accepted"] and (before is None or r["round"] < before)]

    def _accepted(self, before: int | None = None) -> list[tuple[Path, float]]:
        """Return folder and weight of each accepted expert (of the rounds before `before`)."""
        return [(self._expert_folder(r), r["expert_weight"]) for r in self._accepted_records(before)]

    def _members(self, before: int | None = None) -> list[tuple[Path, float]]:
        """Return folder and weight of the accepted experts that the ensemble has, as `_accepted`; of chains the ends.

        With `before`, those beside which the expert of that round would stand.
        """
        records = self._accepted_records(before)
        if before is not None and (chain := self._chain(before)):
            records = [r for r in records if r["chain"] != chain]
        ends = {r.get("chain") or -r["round"]: r for r in records}.values()
        return [(self._expert_folder(r), r["expert_weight"]) for r in ends]

    def _begin(self) -> None:
        """Leave the units and the weights of the first round."""
        processes.on_main(self._keep_units)
        first = self._round_folder(1) / "weights.npy"
        if not processes.on_main(first.exists):
            processes.on_main(self._keep_first_weights, first, self._first_losses())

    def _keep_units(self) -> None:
        units = self.folder / "units.npy"
        if not units.exists():
            write_array(units, self._units.index())

    def _keep_first_weights(self, file: Path, blamed: tuple[np.ndarray, float] | None) -> None:
        with new_array(file, self.num_units) as out:
            algorithm.initial_weights(self.num_units, out=out)
            if blamed is not None:
                self._update(out.copy(), *blamed, out)

    # What a trainer that knows of experts from before replaces

    def _initial_weights(self) -> np.ndarray:
        """Return the weights [N] under which the model before fine-tuning is measured."""
        return self._unit_weights(1)

    def _first_losses(self) -> tuple[np.ndarray, float] | None:
        """Return the units' losses [N] that decide the weights of the first round, and the update; None for uniform."""
        return None

    def _blamed(self, number: int, folder: Path, losses: np.ndarray) -> np.ndarray:
        """Return the losses [N] that the weights follow after a round, whose expert in `folder` has `losses`."""
        return losses

    def _tokenized(self, questions: Dataset, name: str) -> Dataset:
        columns = ["id", "input_ids", "prompt_length"]
        if not set(columns) <= set(questions.column_names):
            return tokenize_questions(questions, self.processing_class, self.question_format, name)
        return check_examples(questions, name).select_columns(columns)

    def fingerprint(self) -> dict[str, Any]:
        """Return what the experts depend on, in values that JSON or `fingerprint.plain` knows."""
        args = {name: value for name, value in self.args.to_dict().items() if name not in _PRESENTATION | {"overwrite"}}
        # Where validation questions only measure, a run may go on with others.
        deciding = self.eval_questions if self.args.needs_validation or "eval_dataset" in self._options else None
        return {
            **args,
            "model": [describe_model(model) for model in self.models],
            "model_init_kwargs": self.model_init_kwargs,
            "peft_config": None if self.peft_config is None else self.peft_config.to_dict(),
            "question_format": self.question_format.describe(),
            "train_dataset": digest_questions(self.train_questions),
            "eval_dataset": None if deciding is None else digest_questions(deciding),
            "optimizer": optimizer_described(self._options),
        }

    def _tell_round(self, record: Mapping[str, Any]) -> None:
        if not self.args.disable_tqdm:
            say(round_line(record, self.args))
        elif not record["accepted"] or _nothing_is_right(record) or _has_no_signal(record, self.args):
            # Who wants no lines still wants to know what went wrong.
            warnings.warn(round_line(record, self.args), stacklevel=2)


def round_line(record: Mapping[str, Any], args: BoostingConfig) -> str:
    """Return one line on a round's record, for a reader: error, expert weight, effective sample size, accuracies."""
    share = record["effective_sample_size"] / record["num_units"]
    prior = "" if record["prior_error"] is None else f" (before training {record['prior_error']:.3f})"
    generation = f"generation {record['generation']}, " if record.get("generation") else ""
    line = (
        f"{generation}round {record['round']}/{args.num_rounds}: {args.errors} ε {record['error']:.3f}{prior}, "
        f"α {record['expert_weight']:.2f}, "
        f"effective sample size {record['effective_sample_size']:.0f} of {record['num_units']} ({share:.0%})"
    )
    if record["validation"]:
        values = record["validation"]
        line += f"; validation: expert {values['expert']:.1%}, ensemble {values['ensemble']:.1%}"
        if _nothing_is_right(record):
            line += (
                f" (no question is answered right; {values['token_error']:.0%} of the answers' tokens are wrong. If no "
                f"later round changes that, train longer than {args.duration}, or with a higher learning rate than "
                f"{args.learning_rate:g})"
            )
    if _has_no_signal(record, args):
        line += (
            f"; hardly an error to boost on (below {LEAST_SIGNAL:.0%}): token weights will not move, and the ensemble "
            "is in effect a deep ensemble. Give more or harder questions, or train for less, if it is to be more"
        )
    if not record["accepted"]:
        line += f"; not added (attempt {record['attempt']}): no better than before training"
    return line


def _has_no_signal(record: Mapping[str, Any], args: BoostingConfig) -> bool:
    """Say whether the first expert gets nearly everything right that later ones should be weighted by."""
    is_followed = record["round"] == 1 and record["accepted"] and args.num_rounds > 1 and not args.is_baseline
    return bool(is_followed and args.errors == "soft" and record["error"] < LEAST_SIGNAL)


def _nothing_is_right(record: Mapping[str, Any]) -> bool:
    """Say whether no validation question was answered right after a round that measured them."""
    values = record["validation"]
    return bool(values) and values["expert"] == values["ensemble"] == 0


def closing_identity(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Check a finished run's own files: unit weights that sum to 1, and the closing identity (method, invariant 2).

    That is what `ensemw2s.boosting.algorithm.update_weights` says of the weighted error of the expert just added. It is
    recomputed here from the saved weights and losses of the units. It holds for hard errors and weights without a cap.

    Args:
        output_dir: of a `BoostingTrainer`.

    Returns:
        For each accepted round `round`, `identity_gap` (None where e was clamped, the identity does not hold or there
        was no update) and `sum_gap` = |sum D - 1|, of the updated weights.
    """
    folder = Path(output_dir)
    config = description_of(folder, BOOSTING)
    if config is None:
        raise FileNotFoundError(f"{folder} holds no boosting run: give the output_dir of a BoostingTrainer")
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
            factor = np.exp(record["shrinkage"] * record["expert_weight"]) * record["error"]
            gap = abs(algorithm.weighted_error(after, wrong) - factor / (factor + 1 - record["error"]))
        sum_gap = abs(float(after.sum()) - 1.0)
        checks.append(IdentityRecord(round=number, identity_gap=gap, sum_gap=sum_gap).to_json())
    return checks


def _check_settings(args: BoostingConfig, num_models: int, peft_config: Any, eval_dataset: Dataset | None) -> None:
    if args.recipe == "co_boosted":
        raise ValueError(
            'recipe="co_boosted" needs unlabelled questions and a strong model: use CoBoostingTrainer, which takes '
            'them, or another recipe, such as "tempered"'
        )
    if peft_config is not None:
        check_peft_config(peft_config, "peft_config", merged=num_models > 1)
    if args.needs_validation and eval_dataset is None:
        name = 'mixture_weights="validation"' if args.mixture_weights == "validation" else "choose_num_experts"
        name = name if args.chain_gain is None else f"chain_gain={args.chain_gain:g}"
        raise ValueError(
            f"{name} needs validation questions: pass eval_dataset, or choose settings that need none, such as "
            'recipe="tempered"'
        )
    if args.warm_start and num_models > 1:
        raise ValueError(
            "warm_start (which the recipes chained and branched set) goes on from the expert before, so it needs one "
            "model for all rounds, not a list: pass one, or set warm_start to false"
        )
    if args.lora_ranks is not None and not hasattr(peft_config, "lora_alpha"):
        raise ValueError("lora_ranks needs a LoRA configuration: pass peft_config=LoraConfig(...)")


def _spent(folder: Path) -> dict[str, float | None]:
    """Return what the models of a round took in all: the expert, and those that judged it out of fold."""
    costs = [read_json(file) for file in sorted(folder.glob("*/cost.json"))]
    return {name: total([cost[name] for cost in costs]) for name in costs[0]}
