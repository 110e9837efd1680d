"""The answers that a report shows token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemw2s import TokenEnsemble
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.experiments.samples import choose_samples, sample_record
from ensemw2s.inference.inspection import inspect_answer
from tests.tiny import FORMAT, llama, questions, tokenizer

WEIGHTS = [0.5, 2.0, 1.5]


@pytest.fixture(scope="module")
def experts() -> list[torch.nn.Module]:
    return [llama(seed) for seed in range(3)]


@pytest.mark.parametrize("combine", ["prob", "logprob", "vote"])
def test_every_judgement_is_that_of_a_float64_reference(experts: list[torch.nn.Module], combine: str) -> None:
    ensemble = TokenEnsemble.from_models(experts, WEIGHTS, combine=combine)
    example = tokenize_questions(questions(3), tokenizer(), FORMAT)[1]
    ids, start = example["input_ids"], example["prompt_length"]
    found, mixture = inspect_answer(ensemble, ids, start)
    answer = torch.tensor(ids[start:])
    with torch.no_grad():
        probs = torch.stack([m(torch.tensor([ids])).logits[0, start - 1 : -1].double().softmax(-1) for m in experts])
    shares = torch.tensor(WEIGHTS).double()[:, None, None] / sum(WEIGHTS)
    mixed = (shares * probs).sum(0)
    if combine == "logprob":
        mixed = (shares * probs.log()).sum(0).softmax(-1)
    if combine == "vote":
        mixed = (shares * torch.nn.functional.one_hot(probs.argmax(-1), probs.shape[-1])).sum(0)
    for judgement, expected in zip([*found, mixture], [*probs, mixed], strict=True):
        assert judgement.tokens.tolist() == expected.argmax(-1).tolist()
        torch.testing.assert_close(judgement.probabilities.double(), expected.amax(-1), rtol=1e-5, atol=1e-7)
        of_answer = expected.gather(-1, answer[:, None])[:, 0]
        torch.testing.assert_close(judgement.of_answer.double(), of_answer, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prompt_length", [0, 5, 6])
def test_a_text_without_prompt_or_answer_is_refused(experts: list[torch.nn.Module], prompt_length: int) -> None:
    with pytest.raises(ValueError, match="prompt_length must leave a prompt and an answer of 5 tokens"):
        inspect_answer(TokenEnsemble.from_models(experts, WEIGHTS), range(5), prompt_length)


@given(st.integers(1, 30).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=2)))
def test_chosen_questions_are_what_their_reasons_say_and_all_different(rows: list[list[bool]]) -> None:
    correct, by_expert = rows[0], np.array(rows[1:])
    chosen = choose_samples(correct, rows[1:])
    assert len(set(chosen.values())) == len(chosen)
    assert ("right" in chosen) == any(correct)
    assert ("wrong" in chosen) == (not all(correct))
    if "right" in chosen:
        assert chosen["right"] == correct.index(True)
    if "wrong" in chosen:
        assert chosen["wrong"] == correct.index(False)
    if "disagree" in chosen:
        assert 0 < by_expert[:, chosen["disagree"]].sum() < len(by_expert)


def test_a_record_holds_the_beginning_of_a_long_answer_and_shares(experts: list[torch.nn.Module]) -> None:
    asked = questions(4)
    examples = tokenize_questions(asked, tokenizer(), FORMAT)
    ensemble = TokenEnsemble.from_models(experts, WEIGHTS)
    record = sample_record(
        ensemble, tokenizer(), asked, examples, 2, split="ood", reason="wrong", right=False, by_likelihood=False
    )
    row = examples[2]
    assert record.number == 3
    assert record.answer == asked[2]["answer"]
    assert record.num_tokens == len(row["input_ids"]) - row["prompt_length"] == len(record.tokens)
    assert record.weights == pytest.approx([0.125, 0.5, 0.375], abs=1e-6)
    assert len(record.experts) == 3
    assert all(0 <= share <= 1 for choices in record.experts for _, *both in choices for share in both)
