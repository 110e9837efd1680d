"""The experts of one boosting run as folders: trained into them, loaded from them, scored on answers."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from ensemw2s.boosting.tail import PolynomialTailTrainer
from ensemw2s.ensemble.model import TokenEnsemble
from ensemw2s.inference.decoding import require_tokenizer
from ensemw2s.inference.scoring import AnswerScores, score_mixtures
from ensemw2s.models.adapters import attach_adapter
from ensemw2s.models.base_reference import reference_to
from ensemw2s.models.identity import computes
from ensemw2s.models.loading import load_model, load_saved_model
from ensemw2s.runtime import processes
from ensemw2s.runtime.accounts import check
from ensemw2s.runtime.console import no_model_bars
from ensemw2s.runtime.files import digest_of_files, new_folder, write_array, write_json
from ensemw2s.runtime.fingerprint import digest_examples
from ensemw2s.runtime.store import Store
from ensemw2s.training.checkpoints import discard_checkpoints
from ensemw2s.training.fine_tune import TrainingCost, fine_tune, optimizer_described, training_settings
from ensemw2s.training.trainer import AnswerTrainer, on_device

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.boosting.config import BoostingConfig


@dataclass
class ExpertFactory:
    """Makes experts and judges them; every folder is made whole, once, or found in the store.

    Attributes:
        models: the pre-trained model (a source of `ensemw2s.load_model`, or a model) of all rounds, or one for each.
        args: how experts are trained, in which batches they are scored and how they are combined.
        processing_class: the tokenizer, whose end token fills short rows.
        peft_config: train adapters with it; with several models they are merged into them. None trains all weights.
        model_init_kwargs: passed on to `ensemw2s.load_model`.
        store: where results are kept for other runs; None keeps none.
        trainer_options: passed on to `fine_tune`.
    """

    models: Sequence[Any]
    args: BoostingConfig
    processing_class: PreTrainedTokenizerBase
    peft_config: PeftConfig | None
    model_init_kwargs: Mapping[str, Any]
    store: Store | None
    trainer_options: Mapping[str, Any]

    def __post_init__(self) -> None:
        for model in self.models:
            if isinstance(model, PreTrainedModel):
                self._check_tokenizer(model)

    def _check_tokenizer(self, model: Any) -> None:
        require_tokenizer(self.processing_class, model.config.get_text_config(decoder=True).vocab_size)

    @property
    def makes_adapters(self) -> bool:
        """Whether experts are adapters on one base, and not whole models."""
        return self.peft_config is not None and len(self.models) == 1

    def is_made(self, folder: Path) -> bool:
        """Say whether a folder is there already; every process must call this."""
        there = processes.on_main(folder.exists)
        if there and self.store is not None:
            self.store.fulfil(folder)
        return there

    def _obtain(self, target: Path, key: Callable[[], dict[str, Any]], make: Callable[[], None]) -> None:
        """Find what belongs to a key in the store, or make it."""
        if self.store is None:
            make()
        else:
            self.store.obtain(target, key(), make)

    def train(
        self,
        folder: Path,
        number: int,
        examples: Dataset,
        token_weights: list[np.ndarray],
        *,
        seed: int,
        description: str,
        start: Path | None = None,
    ) -> None:
        """Train an expert of round `number` and leave it in `folder` with its cost.

        Args:
            folder: where it shall be (see `is_made`).
            number: the round, from 1.
            examples: columns `input_ids` and `prompt_length`.
            token_weights: the weight in the loss of each example's answer tokens.
            seed: see `ensemw2s.training.fine_tune.fine_tune`.
            description: shown beside the progress bar.
            start: the folder of an expert to go on from; None starts from the pre-trained model.
        """
        peft_config = self._peft_config(number)
        model = self._load(number) if start is None else self._load_expert(start)
        evaluated = self.trainer_options.get("eval_dataset")
        new_adapter = None if hasattr(model, "peft_config") else peft_config

        def make() -> None:
            trained, cost = fine_tune(
                model,
                examples,
                self.args,
                pad_token_id=self.processing_class.eos_token_id,
                seed=seed,
                description=description,
                token_weights=token_weights,
                peft_config=new_adapter,
                trainer_class=PolynomialTailTrainer if self.args.loss_tail else AnswerTrainer,
                **self.trainer_options,
            )
            if peft_config is not None and not self.makes_adapters:
                trained = trained.merge_and_unload()
            processes.on_main(self._keep, folder, trained, cost)

        def key() -> dict[str, Any]:
            # Experts from before there was such a loss are those without it.
            loss = {"loss_tail": self.args.loss_tail} if self.args.loss_tail else {}
            return {
                **loss,
                # A batch is as many rows as the processes have together.
                "training": training_settings(self.args) | {"seed": seed, "num_processes": processes.count()},
                "model": computes(model),
                "peft_config": None if peft_config is None else peft_config.to_dict(),
                "saved_as": "adapter" if self.makes_adapters else "model",
                "examples": digest_examples(examples),
                "eval_dataset": None if evaluated is None else digest_examples(evaluated),
                "optimizer": optimizer_described(self.trainer_options),
                "token_weights": hashlib.blake2b(np.concatenate(token_weights).tobytes()).hexdigest(),
            }

        self._obtain(folder, key, make)

    def _peft_config(self, number: int) -> Any:
        if self.args.lora_ranks is None:
            return self.peft_config
        config: Any = copy.deepcopy(self.peft_config)
        rank = self.args.lora_ranks[number - 1]
        config.lora_alpha, config.r = config.lora_alpha * rank / config.r, rank
        return config

    def _keep(self, folder: Path, trained: Any, cost: TrainingCost) -> None:
        with new_folder(folder) as aside, no_model_bars():
            trained.save_pretrained(aside)
            write_json(aside / "cost.json", asdict(cost))
        discard_checkpoints(self.args.output_dir)

    def _load(self, number: int) -> Any:
        """Return the pre-trained model of a round, to be changed at will."""
        model = self.models[0] if len(self.models) == 1 else self.models[number - 1]
        if isinstance(model, PreTrainedModel):
            return copy.deepcopy(model)
        loaded = load_model(model, **self.model_init_kwargs)
        self._check_tokenizer(loaded)
        return on_device(loaded, self.args)

    def _load_saved(self, folder: Path, owner: str) -> Any:
        """Return a whole model that was trained here, in the dtype in which it was."""
        return on_device(load_saved_model(folder, owner, dtype="auto"), self.args)

    def _load_expert(self, folder: Path) -> Any:
        """Return a saved expert, to be trained further."""
        check(folder)
        if not self.makes_adapters:
            return self._load_saved(folder, "the expert to go on from")
        return attach_adapter(self._load(1), folder, "the expert to go on from", trainable=True)

    def ensemble(
        self, folders: Sequence[Path], expert_weights: Sequence[float], combine: str | None = None
    ) -> TokenEnsemble:
        """Return the ensemble of saved experts; `combine` is that of the run unless it is given."""
        combine = combine or self.args.combine
        for folder in folders:
            check(folder)
        if not self.makes_adapters:
            models = [self._load_saved(folder, f"expert {number}") for number, folder in enumerate(folders, 1)]
            return TokenEnsemble.from_models(models, expert_weights, combine=combine)
        source = self.models[0]
        reference = None if isinstance(source, PreTrainedModel) else reference_to(source, self.model_init_kwargs)
        return TokenEnsemble.from_adapters(
            self._load(1), folders, expert_weights, combine=combine, base_reference=reference
        )

    def score(
        self, ensemble: TokenEnsemble, examples: Dataset, mixtures: Mapping[str, Sequence[float]], description: str
    ) -> dict[str, AnswerScores]:
        """Score answers under several mixtures of an ensemble's experts; see `score_mixtures`."""
        return score_mixtures(
            ensemble,
            examples,
            mixtures,
            pad_token_id=self.processing_class.eos_token_id,
            batch_size=self.args.per_device_eval_batch_size,
            description=None if self.args.disable_tqdm else description,
        )

    def score_alone(self, target: Path, expert: Path | None, examples: Dataset) -> None:
        """Leave in the folder `target` how a saved expert, or the model before fine-tuning (None), does on answers.

        `token_wrong.npy` and `token_log_probs.npy` are those of `ensemw2s.inference.scoring.AnswerScores`.
        """
        if self.is_made(target):
            return

        def make() -> None:
            if expert is None:
                ensemble = TokenEnsemble.from_models([self._load(1)], [1.0])
            else:
                # "vote" would make probabilities of 0 and 1 of one expert's own.
                ensemble = self.ensemble([expert], [1.0], combine="prob")
            scores = self.score(ensemble, examples, {"model": [1.0]}, "weighted error")["model"]
            processes.on_main(_keep_scores, target, scores)

        def key() -> dict[str, Any]:
            files = [] if expert is None else sorted(f for f in expert.iterdir() if f.name != "cost.json")
            return {
                "expert": None if expert is None else digest_of_files(files),
                "base": self._base if expert is None or self.makes_adapters else None,
                "examples": digest_examples(examples),
                # Which rows share a batch, and so a length, is in the last bits of the scores.
                "batch_size": self.args.per_device_eval_batch_size,
            }

        self._obtain(target, key, make)

    @functools.cached_property
    def _base(self) -> dict[str, Any]:
        return computes(self._load(1))


def _keep_scores(target: Path, scores: AnswerScores) -> None:
    with new_folder(target) as aside:
        write_array(aside / "token_wrong.npy", scores.token_wrong)
        write_array(aside / "token_log_probs.npy", scores.token_log_probs)
