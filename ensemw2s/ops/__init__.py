"""Operations on the next-token distributions of several language models.

Every op is declared once, in the file of its name: docstring, schema, plain-torch reference, fake, gradient. It runs
on interchangeable backends, chosen by ``impl`` (or the environment variable ``ENSEMW2S_IMPL``): ``"auto"``,
``"reference"`` (plain torch, any device, float64 too), ``"cpp"`` (compiled, CPU), ``"cuda"``, ``"triton"``.
"""

from ensemw2s.ops.backend import available_backends, backend_for, build_info
from ensemw2s.ops.mixture_log_probs import mixture_log_probs
from ensemw2s.ops.mixture_sample import MixtureSample, mixture_sample
from ensemw2s.ops.randomness import draw_seeds

__all__ = [
    "MixtureSample",
    "available_backends",
    "backend_for",
    "build_info",
    "draw_seeds",
    "mixture_log_probs",
    "mixture_sample",
]
