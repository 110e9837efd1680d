"""Difficulty: ratings that no question's own answer has touched, and cuts that fall between values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ensemw2s import StudentConfig, difficulty
from ensemw2s.config import build_config, load_config
from ensemw2s.data import load_questions, question_key, tokenize_questions
from ensemw2s.difficulty import answer_difficulty, assign_folds, rate_difficulty, split_by_difficulty
from ensemw2s.experiment import Experiment
from ensemw2s.scoring import AnswerScores, score_answers
from ensemw2s.training import AnswerTrainingArguments, fine_tune
from tests import test_experiment
from tests.tiny import END, FORMAT, llama, lora, questions, random_word, tokenizer

LETTERS = {"prompt_template": "{prompt}=", "answer_prefix": ""}


def arguments(folder: Path, **changes: Any) -> AnswerTrainingArguments:
    values = {
        "num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return AnswerTrainingArguments(output_dir=str(folder), **(values | changes))


def rated(folder: Path, rows: Dataset, folds: int = 2, **changes: Any) -> Dataset:
    return rate_difficulty(
        llama(0), rows, arguments(folder, **changes), folds=folds, processing_class=tokenizer(), question_format=FORMAT
    )


def of(values: list[Any], **columns: Any) -> Dataset:
    rows = [{"prompt": f"question {i}", "answer": "a"} for i in range(len(values))]
    return Dataset.from_list(rows).add_column("difficulty", values)


def by_prompt(dataset: Dataset, column: str) -> dict[str, Any]:
    return dict(zip(dataset["prompt"], dataset[column], strict=True))


# Rating


def test_a_question_is_rated_by_a_model_that_never_saw_its_answer(tmp_path: Path) -> None:
    """Random answers can be memorised but not foreseen."""
    generator = torch.Generator().manual_seed(0)
    words = [(random_word(generator, 4), random_word(generator, 4)) for _ in range(24)]
    rows = Dataset.from_list([{"id": f"q{i}", "prompt": p, "answer": a} for i, (p, a) in enumerate(words)])
    training = {"num_train_epochs": 60, "learning_rate": 1e-2}
    found = rated(tmp_path / "rating", rows, **training)
    # Prefix and end are alike in all answers: 4 of the 6 tokens are random.
    assert np.mean(found["difficulty"]) > 0.55
    examples = tokenize_questions(rows, tokenizer(), FORMAT)
    model, _ = fine_tune(
        llama(0), examples, arguments(tmp_path, **training), pad_token_id=END, seed=0, description="all of them"
    )
    assert answer_difficulty(score_answers(model, examples, pad_token_id=END)).mean() < 0.05


def test_a_rating_is_the_mean_chance_of_missing_a_token_in_the_held_out_fold(tmp_path: Path) -> None:
    rows = questions(20)
    found = rated(tmp_path / "rating", rows, folds=3)
    folds = np.array(found["fold"])
    assert np.array_equal(folds, assign_folds(rows, 3, seed=42))
    examples = tokenize_questions(rows, tokenizer(), FORMAT)
    # By hand, in the order of the rating: it decides the batches.
    order = sorted(range(20), key=lambda i: difficulty._rank(42, rows[i]["prompt"], rows[i]["answer"]))
    for number in range(3):
        others = [i for i in order if folds[i] != number]
        args = arguments(tmp_path)
        model, _ = fine_tune(llama(0), examples.select(others), args, pad_token_id=END, seed=args.seed, description="x")
        model = model.double()
        for i in np.flatnonzero(folds == number):
            ids, start = torch.tensor([examples[int(i)]["input_ids"]]), examples[int(i)]["prompt_length"]
            with torch.no_grad():
                p = model(input_ids=ids).logits[0, start - 1 : -1].softmax(-1).gather(1, ids[0, start:, None])
            assert found["difficulty"][int(i)] == pytest.approx(float((1 - p).mean()), abs=1e-4)
