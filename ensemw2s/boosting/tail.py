"""A loss that does not fade where an expert is right: the polynomial tail."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemw2s.training.predictions import Predictions
from ensemw2s.training.trainer import AnswerTokens, AnswerTrainer


def polynomial_tail_loss(logits: Tensor, labels: Tensor, token_weights: Tensor, exponent: float) -> Tensor:
    """Return `sum_i w_i ((1/p_i)^a - 1) / a`, float32, which is cross entropy as a goes to 0.

    On a model that separates its training data, weights of the cross entropy lose their effect (Byrd and Lipton, ICML
    2019); with a polynomial tail they keep it (Wang et al., ICLR 2022).

    Args:
        logits: floating point [n, V].
        labels: int64 [n].
        token_weights: [n].
        exponent: a, above 0.
    """
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return (token_weights * torch.expm1(exponent * losses)).sum() / exponent


class PolynomialTailTrainer(AnswerTrainer):
    """Trains an expert on `polynomial_tail_loss`, with the exponent `BoostingConfig.loss_tail`."""

    def prediction_loss(self, predictions: Predictions, answers: AnswerTokens) -> Tensor:
        """Return the weighted loss of the model's predictions for the n answer tokens."""
        return polynomial_tail_loss(predictions.logits, answers.labels, answers.token_weights, self.args.loss_tail)
