"""Operations on the next-token distributions of several language models.

Every op is declared once, in the file of its name: docstring, schema, plain-torch reference, fake, gradient. It runs
on interchangeable backends, chosen by ``impl`` (or the environment variable ``ENSEMW2S_IMPL``): ``"auto"``,
``"reference"`` (plain torch, any device, float64 too), ``"cpp"`` (compiled, CPU), ``"cuda"``, ``"triton"``.
"""

from ensemw2s.ops.backend import available_backends, backend_for, build_info
from ensemw2s.ops.common_vocabulary import common_vocabulary
from ensemw2s.ops.expert_first import draw_experts
from ensemw2s.ops.linear_mixture_kl import linear_mixture_kl
from ensemw2s.ops.linear_weighted_cross_entropy import linear_weighted_cross_entropy
from ensemw2s.ops.mixture_kl import mixture_kl
from ensemw2s.ops.mixture_log_probs import mixture_log_probs
from ensemw2s.ops.mixture_sample import MixtureSample, mixture_sample
from ensemw2s.ops.mixture_scores import mixture_scores
from ensemw2s.ops.mixture_verify import MixtureVerification, mixture_verify
from ensemw2s.ops.randomness import draw_seeds
from ensemw2s.ops.token_adjustments import TokenAdjustments, pack_mask, token_adjustments
from ensemw2s.ops.token_scores import TokenScores, token_scores
from ensemw2s.ops.topk_kl import topk_kl
from ensemw2s.ops.weighted_cross_entropy import weighted_cross_entropy

__all__ = [
    "MixtureSample",
    "MixtureVerification",
    "TokenAdjustments",
    "TokenScores",
    "available_backends",
    "backend_for",
    "build_info",
    "common_vocabulary",
    "draw_experts",
    "draw_seeds",
    "linear_mixture_kl",
    "linear_weighted_cross_entropy",
    "mixture_kl",
    "mixture_log_probs",
    "mixture_sample",
    "mixture_scores",
    "mixture_verify",
    "pack_mask",
    "token_adjustments",
    "token_scores",
    "topk_kl",
    "weighted_cross_entropy",
]
