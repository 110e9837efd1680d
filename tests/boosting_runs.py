"""Short boosting runs on a tiny model, and a record of what they trained."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from peft import get_peft_model_state_dict
from transformers import LlamaForCausalLM

from ensemw2s import BoostingConfig, BoostingTrainer
from ensemw2s.boosting import factory
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.training.fine_tune import fine_tune
from tests.tiny import END, FORMAT, llama, lora, questions, tokenizer

FAST: dict[str, Any] = {
    "num_rounds": 2, "num_train_epochs": 2, "learning_rate": 2e-2, "per_device_train_batch_size": 6,
    "disable_tqdm": True, "lr_scheduler_type": "constant", "validate_rounds": False,
}  # fmt: skip
TRAIN = questions(12)
VALIDATION = questions(8, seed=9, start=100)
BASE_TRAIN = questions(40, seed=77, start=500)


@functools.cache
def base() -> LlamaForCausalLM:
    """Return a model that knows something of the task, so that its error is not that of a guess."""
    args = BoostingConfig(output_dir="unused", **(FAST | {"num_train_epochs": 5, "learning_rate": 5e-3}))
    examples = tokenize_questions(BASE_TRAIN, tokenizer(), FORMAT)
    model, _ = fine_tune(llama(0, intermediate_size=160), examples, args, pad_token_id=END, seed=0, description="base")
    return model


def boost(folder: Path, *, given: dict[str, Any] | None = None, **settings: Any) -> BoostingTrainer:
    """A trainer of adapters of `base()`; `given` are arguments of its own, `settings` those of its configuration."""
    arguments = {
        "model": base(), "train_dataset": TRAIN, "eval_dataset": None, "processing_class": tokenizer(),
        "peft_config": lora(), "question_format": FORMAT,
    }  # fmt: skip
    args = BoostingConfig(output_dir=str(folder), **(FAST | settings))
    return BoostingTrainer(args=args, **(arguments | (given or {})))


class Trainings(list[dict[str, Any]]):
    """What was given to every fine-tuning, in turn; `die_at` raises in place of that one, numbered from 1."""

    die_at = 0


def record_trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    """Note from now on what every fine-tuning of a `BoostingTrainer` is given."""
    calls, own = Trainings(), factory.fine_tune

    def recorded(model: Any, examples: Dataset, args: Any, **options: Any) -> Any:
        if len(calls) + 1 == calls.die_at:
            raise KeyboardInterrupt
        adapters = hasattr(model, "peft_config")
        start = get_peft_model_state_dict(model) if adapters else model.state_dict()
        calls.append({
            "start": copy.deepcopy(start), "is_adapter": adapters,
            "rows": [tuple(ids) for ids in examples["input_ids"]],
            "weights": [np.array(row) for row in options["token_weights"]], "seed": options["seed"],
            "new_adapter": options["peft_config"],
        })  # fmt: skip
        return own(model, examples, args, **options)

    monkeypatch.setattr(factory, "fine_tune", recorded)
    return calls
