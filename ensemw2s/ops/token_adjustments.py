"""What ``mixture_sample`` may be asked to do to single tokens of a row: biases, penalties for repetition, a mask."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ensemw2s.ops.checks import check_same_device, check_tensor, number, refuse_rows, shown
from ensemw2s.ops.sample_settings import of_rows

_WORD = 32
# The largest and the smallest positive float32.
_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, 2.0**-149


class TokenAdjustments(NamedTuple):
    """For every row the tokens whose log-probabilities change, and how; ``token_adjustments`` makes one.

    A listed token's log-probability ``x`` becomes ``y = x + bias``, then ``y * repetition`` if ``y < 0`` and otherwise
    ``y / repetition``, less ``penalty``; at most the largest float32.

    Attributes:
        tokens: int32 ``[B, N]``, ascending in each row; -1 behind the last one.
        values: float32 ``[3, B, N]``, their ``bias``, ``repetition`` and ``penalty``.
        listed: int32 ``[B, ceil(V / 32)]``, in which bit ``v % 32`` of word ``v // 32`` says whether token v is listed.
    """

    tokens: Tensor
    values: Tensor
    listed: Tensor


def token_adjustments(
    vocabulary: int,
    *,
    bias_tokens: Tensor | None = None,
    bias: Tensor | None = None,
    prompt: Tensor | None = None,
    generated: Tensor | None = None,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
) -> TokenAdjustments:
    """Biases and penalties of B rows for ``mixture_sample``, which act on the mixture's log-probabilities.

    In this order: ``bias`` is added; ``repetition_penalty`` multiplies what is negative then and divides the rest
    (transformers' ``RepetitionPenaltyLogitsProcessor`` on ``scores = mixture_log_probs(...)``, vLLM's on such logits),
    for tokens of the prompt and of what was generated; ``frequency_penalty`` times a token's count in what was
    generated and ``presence_penalty``, if it is there at all, are subtracted (OpenAI's and vLLM's).

    In all token tensors a negative id stands for none, so that rows of different lengths fit into one tensor. Nothing
    here waits for a device.

    Args:
        vocabulary: V.
        bias_tokens: int64 or int32 ``[B, K]``; the biases of a token that is there twice are added.
        bias: float ``[B, K]``, of each of them in nats; -inf forbids the token.
        prompt: int64 or int32 ``[B, P]``.
        generated: int64 or int32 ``[B, G]``; ``[B, 0]`` while there is nothing yet.
        repetition_penalty: Positive; 1 is off. A number, or float32 or float64 ``[B]``.
        presence_penalty: Finite, in nats; 0 is off, a negative one favours. A number or ``[B]``.
        frequency_penalty: Finite, in nats for each time; 0 is off. A number or ``[B]``.

    Returns:
        The adjustments, on the device of the token tensors.

    Raises:
        ValueError: No token tensor is given, a presence or frequency penalty comes without ``generated``, shapes do not
            fit each other, or a value is out of its range. Values inside tensors are looked at on the CPU; elsewhere
            they make their row not valid.
        TypeError: A dtype is wrong.
    """
    if (bias_tokens is None) != (bias is None):
        raise ValueError("bias_tokens and bias go together: give both or neither")
    named = {"bias_tokens": bias_tokens, "prompt": prompt, "generated": generated}
    if generated is None:
        _refuse_idle(presence_penalty=presence_penalty, frequency_penalty=frequency_penalty)
    given = {name: _token_ids(tokens, name) for name, tokens in named.items() if tokens is not None}
    if not given:
        raise ValueError("no tokens to adjust: give bias_tokens and bias, prompt or generated")
    first_name, first = next(iter(given.items()))
    for name, tokens in given.items():
        if len(tokens) != len(first):
            raise ValueError(f"{name} has {len(tokens)} rows, {first_name} has {len(first)}")
        check_same_device(tokens, first, name)
        _refuse_values(name, tokens, tokens < vocabulary, f"below the vocabulary of {vocabulary}, or negative for none")
    none = first.new_zeros((len(first), 0))
    groups = [given.get(name, none) for name in ("bias_tokens", "prompt", "generated")]
    biases = none.to(torch.float32) if bias is None else _biases(bias, groups[0])
    rates = [
        _rate(value, name, first, positive=name == "repetition_penalty")
        for name, value in (
            ("repetition_penalty", repetition_penalty),
            ("presence_penalty", presence_penalty),
            ("frequency_penalty", frequency_penalty),
        )
    ]
    return _listed_once(vocabulary, groups, biases, *rates)


def _refuse_idle(**penalties: float | Tensor) -> None:
    for name, value in penalties.items():
        if isinstance(value, Tensor) or value != 0:
            raise ValueError(
                f"{name} counts what was generated, which is not given: give generated, a tensor [B, G] (of [B, 0] at "
                "the first token)"
            )


def check_mask(mask: Any, rows: int, logits: Tensor) -> Tensor | None:
    """A mask for logits ``[..., V]`` of so many rows as kernels take it, or None."""
    if mask is None:
        return None
    check_tensor(mask, "mask")
    if mask.dtype != torch.int32:
        raise TypeError(
            f"mask must be int32, 32 tokens to a number, got {mask.dtype}; ops.pack_mask(allowed) makes one"
        )
    return _packed(mask, "mask", rows, logits)


def check_adjustments(
    adjustments: Any, rows: int, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """The parts of adjustments for logits ``[..., V]`` of so many rows as kernels take them, or nothing."""
    if adjustments is None:
        return None, None, None
    if not isinstance(adjustments, TokenAdjustments):
        raise TypeError(f"adjustments must be what ops.token_adjustments returns, got {type(adjustments).__name__}")
    tokens, values, listed = adjustments
    if len(tokens) != rows:
        raise ValueError(f"adjustments are of {len(tokens)} rows, the logits have {rows}")
    check_same_device(tokens, logits, "adjustments")
    return tokens, values, _packed(listed, "adjustments.listed", rows, logits)


def check_listed_tokens(adjustments: TokenAdjustments | None, vocabulary: int) -> None:
    """Refuse tokens that logits ``[..., V]`` do not have; on the CPU only, as the compiled kernel does."""
    if adjustments is not None:
        tokens = adjustments.tokens
        _refuse_values("the tokens of adjustments", tokens, tokens < vocabulary, f"below {vocabulary}")


def _packed(bits: Tensor, name: str, rows: int, logits: Tensor) -> Tensor:
    vocabulary = logits.shape[-1]
    shape = (rows, -(-vocabulary // _WORD))
    if bits.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape}, a bit for each of {vocabulary} tokens, got {tuple(bits.shape)}"
        )
    check_same_device(bits, logits, name)
    return bits.contiguous()


def pack_mask(allowed: Tensor) -> Tensor:
    """The int32 mask ``[..., ceil(V / 32)]`` of a bool ``[..., V]``: bit ``v % 32`` of word ``v // 32`` is token v's.

    xgrammar and llguidance fill masks of this form.
    """
    check_tensor(allowed, "allowed")
    if allowed.dtype != torch.bool or allowed.dim() < 1:
        raise TypeError(f"allowed must be bool [..., V], got {allowed.dtype} {tuple(allowed.shape)}")
    words = -(-allowed.shape[-1] // _WORD)
    padded = torch.nn.functional.pad(allowed, (0, words * _WORD - allowed.shape[-1]))
    bits = padded.view(*allowed.shape[:-1], words, _WORD)
    places = torch.arange(_WORD, device=allowed.device, dtype=torch.int32)
    return (bits.to(torch.int32) << places).sum(-1, dtype=torch.int32)


def unpack_mask(mask: Tensor, vocabulary: int) -> Tensor:
    """The bool ``[B, V]`` of a mask int32 ``[B, ceil(V / 32)]``."""
    bits = (mask[..., None] >> torch.arange(_WORD, device=mask.device, dtype=torch.int32)) & 1
    return bits.flatten(1)[:, :vocabulary].to(torch.bool)


def adjusted(log_probs: Tensor, adjustments: TokenAdjustments) -> tuple[Tensor, Tensor]:
    """The log-probabilities ``[B, V]`` with those of listed tokens changed, and whether a row's values are usable."""
    tokens, (bias, repetition, penalty), _ = adjustments
    is_token = tokens >= 0
    places = tokens.clamp(0, log_probs.shape[1] - 1).to(torch.int64)
    shifted = log_probs.gather(1, places) + bias
    changed = torch.where(shifted < 0, shifted * repetition, shifted / repetition) - penalty
    changed = changed.clamp(max=torch.finfo(torch.float32).max)
    good = (bias < torch.inf) & (repetition > 0) & (repetition < torch.inf) & (penalty > -torch.inf)
    # None of the places that stand for no token may write over one that does.
    return (
        torch.cat((log_probs, log_probs[:, :1]), 1).scatter(
            1, torch.where(is_token, places, log_probs.shape[1]), changed.to(log_probs.dtype)
        )[:, :-1],
        (good & (tokens < log_probs.shape[1]) | ~is_token).all(1),
    )


def _listed_once(
    vocabulary: int, groups: list[Tensor], biases: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> TokenAdjustments:
    """Each row's tokens in order, each once, with what its appearances among the three groups amount to."""
    sizes = [group.shape[1] for group in groups]
    # What stands for none goes behind all tokens.
    tokens, order = torch.cat(groups, 1).to(torch.int64).where(torch.cat(groups, 1) >= 0, vocabulary).sort(dim=1)
    is_first = torch.ones_like(tokens, dtype=torch.bool)
    is_first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    place = is_first.cumsum(1) - 1
    appearances = torch.zeros((4, *tokens.shape), dtype=torch.float32, device=tokens.device)
    start = 0
    for group, size in enumerate(sizes):
        inside = (order >= start) & (order < start + size)
        appearances[group] = inside
        if group == 0 and size:
            appearances[3] = torch.where(inside, biases.gather(1, order.clamp(max=size - 1)), 0.0)
        start += size
    sums = torch.zeros_like(appearances).scatter_add_(2, place.expand_as(appearances), appearances)
    unique = torch.full_like(tokens, vocabulary).scatter_(1, place, tokens)
    _, prompted, counts, bias = sums
    seen = (prompted + counts) > 0
    values = torch.stack(
        (bias, torch.where(seen, repetition, 1.0), torch.where(counts > 0, presence + frequency * counts, 0.0))
    )
    is_token = unique < vocabulary
    return TokenAdjustments(unique.where(is_token, -1).to(torch.int32), values, mask_of(unique, is_token, vocabulary))


def mask_of(tokens: Tensor, is_token: Tensor, vocabulary: int) -> Tensor:
    """A mask int32 ``[B, ceil(V / 32)]`` of tokens that are all different, so that bits add up to words."""
    words = torch.zeros((len(tokens), -(-vocabulary // _WORD)), dtype=torch.int32, device=tokens.device)
    bits = torch.where(is_token, torch.ones_like(tokens) << (tokens % _WORD), 0).to(torch.int32)
    return words.scatter_add_(1, torch.where(is_token, tokens // _WORD, 0), bits)


def _token_ids(tokens: Any, name: str) -> Tensor:
    check_tensor(tokens, name)
    if tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int64 or int32, got {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"{name} must be [B, N], got shape {tuple(tokens.shape)}")
    return tokens


def _biases(bias: Any, tokens: Tensor) -> Tensor:
    check_tensor(bias, "bias")
    if not bias.is_floating_point():
        raise TypeError(f"bias must be floating point, got {bias.dtype}")
    if bias.shape != tokens.shape:
        raise ValueError(f"bias must have the shape of bias_tokens, {tuple(tokens.shape)}, got {tuple(bias.shape)}")
    check_same_device(bias, tokens, "bias")
    _refuse_values("bias", bias, bias < math.inf, "a number below infinity")
    return bias.detach().to(torch.float32)


def _rate(value: Any, name: str, tokens: Tensor, *, positive: bool) -> Tensor:
    """A penalty as float32 ``[B, 1]`` or ``[1, 1]``."""
    expected = "positive and finite (1 is off)" if positive else "finite (0 is off)"
    if not isinstance(value, Tensor):
        found = number(value, name)
        if not abs(found) <= _LARGEST or (positive and found < _SMALLEST):
            raise ValueError(f"{name}={shown(value)} must be {expected}")
        return torch.full((1, 1), found, dtype=torch.float32, device=tokens.device)
    rates = of_rows(value, name, tokens).to(torch.float32)
    _refuse_values(name, value, rates.isfinite() & ((rates > 0) | (not positive)), expected)
    return rates[:, None]


def _refuse_values(name: str, values: Tensor, good: Tensor, expected: str) -> None:
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        refuse_rows(name, values, good, expected)
