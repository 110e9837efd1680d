"""How well a model answers questions, as the trainers' `evaluate` says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ensemw2s.data.questions import check_questions
from ensemw2s.inference.choices import ChoiceSettings, score_choices
from ensemw2s.inference.scoring import score_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.data.tokens import QuestionFormat


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
        questions: questions with answers, in any shape that `shapes.as_dataset` takes.
        processing_class: the model's tokenizer.
        question_format: how a question becomes tokens.
        batch_size: answers, or choices, in one forward pass.

    Returns:
        `eval_accuracy` (the share of questions whose greedy answer is right in every token, or, of questions with
        `choices`, whose likeliest choice is the answer), `eval_token_error` (the share of answer tokens that are not
        the likeliest) and `eval_loss` (mean cross entropy of an answer token, nats; infinite for an ensemble that
        votes otherwise than the answer).

    Raises:
        FloatingPointError: see `score_answers`.
        TypeError, ValueError: questions that `check_questions` refuses.
    """
    questions = check_questions(questions, "eval_dataset")
    scores = score_answers(model, questions, processing_class, question_format=question_format, batch_size=batch_size)
    accuracy = scores.accuracy
    if "choices" in questions.column_names:
        settings = ChoiceSettings(question_format, batch_size=batch_size)
        correct = score_choices(model, questions, processing_class, settings).correct
        assert correct is not None
        accuracy = float(correct.mean())
    return {
        "eval_accuracy": accuracy,
        "eval_token_error": scores.token_error,
        "eval_loss": -float(scores.token_log_probs.mean(dtype=float)),
    }
