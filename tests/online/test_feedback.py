"""Log-probabilities of whole answers by expert, against each expert asked by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemw2s import OnlineWeights, TokenEnsemble, answer_log_probs, tokenize_questions
from tests import tiny


def test_whole_answers_have_the_log_probabilities_that_each_expert_gives(ensemble: TokenEnsemble) -> None:
    questions = tiny.questions(7)
    found = answer_log_probs(ensemble, questions, tiny.tokenizer(), question_format=tiny.FORMAT, batch_size=3)
    assert found.shape == (7, len(ensemble)) and found.dtype == np.float64
    for number, row in enumerate(tokenize_questions(questions, tiny.tokenizer(), tiny.FORMAT)):
        ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
        for index in range(len(ensemble)):
            with ensemble.experts.expert(index) as expert, torch.no_grad():
                log_probs = expert(ids).logits[0].double().log_softmax(-1)
            wanted = log_probs[start - 1 : -1].gather(1, ids[0, start:, None]).sum()
            assert found[number, index] == pytest.approx(float(wanted), abs=1e-4)


def test_weights_that_learned_answers_give_an_ensemble(of_models: TokenEnsemble) -> None:
    weights = OnlineWeights(of_models.expert_weights, share=0.01)
    for log_probs in answer_log_probs(of_models, tiny.questions(5), tiny.tokenizer(), question_format=tiny.FORMAT):
        weights.learn_answer(log_probs)
    assert of_models.reweighted(weights.expert_weights).expert_weights == weights.expert_weights


def test_questions_without_answers_are_refused(of_models: TokenEnsemble) -> None:
    with pytest.raises(ValueError, match="answer"):
        answer_log_probs(of_models, [{"prompt": "ab"}], tiny.tokenizer())
