"""How well a model answers questions: `score_answers`, and what the trainers' `evaluate` says of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ensemw2s.data.questions import check_questions
from ensemw2s.data.shapes import as_dataset
from ensemw2s.data.tokens import QuestionFormat, format_of, tokenize_questions
from ensemw2s.inference.choices import ChoiceSettings, score_choices
from ensemw2s.inference.scoring import AnswerScores, score_examples
from ensemw2s.models.loading import check_processing_class

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def score_answers(
    model: torch.nn.Module,
    questions: Any,
    processing_class: PreTrainedTokenizerBase,
    *,
    question_format: QuestionFormat | None = None,
    batch_size: int = 32,
    description: str | None = None,
) -> AnswerScores:
    """Score the answers to questions under a causal language model or a `TokenEnsemble`.

    `score_answers(...).accuracy` is the share of answers that greedy decoding would give, or of questions with
    `choices` the share whose likeliest choice is the answer.

    Args:
        model: anything with `.logits` of shape [batch, length, V]; a `TokenEnsemble` is scored by its mixture.
        questions: columns `prompt` and `answer`, in any shape that `ensemw2s.data.shapes.as_dataset` takes; or what
            `tokenize_questions` has made of them, whose choices are gone.
        processing_class: the model's tokenizer.
        question_format: how a question becomes tokens; None is the ensemble's own (`TokenEnsemble.question_format`),
            that of a student from `StudentTrainer`, or the default for another model.
        batch_size: answers, or choices, in one forward pass.
        description: the name of a progress bar; None shows none.

    Raises:
        FloatingPointError: the model, or an expert, gives NaN, +inf or no finite logit for a token of an answer; names
            which and the row.
        TypeError, ValueError: questions that `tokenize_questions` refuses; names the row.
    """
    check_processing_class(processing_class)
    pad = processing_class.eos_token_id
    examples = as_dataset(questions, "questions")
    if "input_ids" in examples.column_names:
        return score_examples(model, examples, pad_token_id=pad, batch_size=batch_size, description=description)
    checked, asked = check_questions(examples, "questions"), format_of(model, question_format)
    examples = tokenize_questions(checked, processing_class, asked, "questions")
    scores = score_examples(model, examples, pad_token_id=pad, batch_size=batch_size, description=description)
    if "choices" not in checked.column_names:
        return scores
    settings = ChoiceSettings(asked, batch_size=batch_size, description=description)
    chosen = score_choices(model, checked, processing_class, settings)
    return dataclasses.replace(scores, chosen_right=chosen.correct)


def measure(
    model: Any,
    questions: Any,
    processing_class: PreTrainedTokenizerBase,
    question_format: QuestionFormat,
    batch_size: int = 32,
) -> dict[str, float]:
    """Return how a causal language model or an ensemble does on questions with answers, under transformers' names.

    Args:
        model: see `score_answers`.
        questions: questions with answers, in any shape that `ensemw2s.data.shapes.as_dataset` takes.
        processing_class: the model's tokenizer.
        question_format: how a question becomes tokens.
        batch_size: answers, or choices, in one forward pass.

    Returns:
        `eval_accuracy` (see `score_answers`), `eval_token_error` (the share of answer tokens that are not the
        likeliest) and `eval_loss` (mean cross entropy of an answer token, nats; infinite for an ensemble that votes
        otherwise than the answer).

    Raises:
        FloatingPointError: see `score_answers`.
        TypeError, ValueError: questions that `check_questions` refuses.
    """
    questions = check_questions(questions, "eval_dataset")
    scores = score_answers(model, questions, processing_class, question_format=question_format, batch_size=batch_size)
    return {
        "eval_accuracy": scores.accuracy,
        "eval_token_error": scores.token_error,
        "eval_loss": -float(scores.token_log_probs.mean(dtype=float)),
    }
