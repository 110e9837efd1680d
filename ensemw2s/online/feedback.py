"""What experts say of right answers, as online weights learn from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ensemw2s.data.tokens import QuestionFormat, format_of, tokenize_questions
from ensemw2s.inference.scoring import score_mixtures
from ensemw2s.models.loading import check_processing_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.models.mixture import ExpertMixture


def answer_log_probs(
    ensemble: ExpertMixture,
    questions: Any,
    processing_class: PreTrainedTokenizerBase,
    *,
    question_format: QuestionFormat | None = None,
    batch_size: int = 32,
) -> NDArray[np.float64]:
    """Return the log-probability of each whole answer under each expert, float64 [N, T] (nats), end tokens included.

    Args:
        ensemble: T experts.
        questions: N of them, with columns `prompt` and `answer`, in any shape that `as_dataset` takes.
        processing_class: the experts' tokenizer.
        question_format: how a question becomes tokens; None is the ensemble's own.
        batch_size: answers in one forward pass.

    Raises:
        FloatingPointError: an expert gives NaN or no finite logit; names it and the row.
        TypeError, ValueError: questions that `tokenize_questions` refuses; names the row.
    """
    check_processing_class(processing_class)
    examples = tokenize_questions(questions, processing_class, format_of(ensemble, question_format), "questions")
    count = len(ensemble.experts)
    alone = {str(index): [float(index == other) for other in range(count)] for index in range(count)}
    scores = score_mixtures(
        ensemble,
        examples,
        alone,
        pad_token_id=processing_class.eos_token_id,
        batch_size=batch_size,
        # One expert has one distribution, by whatever rule several are combined.
        combine=dict.fromkeys(alone, "prob"),
    )
    columns = []
    for own in scores.values():
        starts = np.cumsum(own.lengths) - own.lengths
        columns.append(np.add.reduceat(own.token_log_probs.astype(np.float64), starts))
    return np.stack(columns, axis=1)
