"""Which answer tokens carry a weight, and how weights and losses go between tokens and units."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from ensemw2s.boosting.units import AnswerUnits, informative_tokens
from tests.tiny import END, LETTERS, tokenizer

SPACE, A, B = (LETTERS.index(letter) + 2 for letter in " ab")
# Answers of words, of white space alone, and of an end alone, each behind a prompt of one token.
ANSWERS = [[SPACE, A, B, END], [SPACE, SPACE, END], [END], [A, SPACE, B, A]]
EXAMPLES = Dataset.from_list([{"input_ids": [B, *answer], "prompt_length": 1} for answer in ANSWERS])
MASK = np.array([0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1], dtype=bool)


def test_an_answer_of_white_space_alone_keeps_its_tokens() -> None:
    np.testing.assert_array_equal(informative_tokens(EXAMPLES, tokenizer()), MASK)


@pytest.mark.parametrize(
    ("unit", "window", "expected"),
    [
        ("token", None, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("window", 2, [0, 0, 1, 1, 2, 3, 4, 4, 5]),
        ("sequence", None, [0, 0, 1, 1, 1, 2, 3, 3, 3]),
    ],
)
def test_units_are_numbered_over_boosted_tokens_alone(unit: str, window: int | None, expected: list[int]) -> None:
    units = AnswerUnits(EXAMPLES, MASK, unit, window)
    index = units.index()
    np.testing.assert_array_equal(index, expected)
    weights = np.random.default_rng().random(expected[-1] + 1)
    in_loss = units.token_weights(weights, index)
    assert [len(row) for row in in_loss] == [len(answer) for answer in ANSWERS]
    tokens = np.concatenate(in_loss)
    assert tokens.dtype == np.float32
    np.testing.assert_array_equal(tokens[MASK], weights[expected].astype(np.float32))
    np.testing.assert_array_equal(tokens[~MASK], 1.0)
    losses = np.random.default_rng().random(MASK.size)
    of_units = [losses[MASK][np.array(expected) == u].max() for u in range(expected[-1] + 1)]
    np.testing.assert_array_equal(units.losses(losses, index), of_units)


def test_without_a_mask_every_token_counts() -> None:
    units = AnswerUnits(EXAMPLES, None, "token")
    np.testing.assert_array_equal(units.index(), np.arange(12))
    np.testing.assert_array_equal(np.concatenate(units.token_weights(np.arange(12.0), units.index())), np.arange(12))
