"""Random numbers keyed by (seed, position, token): Philox4x32-10 (Salmon et al., SC 2011) and Gumbel noise from it."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def draw_seeds(batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """Seeds for ``mixture_sample`` out of torch's generator, so that ``torch.manual_seed`` reproduces a run.

    Returns:
        int64 ``[batch_size]`` on ``device``, uniform over the non-negative int64.
    """
    return torch.randint(0, 2**63 - 1, (batch_size,), dtype=torch.int64, device=device, generator=generator)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b``; the int64 product wraps around, which leaves all 64 bits right."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Word ``token % 4`` of Philox4x32-10 with key ``seed`` and counter ``(token // 4, position, 0, 0)``.

    One block of four 32-bit words serves four neighbouring tokens. The arguments are int64 and broadcast against each
    other; of ``positions`` and ``tokens`` the low 32 bits count.

    Returns:
        int64 in ``[0, 2**32)``.
    """
    tokens, positions, seeds = torch.broadcast_tensors(tokens & _MASK, positions & _MASK, seeds)
    c0, c1, c2, c3 = tokens >> 2, positions, torch.zeros_like(tokens), torch.zeros_like(tokens)
    k0, k1 = seeds & _MASK, (seeds >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    words = torch.stack([c0, c1, c2, c3], dim=-1)
    return words.gather(-1, (tokens & 3)[..., None])[..., 0]


def gumbel_noise(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise ``-log(-log(1 - u))`` with ``u = (x + 1/2) / 2**32`` for the Philox word ``x``.

    Large noise comes from small ``u``, where the grid of ``u`` is finest.

    Returns:
        float64 of the arguments' broadcast shape.
    """
    u = (philox(seeds, positions, tokens).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u))
