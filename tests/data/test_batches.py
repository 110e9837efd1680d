"""What reaches a batch: which rows share one, which examples are refused, and how long prompts are cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState
from transformers.trainer_callback import TrainerControl

from ensemw2s.data.batches import LengthBucketSampler
from ensemw2s.data.tokens import QuestionFormat, check_examples, tokenize_prompts, tokenize_questions
from ensemw2s.training.trainer import AnswerTrainer
from tests.tiny import llama, tokenizer
from tests.training.test_trainer import arguments, ragged

# Word reversal of the demo: a word more in the question is four to eight tokens more.
LENGTHS = np.random.default_rng(0).choice([13, 17, 19, 21, 25, 31], 200, p=[0.3, 0.4, 0.1, 0.1, 0.05, 0.05])


def padding(order: list[int], lengths: np.ndarray, batch_size: int) -> float:
    """Return the share of padding in the batches that a loader cuts from `order`."""
    batches = [lengths[order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return 1 - lengths.sum() / sum(batch.max() * len(batch) for batch in batches)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=90),
    batch_size=st.integers(1, 12),
    pool=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_comes_once_in_an_order_that_seed_and_epoch_fix(
    lengths: list[int], batch_size: int, pool: int, seed: int
) -> None:
    sampler = LengthBucketSampler(lengths, batch_size, seed, pool)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert sorted(orders[0]) == list(range(len(lengths))) == sorted(orders[1])
    assert orders[0] == orders[2]
    assert len(sampler) == len(lengths)


def test_another_epoch_and_another_seed_give_another_order() -> None:
    sampler, other = LengthBucketSampler(LENGTHS, 8, 1), LengthBucketSampler(LENGTHS, 8, 2)
    first = list(sampler)
    sampler.set_epoch(1)
    assert len({tuple(first), tuple(sampler), tuple(other)}) == 3


@pytest.mark.parametrize("batch_size", [8, 16])
def test_hardly_anything_is_padding_and_the_batches_come_in_random_order(batch_size: int) -> None:
    sampler = LengthBucketSampler(LENGTHS, batch_size, seed=3)
    shares, means, last = [], [], []
    for epoch in range(30):
        sampler.set_epoch(epoch)
        order = list(sampler)
        shares.append(padding(order, LENGTHS, batch_size))
        assert padding(np.random.default_rng(epoch).permutation(200).tolist(), LENGTHS, batch_size) > 0.2
        full = [LENGTHS[order[i : i + batch_size]].mean() for i in range(0, 200 - batch_size + 1, batch_size)]
        means.append(full)
        last.append(LENGTHS[order[-(200 % batch_size or batch_size) :]].mean())
    assert np.mean(shares) < 0.05
    # Were long batches early or late, their mean length would depend on the place in the epoch.
    by_place = np.mean(means, axis=0)
    assert by_place.std() < 2 * np.std(means) / np.sqrt(30)
    # Nor is what comes last always long.
    assert min(last) < LENGTHS.mean() < max(last)


def test_rows_of_one_length_are_in_ever_other_company() -> None:
    sampler = LengthBucketSampler([5] * 40, 4, seed=0)
    company = set()
    for epoch in range(10):
        sampler.set_epoch(epoch)
        order = list(sampler)
        start = order.index(0) // 4 * 4
        company |= set(order[start : start + 4])
    assert len(company) > 15


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_the_trainer_takes_the_order_from_its_seed(tmp_path: Any, strategy: str) -> None:
    examples, _ = ragged(40, seed=1)
    args = arguments(tmp_path, train_sampling_strategy=strategy, seed=7, per_device_train_batch_size=4)
    sampler = AnswerTrainer(model=llama(0), args=args, train_dataset=examples)._get_train_sampler()
    lengths = [len(ids) for ids in examples["input_ids"]]
    expected = list(LengthBucketSampler(lengths, 4, seed=7))
    assert (list(sampler) == expected) == (strategy == "group_by_length")


def test_the_order_follows_the_epoch_that_training_goes_on_in(tmp_path: Any) -> None:
    examples, _ = ragged(40, seed=1)
    args = arguments(tmp_path, train_sampling_strategy="group_by_length")
    trainer = AnswerTrainer(model=llama(0), args=args, train_dataset=examples)
    sampler = trainer._get_train_sampler()
    trainer.callback_handler.on_epoch_begin(trainer.args, TrainerState(epoch=2.6), TrainerControl())
    assert sampler.epoch == 2


# Examples that cannot be meant


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "ab", "answer": "c"}], "easy: the examples have no column 'input_ids', only prompt, answer"),
        (
            [{"input_ids": [3, 4]}],
            "no column 'prompt_length', only input_ids: make them with ensemw2s.tokenize_questions",
        ),
        (
            [{"id": "a", "input_ids": [3, 4], "prompt_length": 1}, {"id": "b", "input_ids": [3], "prompt_length": 1}],
            r"easy, id b: the answer has no tokens \(prompt_length 1 of 1 tokens\): leave the row out",
        ),
        ([{"input_ids": [3, 4], "prompt_length": 0}], "easy, row 0: the prompt has no tokens"),
    ],
    ids=["no-tokens", "no-boundary", "no-answer", "no-prompt"],
)
def test_examples_without_something_to_learn_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_examples(Dataset.from_list(rows), "easy")


def test_no_examples_are_refused() -> None:
    empty = Dataset.from_dict({"input_ids": [], "prompt_length": []})
    with pytest.raises(ValueError, match="easy: 0 examples, expected at least one"):
        check_examples(empty, "easy")


# Prompts that are too long

CUT = QuestionFormat(prompt_template="{prompt}:", max_length=8, truncate_prompt=True)
LONG = Dataset.from_list(
    [{"id": "x", "prompt": "abcdefgh", "answer": "xyz"}, {"id": "y", "prompt": "b", "answer": "c"}]
)


def test_prompts_are_cut_on_the_left_and_answers_stay_whole() -> None:
    rows = tokenize_questions(LONG, tokenizer(), CUT)
    assert tokenizer().decode(rows[0]["input_ids"]).replace(" ", "") == "gh:xyz<end>"
    assert rows[0]["prompt_length"] == 3
    assert len(rows[0]["input_ids"]) == 8
    whole = tokenize_questions(LONG, tokenizer(), QuestionFormat(prompt_template="{prompt}:"))
    assert rows[1] == whole[1]


def test_prompts_to_be_answered_leave_room_for_the_answer() -> None:
    rows = tokenize_prompts(LONG, tokenizer(), CUT, answer_length=5)
    assert tokenizer().decode(rows[0]["input_ids"]).replace(" ", "") == "gh:"
    assert len(rows[1]["input_ids"]) == 2


def test_an_answer_that_leaves_no_room_for_any_prompt_is_still_refused() -> None:
    long = Dataset.from_list([{"id": "x", "prompt": "ab", "answer": "abcdefgh"}])
    with pytest.raises(
        ValueError, match=r"id x: prompt and answer have 11 tokens \(10 of them the answer\), more than"
    ):
        tokenize_questions(long, tokenizer(), CUT)


def test_without_being_asked_nothing_is_cut() -> None:
    plain = QuestionFormat(prompt_template="{prompt}:", max_length=8)
    with pytest.raises(ValueError, match="or pass truncate_prompt=True"):
        tokenize_questions(LONG, tokenizer(), plain)
