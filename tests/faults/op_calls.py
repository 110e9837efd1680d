"""Random calls of the ops, hostile ones among them, and what each must give, in float64 and without torch.

`python -m tests.faults.op_calls --calls N --seed S [--impl cpp]` makes N of them in one process and says which was
wrong. Everything that is expected is worked out here in numpy, from the definitions in the ops' docstrings, but for the
noise of the Gumbel race.

To fuzz a new setting of `mixture_sample`, give it values in `SETTINGS` and a line in `supports`; it is drawn as a
number for all rows and as a tensor of each row's. To fuzz a new op, write a function that draws its arguments, calls it
and compares, and name it in `OPS`.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemw2s import ops
from ensemw2s.ops.checks import COMBINES, MASKED_LABEL, shown
from ensemw2s.ops.randomness import gumbel_noise
from ensemw2s.ops.token_adjustments import pack_mask, token_adjustments, unpack_mask

Array = np.ndarray
Random = np.random.Generator
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 5, 16, 17, 33, 64, 65, 100, 255, 256, 257)
LARGE_SIZES = (1023, 1024, 1025, 2500, 8195)
FLOAT32 = torch.finfo(torch.float32)
# Triton's interpreter misreads subnormal numbers of bfloat16: it gives other ones, in another order.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Log-probabilities below this may be -inf in float32, and shares of the weight below it 0.
LEAST, LEAST_SHARE = -3.3e38, 2.0**-149
TEMPERATURES = (0.0, 0.3, 0.7, 1.0, 1.0, 1.5, 100.0, 1e-3, 1e-6, 1e-12, 1e-30, 1e-38, 2e-39, 1e-45, 5e-324, 1e30, 1e300)
SETTINGS: dict[str, tuple[Any, ...]] = {
    "temperature": TEMPERATURES,
    "top_k": (0, 0, 0, 1, 2, 5, 50, 300, 2**40, 2**63 - 1),
    "top_p": (1.0, 1.0, 0.95, 0.9, 0.5, 0.1, 1e-46, 5e-324, 1 - 1e-9),
    "min_p": (0.0, 0.0, 0.05, 0.5, 1.0, 1 - 1e-7, 1e-300),
}
CALLS_PER_INPUT = 6
COLDEST = 1e-30  # a lower temperature is greedy


class Wrong(AssertionError):
    """An op gave something else than its definition."""


def expect(condition: object, *what: object) -> None:
    """Raise `Wrong` with all that is known unless `condition` holds."""
    if not condition:
        raise Wrong("\n".join(str(x) for x in what))


# ---- inputs ----


def usual(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    return 3 * random.standard_normal(shape)


def shifted(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    return 3 * random.standard_normal(shape) + random.choice((300, -300, 3000, -3000, 3e4, 1e5, -1e6))


def huge(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    return random.standard_normal(shape) * random.choice((1e4, 1e8, 1e20, 1e37))


def extreme(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    least, largest = torch.finfo(dtype).min, torch.finfo(dtype).max
    return random.choice((least, least, largest, 0.0, -0.0, 1.0, 1e-45, least / 2, largest / 2), shape)


def masked(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    values = 3 * random.standard_normal(shape)
    mask = random.random(shape) < random.choice((0.1, 0.5, 0.9))
    if random.random() < 0.3:
        mask[..., : shape[-1] // 4] = True
    values[mask] = random.choice((-np.inf, torch.finfo(dtype).min, -1e4, -1e9))
    return values


def tied(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    return random.integers(0, 3, shape).astype(float)


def flat(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    return np.full(shape, random.choice((0.0, 7.0, -1e4, 1e-45, torch.finfo(dtype).min, torch.finfo(dtype).max)))


def subnormal(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    return random.standard_normal(shape) * 1e-40


def peaked(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    return random.standard_normal(shape) + random.choice((8.0, 1e3, 1e4)) * (random.random(shape) < 0.05)


def broken(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    values = 3 * random.standard_normal(shape)
    if values.size:
        values.reshape(-1)[random.integers(values.size)] = random.choice((np.nan, np.inf))
    if shape[0] > 1 and random.random() < 0.5:
        values[0] = -np.inf
    return values


LOGITS = (usual, usual, usual, shifted, huge, extreme, masked, masked, tied, flat, subnormal, peaked, broken)


def mixture_weights(random: Random, experts: int) -> Array:
    values = random.random(experts) + 0.1
    kind = random.integers(8)
    if kind == 0:
        values[random.random(experts) < 0.5] = 0.0
    elif kind == 1:
        values *= 1e38 * random.choice((1.0, 3.0))
    elif kind == 2:
        values = np.full(experts, 1e-45)
    elif kind == 3:
        values = values * 10.0 ** random.integers(-44, 38, experts)
        shares = values / values.sum()
        # Rounding decides whether float32 makes such a share 0 or the least that it holds.
        values[(shares > LEAST_SHARE / 4) & (shares < LEAST_SHARE)] = 0.0
    values[random.integers(experts)] += not values.any()
    return values


def weights_of_rows(random: Random, rows: int, experts: int) -> Array:
    """float32 [rows, experts]; some rows have none."""
    values = [mixture_weights(random, experts) * (random.random() > 0.08) for _ in range(rows)]
    return np.array(values, dtype=np.float32).reshape(rows, experts)


def token_weights(random: Random, rows: int) -> Array:
    values = random.random(rows) * random.choice((1.0, 1.0, 1.0, 1e30, 1e-30, 1e-44, -1.0))
    values[random.random(rows) < 0.2] = 0.0
    return values


def in_some_layout(random: Random, tensor: Tensor) -> Tensor:
    """The same values, in memory as they might come from a user's slice or transposition."""
    kind = random.integers(5)
    if kind == 0 and tensor.dim() == 2:  # rows of a wider tensor
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 3), torch.nan, dtype=tensor.dtype)
        return wide[:, 1:-2].copy_(tensor)
    if kind == 1 and tensor.dim() == 2:  # columns first
        return tensor.T.contiguous().T
    if kind == 2 and tensor.dim() == 1 and tensor.numel():  # every second element
        return torch.stack([tensor, tensor], -1).flatten()[::2]
    return tensor


class Inputs:
    """Logits [T, B, V] of T experts with weights, labels and the rest; `z` and so on are what numpy sees of them."""

    def __init__(self, random: Random, *, large: bool = True, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
        self.random = random
        self.dtype = dtypes[random.integers(len(dtypes))]
        self.size = int(random.choice(LARGE_SIZES if large and random.random() < 0.04 else SIZES))
        self.experts, self.rows = int(random.integers(1, 10)), int(random.integers(0, 5))
        kind = LOGITS[random.integers(len(LOGITS))]
        kinds = [kind if random.random() < 0.7 else LOGITS[random.integers(len(LOGITS))] for _ in range(self.experts)]
        self.kinds = [x.__name__ for x in kinds]
        self.logits = [self.tensor(x(random, (self.rows, self.size), self.dtype)) for x in kinds]
        self.weights = in_some_layout(random, torch.tensor(mixture_weights(random, self.experts), dtype=torch.float32))
        self.shared = Mixture(self, self.weights)
        self.of_rows = Mixture(
            self, in_some_layout(random, torch.tensor(weights_of_rows(random, self.rows, self.experts)))
        )
        self.seeds, self.positions = self.keys(), self.keys()
        self.labels = torch.from_numpy(random.integers(0, self.size, self.rows))
        if self.rows:
            self.labels[random.random(self.rows) < 0.2] = MASKED_LABEL
            self.labels[0] = random.choice((0, self.size - 1))
        self.labels = in_some_layout(random, self.labels)
        self.token_weights = torch.tensor(token_weights(random, self.rows), dtype=torch.float32)

    def tensor(self, values: Array) -> Tensor:
        limit = torch.finfo(self.dtype).max
        finite = np.where(np.isfinite(values), np.clip(values, -limit, limit), values)
        if INTERPRETED and self.dtype == torch.bfloat16:
            finite = np.where(np.abs(finite) < torch.finfo(self.dtype).tiny, 0.0, finite)
        return in_some_layout(self.random, torch.from_numpy(finite).to(self.dtype))

    def keys(self) -> Tensor:
        drawn = self.random.integers(-(2**63), 2**63 - 1, max(self.rows, 1))
        one = torch.from_numpy(drawn)[:1].expand(self.rows)
        return one if self.random.random() < 0.3 else in_some_layout(self.random, torch.from_numpy(drawn)[: self.rows])

    def __str__(self) -> str:
        return (
            f"{self.experts} experts x {self.rows} rows x {self.size} tokens, {self.dtype}, {self.kinds}, "
            f"weights {self.weights.tolist()}, or of each row {self.of_rows.weights.tolist()}"
        )

    # ---- in float64 ----

    @cached_property
    def z(self) -> Array:
        return np.stack([x.double().numpy() for x in self.logits])

    @cached_property
    def shares(self) -> Array:
        """Those of `weights` [T]."""
        return self.shared.shares[:, 0] if self.rows else np.ones(self.experts) / self.experts

    @cached_property
    def fall(self) -> Array:
        """Distance to the largest logit of the row, of each expert."""
        return self.z - self.z.max(-1, keepdims=True)

    @cached_property
    def own(self) -> Array:
        """The experts' own log-probabilities."""
        return log_softmax(self.z)

    @cached_property
    def noise(self) -> Array:
        return gumbel_noise(self.seeds[:, None], self.positions[:, None], torch.arange(self.size)).numpy()

    def any_mixture(self) -> Mixture:
        return self.of_rows if self.random.random() < 0.5 else self.shared


class Mixture:
    """The mixture of an input's experts by weights [T], or [B, T] of each row."""

    def __init__(self, inputs: Inputs, weights: Tensor) -> None:
        self.inputs, self.weights = inputs, weights

    @cached_property
    def shares(self) -> Array:
        """[T, B]; zeros in a row without weight."""
        weights = self.weights.double().numpy()
        weights = np.broadcast_to(weights, (self.inputs.rows, self.inputs.experts)).T
        total = weights.sum(0)
        shares = weights / np.where(total > 0, total, 1.0)
        return np.where(shares < LEAST_SHARE, 0.0, shares)

    @cached_property
    def active(self) -> Array:
        """[T, B, 1], which experts have a say in a row."""
        return self.shares[..., None] > 0

    @cached_property
    def product(self) -> Array:
        """The scores [B, V] of the product of experts."""
        return np.where(self.active, self.shares[..., None] * self.inputs.fall, 0.0).sum(0)

    @cached_property
    def mixtures(self) -> dict[str, tuple[Array, Array]]:
        return {combine: self._mixture(combine) for combine in COMBINES}

    @cached_property
    def z(self) -> Array:
        """The logits of experts that have a say, zeros of the others."""
        return np.where(self.active, self.inputs.z, 0.0)

    def is_borderline(self) -> bool:
        """Say whether float32 may or may not hold the largest score of a product: rounding decides what is valid."""
        largest = self.product.max(-1, initial=-np.inf)
        return bool(((largest > -3.5e38) & (largest < -3.2e38)).any())

    def _mixture(self, combine: str) -> tuple[Array, Array]:
        """Log-probabilities [B, V], and how far float32 may be off."""
        active, z, own = self.active, self.z, self.inputs.own
        w = self.shares[..., None]
        usable = (np.isfinite(self.inputs.z.max(-1, keepdims=True)) | ~active).all(0) & active.any(0)
        of_shares = LEAST_SHARE / np.where(active, w, 1.0).min(0)  # a subnormal share has few digits
        if combine == "prob":
            mixed = log_sum_exp(np.where(active, own, -np.inf) + np.log(np.where(active, w, 1.0)), 0)
            off = 2e-6 + of_shares + 6e-7 * np.abs(mixed)
        elif combine == "vote":
            votes = np.zeros(z.shape)
            np.put_along_axis(votes, np.nan_to_num(z, nan=-np.inf).argmax(-1)[..., None], 1.0, -1)
            mixed = np.log((w * votes).sum(0))
            off = 2e-6 + of_shares + 6e-7 * np.abs(mixed)
        else:
            scores = self.product
            largest = scores.max(-1, keepdims=True) if self.inputs.size else scores
            # More than float32 holds: then its product has no token.
            usable = usable & (largest > LEAST)
            mixed = log_softmax(scores)
            off = (of_shares + 2e-7 * (4 + active.sum(0))) * (np.abs(scores) + np.abs(largest))
            off = np.where(scores < LEAST, np.inf, 2e-6 + off + 6e-7 * np.abs(mixed))
        return np.where(usable, mixed, np.nan), off


def equals_of(log_probs: Array, z: Array) -> Array:
    """Which tokens [B, V] are as likely as the likeliest in any arithmetic: no expert tells them apart."""
    best = np.nan_to_num(log_probs, nan=-np.inf).argmax(-1)
    return (z == np.take_along_axis(z, best[None, :, None], -1)).all(0)


def log_sum_exp(x: Array, axis: int) -> Array:
    largest = x.max(axis, keepdims=True)
    base = np.where(np.isfinite(largest), largest, 0.0)
    return np.log(np.exp(x - base).sum(axis)) + np.squeeze(base, axis)


def log_softmax(z: Array) -> Array:
    fall = z - z.max(-1, keepdims=True)
    return fall - np.log(np.exp(fall).sum(-1, keepdims=True))


# ---- comparisons ----


def close(got: Tensor, exact: Array, off: Array | float, name: str, *context: object) -> None:
    """Refuse a float32 result that is further than `off` from `exact`, where that is what float32 can hold."""
    ours = got.detach().double().numpy()
    off = np.broadcast_to(off, exact.shape)
    same = (ours == exact) | (np.isnan(ours) & np.isnan(exact)) | (np.abs(ours - exact) <= off)
    beyond = np.abs(exact) >= -LEAST
    same |= beyond & (np.abs(ours) >= -LEAST) & (np.sign(ours) == np.sign(exact))
    if same.all() and ours.shape == exact.shape:
        return
    at = tuple(int(x[0]) for x in np.nonzero(np.atleast_1d(~same))) if ours.shape == exact.shape else "shape"
    detail = (ours.shape, exact.shape) if at == "shape" else tuple(np.atleast_1d(x)[at] for x in (ours, exact, off))
    raise Wrong(f"{name} at {at}: got, exact, allowed error = {detail}\n" + "\n".join(str(x) for x in context))


def mixture_log_probs(inputs: Inputs, impl: Any) -> None:
    combine, mixture = str(inputs.random.choice(COMBINES)), inputs.any_mixture()
    got = impl.mixture_log_probs(inputs.logits, mixture.weights, combine)
    exact, off = mixture.mixtures[combine]
    close(got, exact, off, f"log-probabilities, {combine}", inputs)


Asked = dict[str, Array]  # the settings of some rows, each [B, 1]


def any_settings(random: Random, rows: int) -> tuple[dict[str, Any], Asked]:
    """What the op is given, each a number or a tensor [B] in any of its dtypes, and what the rows are asked for."""
    given: dict[str, Any] = {}
    asked: Asked = {}
    for name, values in SETTINGS.items():
        if random.random() < 0.6:
            given[name] = values[random.integers(len(values))]
            asked[name] = np.full((rows, 1), given[name])
        else:
            given[name] = tensor_of_rows(random, name, [values[i] for i in random.integers(len(values), size=rows)])
            asked[name] = given[name].numpy()[:, None]
        asked[name] = asked[name].astype(np.int64 if name == "top_k" else np.float64)
    return given, asked


def tensor_of_rows(random: Random, name: str, values: list[Any]) -> Tensor:
    """The values in a dtype that a setting may have; a narrow one holds no more than it can."""
    is_narrow = random.random() < 0.5
    if name == "top_k":
        tensor = torch.tensor([min(x, 2**31 - 1) for x in values] if is_narrow else values, dtype=torch.int64)
        return in_some_layout(random, tensor.int() if is_narrow else tensor)
    wide = torch.tensor(values, dtype=torch.float64)
    narrow = wide.float()
    # A top-p of 0 and a temperature of infinity are refused.
    holds = bool((narrow.isfinite() & ((narrow > 0) == (wide > 0))).all())
    return in_some_layout(random, narrow if is_narrow and holds else wide)


def supports(log_probs: Array, off: Array, equals: Array, asked: Asked) -> tuple[Array, Array]:
    """The tokens that the filters must leave, and those that they may leave where rounding decides.

    Args:
        log_probs: [B, V], exact.
        off: [B, V], rounding that float32 may have.
        equals: [B, V], the tokens that no expert tells from the likeliest.
        asked: settings of rows that are not greedy.
    """
    size = log_probs.shape[-1]
    likeliest = log_probs.max(-1, keepdims=True)
    either = 2 * np.where(log_probs > -np.inf, off, 0.0) + 1e-7 * np.abs(likeliest)
    sure, maybe = (log_probs - off > LEAST), (log_probs > -np.inf)
    counts = (asked["top_k"] > 0) & (asked["top_k"] < size)
    place = np.where(counts, size - asked["top_k"], 0)
    edge = np.where(counts, np.take_along_axis(np.sort(log_probs, -1), place, -1), -np.inf)
    maybe = maybe & (log_probs >= edge - either)
    ties = counts & (np.abs(log_probs - edge) <= either) & (log_probs != edge)
    sure = sure & np.where(ties.any(-1, keepdims=True), log_probs > edge + either, log_probs >= edge)
    has_nucleus = asked["top_p"] < 1
    narrow, wide = nucleus(log_probs, sure, maybe, either, equals, asked)
    sure, maybe = np.where(has_nucleus, narrow, sure), np.where(has_nucleus, wide, maybe)
    has_min_p = asked["min_p"] > 0
    edge = likeliest + asked["temperature"] * np.log(np.where(has_min_p, asked["min_p"], 1.0))
    margin = either + 1e-5 * asked["temperature"]
    rivals = (log_probs >= likeliest - either) & ~equals
    is_clear = equals & ~rivals.any(-1, keepdims=True)
    sure = sure & (~has_min_p | (log_probs >= edge + margin) | is_clear)
    maybe = maybe & (~has_min_p | (log_probs >= edge - margin))
    return sure, maybe


def nucleus(
    log_probs: Array, sure: Array, maybe: Array, either: Array, equals: Array, asked: Asked
) -> tuple[Array, Array]:
    order = np.argsort(-log_probs, -1, kind="stable")
    likeliest = log_probs.max(-1, keepdims=True)
    reach = either.min(-1, keepdims=True) / asked["temperature"]
    margin = 1e-5 + np.minimum(1.0, 4 * reach)

    def within(kept: Array, top_p: Array) -> Array:
        mass = np.where(kept, np.exp((log_probs - likeliest) / asked["temperature"]), 0.0)
        ordered = np.take_along_axis(mass / mass.sum(-1, keepdims=True), order, -1)
        inside = np.cumsum(ordered, -1) - ordered < top_p
        inside[:, 0] = True
        found = np.zeros_like(kept)
        np.put_along_axis(found, order, inside, -1)
        return found & kept

    # Where top-k left it open which tokens stay, their masses are open too.
    open_rows = (sure != maybe).any(-1, keepdims=True)
    wide = np.where(open_rows, maybe, within(maybe, asked["top_p"] + margin))
    narrow = within(maybe, asked["top_p"] - margin) & sure
    least = np.where(wide, log_probs, np.inf).min(-1, keepdims=True)
    # Equals go by their ids, but where others are nearly as likely rounding decides who is an equal.
    near = maybe & (log_probs >= least - either)
    nearly = (near & (log_probs != least) & (log_probs <= least + either)).any(-1, keepdims=True)
    # As likely as the likeliest out of other logits: equal in float64, perhaps not in float32.
    by_chance = (log_probs == likeliest) & ~equals
    wide |= near & (nearly | by_chance | (log_probs != least))
    edge = np.where(narrow, log_probs, np.inf).min(-1, keepdims=True)
    at_edge = (np.abs(log_probs - edge) <= either) & maybe
    others = at_edge & ((log_probs != edge) | by_chance)
    mixed = (at_edge & ~narrow).any(-1, keepdims=True) & others.any(-1, keepdims=True)
    narrow = np.where(mixed, narrow & (log_probs > edge + either), narrow)
    return np.where(open_rows, False, narrow), wide


def any_offer(random: Random, rows: int, size: int) -> dict[str, Any]:
    """A mask, adjustments, both or neither."""
    offer: dict[str, Any] = {}
    if random.random() < 0.3:
        share = random.choice((0.0, 0.05, 0.5, 0.95, 1.0))
        offer["mask"] = pack_mask(torch.from_numpy(random.random((rows, size)) < share))
    if random.random() < 0.3:
        count = int(random.integers(0, 9))
        tokens = [torch.from_numpy(random.integers(-2, size, (rows, count))) for _ in range(3)]
        bias = torch.from_numpy(random.choice((-np.inf, -40.0, -1.0, 0.0, 0.5, 30.0, 1e20), (rows, count)))
        rates = [float(random.choice(x)) for x in ((1.0, 0.5, 1.3, 40.0), (0.0, -2.0, 1.5), (0.0, 0.25, -1.0))]
        offer["adjustments"] = token_adjustments(
            size, bias_tokens=tokens[0], bias=bias, prompt=tokens[1], generated=tokens[2], repetition_penalty=rates[0],
            presence_penalty=rates[1], frequency_penalty=rates[2],
        )  # fmt: skip
    return offer


def offered(exact: Array, off: Array, offer: dict[str, Any]) -> tuple[Array, Array, Array]:
    """The log-probabilities at which tokens are offered, their rounding, and which tokens are offered as they are."""
    scores, rounding, plain = exact.copy(), np.broadcast_to(off, exact.shape).copy(), np.ones(exact.shape, dtype=bool)
    if "adjustments" in offer:
        tokens, values, _ = (x.numpy() for x in offer["adjustments"])
        bias, repetition, penalty = values.astype(np.float64)
        for row, place in zip(*np.nonzero(tokens >= 0), strict=True):
            token, rate = tokens[row, place], repetition[row, place]
            before = exact[row, token]
            shifted = before + bias[row, place]
            after = (shifted * rate if shifted < 0 else shifted / rate) - penalty[row, place]
            scores[row, token], plain[row, token] = after, False
            scale = max(rate, 1 / rate)
            sizes = sum(abs(x) for x in (before, shifted, after) if np.isfinite(x))
            rounding[row, token] = rounding[row, token] * scale + 1e-6 * (1 + scale * sizes)
    if "mask" in offer:
        allowed = unpack_mask(offer["mask"], exact.shape[1]).numpy()
        scores, plain = np.where(allowed | np.isnan(scores), scores, -np.inf), plain & allowed
    return scores, rounding, plain


def mixture_sample(inputs: Inputs, impl: Any) -> None:
    random = inputs.random
    combine, mixture = str(random.choice(COMBINES)), inputs.any_mixture()
    given, asked = any_settings(random, inputs.rows)
    count = int(random.choice((0, 0, 1, 3, 20, 64)))
    count = min(count, inputs.size)
    keys = {"seeds": inputs.seeds, "positions": inputs.positions}
    offer = any_offer(random, inputs.rows, inputs.size)
    got = impl.mixture_sample(
        inputs.logits, mixture.weights, combine=combine, top_logprobs=count, **keys, **given, **offer
    )
    exact, off = mixture.mixtures[combine]
    scores, room, plain = offered(exact, off, offer)
    context = (combine, given, count, keys, offer, got, inputs)
    valid, tokens = got.valid.numpy(), got.tokens.numpy()
    usable = ~np.isnan(exact).any(-1)
    expect(bool(offer) or (valid == usable).all(), "valid", *context)
    # Whether the least of all numbers are possible is rounding's to say.
    expect(valid[usable & (scores - room > LEAST).any(-1)].all(), "a row that is valid", *context)
    expect(not valid[~usable | ~(scores > -np.inf).any(-1)].any(), "valid", *context)
    expect(
        (tokens[~valid] == -1).all() and got.log_probs[~got.valid].isnan().all(), "a row that is not valid", *context
    )
    expect(got.expert_log_probs[:, ~got.valid].isnan().all(), "experts of a row that is not valid", *context)
    expect(
        (got.top_tokens[~got.valid] == -1).all() and got.top_log_probs[~got.valid].isnan().all(),
        "the likeliest of a row that is not valid",
        *context,
    )
    rows = np.nonzero(valid)[0]
    tokens = tokens[rows]
    expect(((tokens >= 0) & (tokens < inputs.size)).all(), "no token", *context)
    close(got.log_probs[rows], exact[rows, tokens], off[rows, tokens], "token's log-probability", *context)
    active = mixture.active[:, rows, 0]
    each = np.where(active, inputs.own[:, rows, tokens], 0.0)
    ours = torch.where(torch.from_numpy(active), got.expert_log_probs[:, rows], 0.0)
    close(ours, each, 2e-6 + 6e-7 * np.abs(each), "experts' log-probabilities", *context)
    best_likeliest(exact[rows], off[rows], got.top_tokens.numpy()[rows], got.top_log_probs[rows], context)
    greedy = asked["temperature"][rows, 0] < COLDEST
    for some, check in ((greedy, best_greedily), (~greedy, best_token)):
        here = rows[some]
        of_rows = {name: values[here] for name, values in asked.items()}
        # What is not offered, or not as it is, is no equal of another token.
        z = np.where(plain[here], mixture.z[:, here], np.nan)
        check(scores[here], room[here], z, inputs.noise[here], tokens[some], of_rows, context)


def best_likeliest(exact: Array, off: Array, tokens: Array, log_probs: Tensor, context: Any) -> None:
    """Refuse tokens that are not the likeliest, within rounding, each once and falling."""
    count = tokens.shape[-1]
    order = np.argsort(-exact, -1, kind="stable")[:, :count]
    room = np.maximum.accumulate(np.where(np.take_along_axis(exact, order, -1) > -np.inf, 1.0, 0.0)
                                 * np.nan_to_num(np.take_along_axis(off, order, -1), posinf=np.inf), -1)  # fmt: skip
    close(log_probs, np.take_along_axis(exact, order, -1), 2 * room, "log-probabilities of the likeliest", *context)
    values = log_probs.double().numpy()
    expect((values[:, 1:] <= values[:, :-1]).all(), "the likeliest do not fall", *context)
    expect(((tokens == -1) == (values == -np.inf)).all(), "impossible tokens among the likeliest", *context)
    at = np.where(tokens >= 0, tokens, 0)
    there, slack = np.take_along_axis(exact, at, -1), np.take_along_axis(off, at, -1)
    close(
        torch.where(torch.from_numpy(tokens >= 0), log_probs, 0.0),
        np.where(tokens >= 0, there, 0.0), slack, "a likely token's log-probability", *context,
    )  # fmt: skip
    for row in tokens:
        found = row[row >= 0]
        expect(len(set(found)) == len(found), "a token stands twice among the likeliest", *context)


def best_greedily(exact: Array, off: Array, z: Array, noise: Array, tokens: Array, asked: Asked, context: Any) -> None:
    """Refuse a token that another one beats by more than rounding, or that is not the lowest of equals."""
    here = np.arange(len(tokens))
    off = np.where(exact > -np.inf, off, 0.0)
    expect((exact[here, tokens] > -np.inf).all(), "an impossible token", *context)
    rivals = np.where(exact > -np.inf, exact - off, -np.inf)
    beaten = rivals.max(-1, initial=-np.inf) > exact[here, tokens] + off[here, tokens]
    expect(not beaten.any(), "another token is likelier", *context)
    if len(tokens):
        lower = (z == z[:, here, tokens][..., None]).all(0) & (np.arange(exact.shape[-1]) < tokens[:, None])
        expect(not lower.any() or context[0] == "vote", "a lower id is as likely", *context)


def best_token(exact: Array, off: Array, z: Array, noise: Array, tokens: Array, asked: Asked, context: Any) -> None:
    """Refuse a token that another one beats by more than rounding, or that the filters remove."""
    off = np.where(exact > -np.inf, off, 0.0)
    if not len(tokens):
        return
    sure, maybe = supports(exact, off, equals_of(exact, z), asked)
    scores = (exact - exact.max(-1, keepdims=True)) / asked["temperature"] + noise
    slack = off / asked["temperature"] + 5e-5 + 1e-6 * np.minimum(np.abs(scores), 1e6)
    here = np.arange(len(tokens))
    expect(maybe[here, tokens].all(), "the filters remove the token", *context)
    rivals = np.where(sure, scores - slack, -np.inf)
    beaten = rivals.max(-1, initial=-np.inf) > scores[here, tokens] + slack[here, tokens]
    expect(not beaten.any(), "another token is better", *context)


def label_scores(got: Any, log_probs: Array, off: Array, z: Array, inputs: Inputs, *context: object) -> None:
    labels = inputs.labels.numpy()
    read = labels != MASKED_LABEL
    rows, picked = np.arange(inputs.rows), np.where(read, labels, 0)
    usable = ~np.isnan(log_probs).any(-1)
    exact = np.where(read, log_probs[rows, picked], 0.0)
    exact = np.where(read & ~usable, np.nan, exact)
    close(got.log_probs, exact, np.where(read, off[rows, picked], 0.0), "label's log-probability", *context, inputs)
    p = np.exp(log_probs)
    terms = np.where(p > 0, p * log_probs, 0.0)
    entropy = np.where(read, np.where(usable, -terms.sum(-1), np.nan), 0.0)
    weighed = np.where(p > 0, p * off * (1 + np.abs(np.where(p > 0, log_probs, 0.0))), 0.0).sum(-1)
    close(got.entropy, entropy, 4e-6 + 4e-6 * np.abs(entropy) + 2 * weighed, "entropy", *context, inputs)
    equals = equals_of(log_probs, z)
    near = log_probs >= (log_probs.max(-1) - 2 * off.min(-1))[:, None]
    clear = ~(near & ~equals).any(-1)
    wrong = (got.correct.numpy() != ((equals.argmax(-1) == labels) & read & usable)) & (clear | ~usable | ~read)
    expect(not wrong.any(), "correct", *context, got, labels, inputs)


def token_scores(inputs: Inputs, impl: Any) -> None:
    got = impl.token_scores(inputs.logits[0], inputs.labels)
    own = np.where(np.isfinite(inputs.z[0].max(-1, keepdims=True)), inputs.own[0], np.nan)
    label_scores(got, own, 2e-6 + 6e-7 * np.abs(own), inputs.z[:1], inputs)


def mixture_scores(inputs: Inputs, impl: Any) -> None:
    combine, mixture = str(inputs.random.choice(COMBINES)), inputs.any_mixture()
    got = impl.mixture_scores(inputs.logits, mixture.weights, inputs.labels, combine)
    log_probs, off = mixture.mixtures[combine]
    # A vote is for each expert's first argmax: no columns to compare.
    z = log_probs[None] if combine == "vote" else mixture.z
    label_scores(got, log_probs, off, z, inputs, combine)


# ---- losses ----


def backward(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the leaves, zeros where the loss does not depend on one."""
    loss.backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def check_loss(got: Tensor, losses: Array, off: Array, weights: Array, *context: object) -> None:
    """The sum of weight times loss over the rows that count; the others' losses are 0."""
    if np.abs(np.where(weights != 0, losses, 0.0)).max(initial=0.0) > -LEAST and not got.isfinite():
        return  # float32 does not hold a row's loss
    terms = np.where(weights != 0, weights * losses, 0.0)
    room = np.where(weights != 0, np.abs(weights) * off, 0.0).sum() + 1e-6 * np.abs(terms[np.isfinite(terms)]).sum()
    close(got, np.asarray(terms.sum()), room + 1e-37, "loss", *context)


def check_gradient(got: Tensor, exact: Array, off: Array, name: str, *context: object) -> None:
    """Gradients in the leaf's dtype: its rounding is allowed, and infinity where it holds no more."""
    info = torch.finfo(got.dtype)
    ours = got.double()
    overflown = ours.isinf() & torch.from_numpy(np.abs(exact) + off >= 0.4 * info.max)
    ours = torch.where(overflown, torch.from_numpy(exact), ours)
    close(ours, exact, off + info.eps * np.abs(exact) + 2 * info.tiny, name, *context)


def weighted_cross_entropy(inputs: Inputs, impl: Any) -> None:
    logits, weights = leaf(inputs.logits[0]), leaf(inputs.token_weights)
    loss = impl.weighted_cross_entropy(logits, inputs.labels, weights)
    labels = inputs.labels.numpy()
    w = np.where(labels == MASKED_LABEL, 0.0, weights.detach().double().numpy())
    rows, picked = np.arange(inputs.rows), np.where(labels == MASKED_LABEL, 0, labels)
    log_q = np.where(np.isfinite(inputs.z[0].max(-1, keepdims=True)), inputs.own[0], np.nan)
    losses = np.where(w != 0, -log_q[rows, picked], 0.0)
    off = np.where(np.isfinite(losses), 2e-6 + 6e-7 * np.abs(losses), 0.0)
    check_loss(loss, losses, off, w, inputs, labels, weights)
    gradient = np.exp(log_q)
    gradient[rows, picked] -= 1
    gradient = np.where(w[:, None] != 0, w[:, None] * gradient, 0.0)
    grad_logits, grad_weights = backward(loss, [logits, weights])
    check_gradient(grad_logits, gradient, 2e-6 * np.abs(w[:, None]), "gradient of the logits", inputs, labels, weights)
    check_gradient(grad_weights, losses, off, "gradient of the weights", inputs, labels, weights)


def tempered(z: Array, temperature: float) -> Array:
    """Log-probabilities at a temperature; NaN in rows without them."""
    with_largest = np.where(np.isfinite(z.max(-1, keepdims=True)), z, np.nan)
    return log_softmax((with_largest - with_largest.max(-1, keepdims=True)) / temperature)


def kl_rows(log_p: Array, log_q: Array) -> tuple[Array, Array]:
    """KL of rows, and how far float32 may be off: it holds no probability below 1e-38 and no logarithm below LEAST."""
    p = np.exp(log_p)
    terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    sizes = np.where(p > 0, p * 3e-6 * (1 + np.abs(np.where(p > 0, log_p, 0.0)) + np.abs(log_q)), 0.0)
    lost = np.where(p < 1e-37, np.abs(terms), 0.0)
    beyond = (p > 0) & (log_q < LEAST)
    off = np.where(beyond.any(-1), np.inf, (np.where(beyond, 0, sizes) + lost).sum(-1) + 4e-6)
    return terms.sum(-1), off


def mixture_kl(inputs: Inputs, impl: Any) -> None:
    temperature = float(inputs.random.choice((1.0, 1.0, 0.5, 2.0, 1.7, 1e-3, 1e3, 1e-40, 1e300)))
    random = inputs.random
    student = leaf(
        inputs.tensor(LOGITS[random.integers(len(LOGITS))](random, (inputs.rows, inputs.size), inputs.dtype))
    )
    weights = leaf(inputs.token_weights)
    loss = impl.mixture_kl(student, inputs.logits, inputs.weights, weights, temperature)
    context = (inputs, temperature, weights, student)
    w = weights.detach().double().numpy()
    active = inputs.shares > 0
    log_q = tempered(student.detach().double().numpy(), temperature)
    log_p = log_sum_exp(tempered(inputs.z[active], temperature) + np.log(inputs.shares[active, None, None]), 0)
    losses, off = kl_rows(log_p, log_q)
    broken_rows = np.isnan(log_q).any(-1) | np.isnan(tempered(inputs.z[active], temperature)).any((0, -1))
    losses = np.where(w == 0, 0.0, np.where(broken_rows, np.nan, losses))
    # A subnormal logit may lose its last unit when it is halved, before it is divided by the temperature.
    halved = min(1.0, 2 * LEAST_SHARE / temperature)
    off = np.where(w == 0, 0.0, off + 2 * halved)
    check_loss(loss, losses, off, w, *context)
    gradient = np.where(broken_rows[:, None], np.nan, np.exp(log_q) - np.exp(log_p))
    gradient = np.where(w[:, None] != 0, w[:, None] * gradient / temperature, 0.0)
    grad_student, grad_weights = backward(loss, [student, weights])
    # The shares of a weight of few subnormal units are lost, one unit for each token.
    lost = LEAST_SHARE * (2 + inputs.size)
    allowed = ((3e-6 + halved) * np.abs(w[:, None]) + lost) / temperature
    check_gradient(grad_student, gradient, allowed, "gradient of the student", *context)
    check_gradient(grad_weights, losses, off, "gradient of the weights", *context)


class Linear:
    """Hidden states and a head, the logits of them in float64, and how far those of the op's dtype may be off."""

    def __init__(self, inputs: Inputs, width: int, temperature: float) -> None:
        random, scale = inputs.random, float(inputs.random.choice((1.0, 1.0, 1e-3, 30.0)))
        self.hidden = leaf(inputs.tensor(scale * random.standard_normal((inputs.rows, width))))
        self.head = leaf(inputs.tensor(random.standard_normal((inputs.size, width))))
        self.h, self.v = self.hidden.detach().double().numpy(), self.head.detach().double().numpy()
        self.z = self.h @ self.v.T
        rounding = torch.finfo(inputs.dtype).eps * (2 if inputs.dtype != torch.float32 else 4 + width)
        size = np.abs(self.h) @ np.abs(self.v).T
        self.off = rounding * size.max(-1, initial=0.0) / temperature + 2e-6

    def check_gradients(
        self, loss: Tensor, logits_gradient: Array, w: Array, temperature: float, *context: object
    ) -> None:
        """Of hidden states and head, from dL/dlogits without the weights of the rows."""
        grad_hidden, grad_head = backward(loss, [self.hidden, self.head])
        weighted = np.where(w[:, None] != 0, w[:, None] * logits_gradient, 0.0)
        if np.abs(weighted).max(initial=0.0) > torch.finfo(self.hidden.dtype).max / 100:
            return  # the gradient of the logits is more than the dtype holds
        eps = torch.finfo(self.hidden.dtype).eps
        room = (np.abs(w) * (2 * self.off + 2 * eps) / temperature)[:, None]
        room = np.where(w[:, None] != 0, room, 0.0)
        size = self.v.shape[0]
        off = room * np.abs(self.v).sum(0) + eps * (np.abs(weighted) @ np.abs(self.v)) * 2
        check_gradient(grad_hidden, weighted @ self.v, off, "gradient of the hidden states", *context)
        off = (room.T @ np.abs(self.h)) + eps * (np.abs(weighted).T @ np.abs(self.h)) * 2
        check_gradient(
            grad_head,
            weighted.T @ self.h,
            np.broadcast_to(off, (size, off.shape[-1])),
            "gradient of the head",
            *context,
        )


def linear_weighted_cross_entropy(inputs: Inputs, impl: Any) -> None:
    model = Linear(inputs, int(inputs.random.integers(1, 9)), 1.0)
    weights = leaf(inputs.token_weights)
    loss = impl.linear_weighted_cross_entropy(model.hidden, model.head, inputs.labels, weights)
    labels = inputs.labels.numpy()
    w = np.where(labels == MASKED_LABEL, 0.0, weights.detach().double().numpy())
    rows, picked = np.arange(inputs.rows), np.where(labels == MASKED_LABEL, 0, labels)
    log_q = log_softmax(model.z)
    losses = np.where(w != 0, -log_q[rows, picked], 0.0)
    check_loss(loss, losses, 2 * model.off, w, inputs, labels, weights)
    gradient = np.exp(log_q)
    gradient[rows, picked] -= 1
    model.check_gradients(loss, gradient, w, 1.0, inputs, labels, weights)
    check_gradient(
        weights.grad, losses, np.where(w != 0, 2 * model.off, 0.0), "gradient of the weights", inputs, labels
    )


def linear_mixture_kl(inputs: Inputs, impl: Any) -> None:
    temperature = float(inputs.random.choice((1.0, 1.0, 0.5, 2.0, 1.7)))
    model = Linear(inputs, int(inputs.random.integers(1, 9)), min(temperature, 1.0))
    teachers = [Linear(inputs, int(inputs.random.integers(1, 9)), min(temperature, 1.0)) for _ in range(inputs.experts)]
    weights = leaf(inputs.token_weights)
    states, heads = [x.hidden for x in teachers], [x.head for x in teachers]
    loss = impl.linear_mixture_kl(model.hidden, model.head, states, heads, inputs.weights, weights, temperature)
    w, active = weights.detach().double().numpy(), inputs.shares > 0
    log_q = log_softmax(model.z / temperature)
    each = np.stack([log_softmax(x.z / temperature) for x in teachers])[active]
    log_p = log_sum_exp(each + np.log(inputs.shares[active, None, None]), 0)
    losses, off = kl_rows(log_p, log_q)
    losses = np.where(w != 0, losses, 0.0)
    teachers_off = np.max([x.off for x in teachers], 0)
    # The KL moves with log q, and with p times how much log p and log q differ.
    off = off + 2 * model.off + 2 * teachers_off * (1 + np.abs(log_p - log_q).max(-1, initial=0.0))
    context = (inputs, temperature, weights, model.hidden, model.head, states, heads)
    check_loss(loss, losses, off, w, *context)
    model.off = model.off + teachers_off
    model.check_gradients(loss, (np.exp(log_q) - np.exp(log_p)) / temperature, w, temperature, *context)
    check_gradient(weights.grad, losses, np.where(w != 0, off, 0.0), "gradient of the weights", *context)


def topk_kl(inputs: Inputs, impl: Any) -> None:
    random = inputs.random
    temperature = float(random.choice((1.0, 1.0, 0.5, 2.0, 1.7)))
    model = Linear(inputs, int(random.integers(1, 9)), min(temperature, 1.0))
    weights = leaf(inputs.token_weights)
    k = int(random.integers(1, min(inputs.size, 40) + 1))
    ids = np.argsort(random.random((inputs.rows, inputs.size)), -1)[:, :k]
    teacher = log_softmax(3 * random.standard_normal((inputs.rows, inputs.size)))
    log_probs = torch.from_numpy(np.take_along_axis(teacher, ids, -1)).float()
    inputs_of_op = (torch.from_numpy(ids.copy()), in_some_layout(random, log_probs), weights, temperature)
    loss = impl.topk_kl(model.hidden, model.head, *inputs_of_op)
    w = weights.detach().double().numpy()
    log_q = log_softmax(model.z / temperature)
    log_p = log_probs.double().numpy()
    p, kept_q = np.exp(log_p), np.take_along_axis(log_q, ids, -1)
    losses = (p * (log_p - kept_q)).sum(-1)
    others = log_q.copy()
    np.put_along_axis(others, ids, -np.inf, -1)
    rest = np.maximum(1 - p.sum(-1), 0) if k < inputs.size else np.zeros(inputs.rows)
    log_rest = log_sum_exp(others, -1) if k < inputs.size else np.zeros(inputs.rows)
    safe = np.where(rest > 0, rest, 1.0)
    losses = np.where(w != 0, losses + rest * (np.log(safe) - log_rest), 0.0)
    # The rest is what float32 leaves of 1 minus a sum of k terms.
    off = 2 * model.off + 1e-6 * k * (1 + np.abs(log_rest) + np.where(rest > 0, np.abs(np.log(safe)), 15.0))
    context = (inputs, temperature, weights, model.hidden, model.head, ids, log_probs)
    check_loss(loss, losses, off, w, *context)
    q, target = np.exp(log_q), np.zeros_like(log_q)
    if k < inputs.size:
        target = rest[:, None] * np.exp(others - log_rest[:, None])
    np.put_along_axis(target, ids, p, -1)
    model.off = model.off + 1e-6 * k
    model.check_gradients(loss, (q * (p.sum(-1) + rest)[:, None] - target) / temperature, w, temperature, *context)
    check_gradient(weights.grad, losses, np.where(w != 0, off, 0.0), "gradient of the weights", *context)


OPS: dict[str, Callable[[Inputs, Any], None]] = {
    function.__name__: function
    for function in (
        mixture_log_probs,
        mixture_sample,
        token_scores,
        mixture_scores,
        weighted_cross_entropy,
        mixture_kl,
        linear_weighted_cross_entropy,
        linear_mixture_kl,
        topk_kl,
    )
}


# ---- bad arguments ----


def arguments_of(name: str) -> dict[str, Any]:
    """Small good arguments of an op."""
    rows, size, width = 2, 5, 3
    integers = torch.zeros(rows, dtype=torch.int64)
    pool = {
        "logits": torch.zeros(2, rows, size),
        "weights": torch.ones(2),
        "labels": integers,
        "seeds": integers,
        "positions": integers,
        "token_weights": torch.ones(rows),
        "student_logits": torch.zeros(rows, size),
        "expert_logits": torch.zeros(2, rows, size),
        "hidden": torch.zeros(rows, width),
        "head": torch.zeros(size, width),
        "expert_hiddens": [torch.zeros(rows, width)] * 2,
        "expert_heads": [torch.zeros(size, width)] * 2,
        "token_ids": torch.zeros(rows, 1, dtype=torch.int64),
        "log_probs": torch.zeros(rows, 1),
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "top_logprobs": 0,
        "combine": "prob",
    }
    if name in ("token_scores", "weighted_cross_entropy"):
        pool["logits"] = pool["logits"][0]
    return {
        argument: pool[argument] for argument in inspect.signature(getattr(ops, name)).parameters if argument in pool
    }


NUMBERS = ("temperature", "top_k", "top_p", "min_p", "top_logprobs")
NO_NUMBERS = (None, "1", 1j, [1.0], torch.ones(2), True, float("nan"), float("inf"), -1, 10**5000, -(10**5000), 2**63)
NO_TENSORS = (None, 3, "logits", b"x", {}, [], [None], ["x"], object(), 1j, np.zeros(2))


def bad_tensors(good: Tensor) -> list[Any]:
    """What cannot stand for a dense tensor of this shape and dtype."""
    wrong = [good[..., None], good[None], good.to("meta"), good.to(torch.complex64), good.bool(), good.to(torch.int8)]
    wrong += [good.float().to_sparse(), good.to_sparse(), torch.nested.nested_tensor([torch.ones(2)])]
    wrong += [good.new_zeros(()), good[:0] if good.shape[0] else good, good[..., :0]]
    return [*wrong, good.double() if good.dtype == torch.int64 else good.long()]


def bad_rows(argument: str, values: list[Any]) -> list[Any]:
    """Values for a setting that each of two rows may have of its own: what is no number, and wrong tensors."""
    good = torch.ones(2, dtype=torch.int64 if argument == "top_k" else torch.float32)
    values = [x for x in values if not isinstance(x, Tensor)]
    bad = [x for x in bad_tensors(good) if x.dtype != torch.float64 or x.shape != good.shape]
    return [*values, *bad, good.half(), torch.ones(3), good * -1, good * torch.tensor([1, -(2**30)]).to(good.dtype)]


def bad_values(name: str, argument: str, good: Any) -> list[Any]:
    """Values that the op must refuse for an argument."""
    if argument in NUMBERS:
        values = [x for x in NO_NUMBERS if argument != "temperature" or x is not NO_NUMBERS[-1]]
        return values if name != "mixture_sample" or argument == "top_logprobs" else bad_rows(argument, values)
    if argument == "combine":
        return [None, "mean", 0, ["prob"], "prob" * 10_000]
    values: list[Any]
    if isinstance(good, list):
        return [*NO_TENSORS, [good[0], None], *([good[0], x] for x in bad_tensors(good[1]) if x.device.type != "meta")]
    values = [*NO_TENSORS, *bad_tensors(good)]
    if name == "mixture_log_probs" and argument == "logits":
        values = [x for x in values if not (isinstance(x, Tensor) and x.dim() == 4)]  # any leading axes are right
    if argument == "weights":
        whole = (torch.int8, torch.int64)  # are weights, too
        values = [x for x in values if not (isinstance(x, Tensor) and x.dtype in whole and x.shape == good.shape)]
        values += ["ab", [1.0], [1.0, None], [1j, 1.0], [[1.0], [1.0]], [float("nan"), 1.0], [-1.0, 2.0], [0.0, 0.0]]
    if argument == "labels":
        values += [good + 5, good - 1, good + 2**62]
    if argument == "token_ids":
        values += [good + 5, good - 1]
    return values


def is_refused(name: str, argument: str, value: Any, impl: Any) -> None:
    """Call the op with one bad argument; it must say which, in a short `ValueError` or `TypeError`."""
    arguments = arguments_of(name)
    try:
        getattr(impl, name)(**arguments | {argument: value})
    except (ValueError, TypeError) as error:
        # A shape or a device is wrong beside another argument's, and either may be named.
        words = set(arguments) if isinstance(value, Tensor) and value.is_floating_point() else {argument}
        expect(any(x in str(error) for x in words), f"{name}: the message does not name {argument}", repr(error)[:500])
        expect(len(str(error)) < 400, f"{name}: a message of {len(str(error))} characters", str(error)[:500])
        return
    except Exception as error:
        raise Wrong(f"{name}({argument}={shown(value)}): {type(error).__name__}: {str(error)[:300]}") from error
    raise Wrong(f"{name}({argument}={shown(value)}) was accepted")


def _is_like(value: Any, good: Any) -> bool:
    """Whether nothing is wrong with a tensor but the values in it."""
    if not (isinstance(value, Tensor) and isinstance(good, Tensor)) or value.is_nested:
        return False
    alike = (value.shape, value.dtype, value.device) == (good.shape, good.dtype, good.device)
    return alike and value.layout == good.layout


def _is_of_rows(argument: str, value: Any) -> bool:
    """Whether nothing is wrong with a tensor of two rows' settings but the values in it."""
    dtypes = (torch.int32, torch.int64) if argument == "top_k" else (torch.float32, torch.float64)
    return argument in NUMBERS and any(_is_like(value, torch.ones(2, dtype=dtype)) for dtype in dtypes)


def refuse_bad_arguments(impl: Any) -> int:
    """Every bad value of every argument of every op; returns how many there were."""
    tried = 0
    for name in OPS:
        for argument, good in arguments_of(name).items():
            for value in bad_values(name, argument, good):
                # Triton's kernels look at no value inside a tensor, since the host would have to wait for it.
                if impl.impl != "triton" or not (_is_like(value, good) or _is_of_rows(argument, value)):
                    is_refused(name, argument, value, impl)
                    tried += 1
    return tried


# ---- backends ----


class Backend:
    """The ops with `impl` filled in."""

    names = tuple(OPS)

    def __init__(self, impl: str) -> None:
        self.impl = impl

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(getattr(ops, name), impl=self.impl)


class EmulatedCuda:
    """The CUDA kernels, whose threads are fibers; what torch's half of the op would do is done here."""

    names = ("mixture_log_probs", "mixture_sample")

    def __init__(self, folder: Path) -> None:
        from tests.cuda.emulated import EmulatedKernels, compile_emulation

        self.kernels = EmulatedKernels(compile_emulation(folder / "kernels.so"))

    def mixture_log_probs(self, logits: list[Tensor], weights: Tensor, combine: str) -> Tensor:
        return self.kernels.mixture_log_probs([dense(x) for x in logits], weights.contiguous(), combine)

    def mixture_sample(self, logits: list[Tensor], weights: Tensor, **settings: Any) -> Any:
        settings |= {name: x.contiguous() for name, x in settings.items() if isinstance(x, Tensor)}
        return self.kernels.mixture_sample([dense(x) for x in logits], weights.contiguous(), **settings)


def dense(tensor: Tensor) -> Tensor:
    """The same values with the strides of a new tensor, also where there are none and any strides would do."""
    return tensor.clone(memory_format=torch.contiguous_format)


def make_calls(impl: Any, calls: int, seed: int, *, large: bool = True) -> int:
    """Make so many random calls, several of each input; raises `Wrong` at the first that is."""
    made, index = 0, 0
    with np.errstate(all="ignore"):
        while made < calls:
            random = np.random.default_rng([seed, index])
            inputs = Inputs(random, large=large)
            index += 1
            if inputs.shared.is_borderline() or inputs.of_rows.is_borderline():
                continue
            for _ in range(CALLS_PER_INPUT):
                name = impl.names[random.integers(len(impl.names))]
                try:
                    OPS[name](inputs, impl)
                except Exception as error:
                    raise Wrong(f"seed {seed}, input {index - 1}, {name}: {type(error).__name__}: {error}") from error
                made += 1
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.op_calls", description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--impl", default="cpp", choices=("cpp", "reference", "triton"))
    parser.add_argument("--small", action="store_true", help="no vocabulary above 257 tokens")
    options = parser.parse_args()
    if INTERPRETED:
        from tests.kernels.interpreting import patch_language_once

        patch_language_once()
    torch.set_num_threads(1)
    impl = Backend(options.impl)
    refused = refuse_bad_arguments(impl)
    made = make_calls(impl, options.calls, options.seed, large=not options.small)
    print(made + refused)
    return 0


if __name__ == "__main__":
    sys.exit(main())
