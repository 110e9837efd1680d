"""Boosting rounds over answer tokens: the arithmetic, its settings, and the trainer that runs them."""

from ensemw2s.boosting.algorithm import cap_weights as cap_weights
from ensemw2s.boosting.algorithm import clamp_error as clamp_error
from ensemw2s.boosting.algorithm import draw_counts as draw_counts
from ensemw2s.boosting.algorithm import draw_without_replacement as draw_without_replacement
from ensemw2s.boosting.algorithm import effective_sample_size as effective_sample_size
from ensemw2s.boosting.algorithm import expert_weight as expert_weight
from ensemw2s.boosting.algorithm import fit_mixture_weights as fit_mixture_weights
from ensemw2s.boosting.algorithm import initial_weights as initial_weights
from ensemw2s.boosting.algorithm import loss_weights as loss_weights
from ensemw2s.boosting.algorithm import prior_error as prior_error
from ensemw2s.boosting.algorithm import tempered_shrinkage as tempered_shrinkage
from ensemw2s.boosting.algorithm import unit_index as unit_index
from ensemw2s.boosting.algorithm import unit_losses as unit_losses
from ensemw2s.boosting.algorithm import update_weights as update_weights
from ensemw2s.boosting.algorithm import weight_quantiles as weight_quantiles
from ensemw2s.boosting.algorithm import weighted_error as weighted_error
