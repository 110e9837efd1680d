"""Boosting rounds over answer tokens: the arithmetic, its settings, and the trainer that runs them."""

from ensemw2s.boosting.algorithm import (
    cap_weights,
    clamp_error,
    draw_counts,
    draw_without_replacement,
    effective_sample_size,
    expert_weight,
    fit_mixture_weights,
    initial_weights,
    loss_weights,
    prior_error,
    tempered_shrinkage,
    unit_index,
    unit_losses,
    update_weights,
    weight_quantiles,
    weighted_error,
)

__all__ = [
    "cap_weights",
    "clamp_error",
    "draw_counts",
    "draw_without_replacement",
    "effective_sample_size",
    "expert_weight",
    "fit_mixture_weights",
    "initial_weights",
    "loss_weights",
    "prior_error",
    "tempered_shrinkage",
    "unit_index",
    "unit_losses",
    "update_weights",
    "weight_quantiles",
    "weighted_error",
]
