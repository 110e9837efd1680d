"""A few answers to test questions, token by token, for the reader of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemw2s.data.shapes import Prompt
from ensemw2s.inference.inspection import Judgement, inspect_answer
from ensemw2s.ops.mixture_log_probs import shares
from ensemw2s.runtime.records import MOST_SAMPLE_TOKENS, SampleRecord

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.models.mixture import ExpertMixture

# Letters of a prompt and of an answer that are kept, and those of one token.
_MOST_LETTERS, _MOST_TOKEN_LETTERS = 800, 40


def choose_samples(correct: Sequence[int], experts: Sequence[Sequence[int]]) -> dict[str, int]:
    """Return which of N questions are shown, by the reason for it (`records.SAMPLE_REASONS`) [choice].

    They are the first that the ensemble answers right, the first that it answers wrong, and the first beside these that
    some experts answer right and others wrong. A reason without such a question is left out.

    Args:
        correct: 0 or 1 [N], what the ensemble answers right.
        experts: 0 or 1 [T, N], what each of its experts does.
    """
    right, by_expert = np.asarray(correct, dtype=bool), np.asarray(experts, dtype=bool)
    differ = by_expert.any(axis=0) & ~by_expert.all(axis=0)
    chosen: dict[str, int] = {}
    for reason, holds in (("right", right), ("wrong", ~right), ("disagree", differ)):
        places = [place for place in np.flatnonzero(holds).tolist() if place not in chosen.values()]
        chosen |= {reason: places[0]} if places else {}
    return chosen


def sample_record(
    ensemble: ExpertMixture,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    examples: Dataset,
    place: int,
    **fields: Any,
) -> SampleRecord:
    """Return what the experts and their mixture make of the answer to one question.

    Args:
        ensemble: whose experts are asked.
        tokenizer: theirs.
        questions: columns `prompt` and `answer`.
        examples: the same questions in tokens.
        place: of the question, from 0.
        fields: `split`, `reason`, `right` and `by_likelihood` of the record.
    """
    question, example = questions[place], examples[place]
    start, ids = example["prompt_length"], example["input_ids"]
    kept = ids[: start + MOST_SAMPLE_TOKENS]
    experts, mixture = inspect_answer(ensemble, kept, start)
    return SampleRecord(
        number=place + 1,
        prompt=_end_of(_prompt_text(question["prompt"])),
        answer=_end_of(question["answer"]),
        num_tokens=len(ids) - start,
        tokens=[_token_text(token, tokenizer) for token in kept[start:]],
        weights=[round(share, 6) for share in shares(ensemble.mixture_weights().double()).tolist()],
        experts=[_choices(judgement, tokenizer) for judgement in experts],
        mixture=_choices(mixture, tokenizer),
        **fields,
    )


def _choices(judgement: Judgement, tokenizer: PreTrainedTokenizerBase) -> list[list[Any]]:
    tokens = (_token_text(token, tokenizer) for token in judgement.tokens.tolist())
    shown = (values.double().numpy().round(6).tolist() for values in (judgement.probabilities, judgement.of_answer))
    return [list(choice) for choice in zip(tokens, *shown, strict=True)]


def _token_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False) or tokenizer.convert_ids_to_tokens(token)
    # An id beyond the tokenizer's words, which a padded vocabulary has, is no text.
    return str(text if text else f"<{token}>")[:_MOST_TOKEN_LETTERS]


def _prompt_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _end_of(text: str) -> str:
    """Return the end of a text, where a question mostly stands."""
    return text if len(text) <= _MOST_LETTERS else f"... {text[-_MOST_LETTERS:]}"


def question_samples(outcomes: Mapping[str, Mapping[str, Any]], split: str) -> list[dict[str, Any]]:
    """Return `place` and, for `sample_record`, the fields of each question of a split that is shown.

    `outcomes` hold, per arm and split, what evaluation keeps: `correct` and `by_likelihood`.
    """
    own = outcomes["ensemble"][split]
    experts = [outcomes[arm][split]["correct"] for arm in outcomes if arm.startswith("expert_")]
    return [
        {"place": place, "split": split, "reason": reason, "right": bool(own["correct"][place]),
         "by_likelihood": own["by_likelihood"]}
        for reason, place in choose_samples(own["correct"], experts).items()
    ]  # fmt: skip
