"""What a student learns from beside plain labels: a teacher's distributions, live or kept, and its own certainty.

The losses of method, phase 3, "soft" and "confidence", run on hidden states at answer tokens, so that logits
`[tokens, V]` are never held where a model's head is a plain linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemw2s.data.tokens import IGNORED
from ensemw2s.inference.label_files import TOP_COLUMNS
from ensemw2s.student.teacher import LiveTeacher
from ensemw2s.training.predictions import Predictions
from ensemw2s.training.trainer import AnswerTokens, AnswerTrainer


@dataclass
class CacheCollator:
    """Collate a cache along with the answers.

    Attributes:
        collate: makes the batch of answers, as `ensemw2s.data.batches.AnswerCollator`.
        count: tokens of the cache that are used, the likeliest ones; None takes all.
    """

    collate: Any
    count: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch with `top_token_ids` int64 and `top_log_probs` float32 [n, k].

        They belong to the n tokens with a label, row after row. Questions for an evaluation have no cache.
        """
        batch: dict[str, Tensor] = self.collate(features)
        if not set(TOP_COLUMNS) <= set(features[0]):
            return batch
        for name, dtype in (("top_token_ids", torch.int64), ("top_log_probs", torch.float32)):
            rows = []
            for feature, labels in zip(features, batch["labels"], strict=True):
                start = int(feature["prompt_length"])
                values = torch.as_tensor(np.asarray(feature[name])[:, : self.count], dtype=dtype)
                rows.append(values[labels[start : start + len(values)] != IGNORED])
            batch[name] = torch.cat(rows)
        return batch


class SoftTrainer(AnswerTrainer):
    """Train on the teacher's distributions: `loss_i = s T^2 KL(teacher_i || student_i) + (1-s) CE_i`.

    `T^2` keeps the gradient's size the same at any temperature T (Hinton et al. 2015), so that one learning rate and
    one `soft_weight` s serve all [choice].

    Args:
        teacher: a live teacher; None reads the columns `top_token_ids` and `top_log_probs`.
        temperature: T; a cache was written at the same one.
        soft_weight: s in (0, 1].
        top_logprobs: tokens of a cache that are used; None takes all.
        options: as for `AnswerTrainer`.
    """

    def __init__(
        self,
        *,
        teacher: LiveTeacher | None = None,
        temperature: float = 1.0,
        soft_weight: float = 1.0,
        top_logprobs: int | None = None,
        **options: Any,
    ) -> None:
        if teacher is None:
            options["data_collator"] = CacheCollator(options["data_collator"], top_logprobs)
            options["train_dataset"] = options["train_dataset"].with_format("numpy")
        super().__init__(**options)
        self.teacher = teacher
        self.temperature = temperature
        self.soft_weight = soft_weight

    def prediction_loss(self, predictions: Predictions, answers: AnswerTokens) -> Tensor:
        """See `AnswerTrainer.prediction_loss`."""
        if self.teacher is None:
            ids, log_probs = (answers.inputs[name].to(answers.labels.device) for name in TOP_COLUMNS)
            soft = predictions.topk_kl(ids, log_probs, answers.token_weights, self.temperature)
        else:
            soft = self.teacher.kl(predictions, answers, self.temperature)
        loss = self.soft_weight * self.temperature**2 * soft
        if self.soft_weight < 1:
            loss = loss + (1 - self.soft_weight) * self.label_loss(predictions, answers)
        return loss


class ConfidenceTrainer(AnswerTrainer):
    """Train on labels and on the student's own certainty (Burns et al. 2023, "Weak-to-strong generalization", A.4).

    `loss_i = (1-a) CE(student_i, label_i) + a CE(student_i, f_i)`, where `f_i` is the student's own likeliest token at
    this step, taken as given (no gradient), and a rises linearly from 0 to `alpha` over the first `warmup` of the
    steps. Burns et al. harden binary predictions at a threshold that keeps the classes balanced; tokens have no such
    threshold, the argmax takes its place [choice].

    Args:
        alpha: the largest a, in [0, 1].
        warmup: the share of all steps in which a rises, in [0, 1].
        options: as for `AnswerTrainer`.
    """

    def __init__(self, *, alpha: float, warmup: float, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = alpha
        self.warmup = warmup

    def prediction_loss(self, predictions: Predictions, answers: AnswerTokens) -> Tensor:
        """See `AnswerTrainer.prediction_loss`."""
        alpha = confidence_alpha(self.state.global_step, self.state.max_steps, self.alpha, self.warmup)
        return confidence_loss(predictions, answers, alpha)


def confidence_alpha(step: int, max_steps: int, alpha: float, warmup: float) -> float:
    """Return the weight a of the student's own predictions at a step, counted from 0: linear from 0 up to `alpha`."""
    rising = warmup * max_steps
    return alpha if step >= rising else alpha * step / rising


def confidence_loss(predictions: Predictions, answers: AnswerTokens, alpha: float) -> Tensor:
    """Return `sum_i w_i ((1-alpha) CE(student_i, label_i) + alpha CE(student_i, argmax student_i))`."""
    labels, weights = answers.labels, answers.token_weights
    if alpha == 0:
        return predictions.cross_entropy(labels, weights)
    own = predictions.argmax()
    # Where the student agrees with the label both terms are one, and the second costs nothing.
    doubted = alpha * weights * (own != labels)
    return predictions.cross_entropy(labels, weights - doubted) + predictions.cross_entropy(own, doubted)
