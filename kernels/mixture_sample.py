"""Triton kernels of ``mixture_sample``: the scan, a plan for each row, a search where it says so, the draw.

The plan bounds every group of tokens from its largest logits. Greedy and plain sampling then search the tiles that may
hold the winner. With filters, the tokens that may pass them are written down in ascending order, for so many rows at a
time as fit into `MOST_CANDIDATES`, and one program per row draws among them. With top-p it draws among all of them
first: if the tokens likelier than the winner weigh less than p, the winner lies in the nucleus and is its winner, too.
Otherwise, and for top-k, it finds the filter's edge, by four bits of the log-probabilities at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensemw2s.kernels.mixture import (
    ADJUSTED,
    GROUP,
    LOGPROB,
    LOWEST,
    MASK,
    SIZES,
    TILE,
    VOTE,
    WARPS,
    Offer,
    Scan,
    ahead_of_time,
    anchor_product,
    bits_of,
    changed,
    first_argmax,
    group_bounds,
    log_prob,
    merge_tiles,
    offered,
    row_offset,
    scan,
    slack,
    vote_of,
    votes_for,
)
from ensemw2s.ops.mixture_sample import COLDEST
from ensemw2s.ops.sample_settings import SampleSettings

# What a row's plan looks for.
GREEDY = tl.constexpr(0)  # the likeliest token
RACE = tl.constexpr(1)  # the winner of the Gumbel race over all tokens
TOP_K = tl.constexpr(2)  # candidates: the tokens that top-k may keep
NUCLEUS = tl.constexpr(3)  # candidates: the tokens that top-p may keep
MIN_P = tl.constexpr(4)  # candidates: the tokens that min-p may keep
ANY = tl.constexpr(5)  # each row one of these

# Below this temperature the likeliest token is looked for first, as for min-p: the others' distance to it is exact.
COLD = tl.constexpr(1e-3)
GREEDILY_COLD = tl.constexpr(COLDEST)
# No noise makes up for this distance, in temperatures: it lies between -3.2 and 22.9.
FARTHEST = tl.constexpr(-30.0)
# What float32 can hold of temperatures and of top-p, which no likeliest token falls short of.
HOTTEST, LEAST_TOP_P = tl.constexpr(3e38), tl.constexpr(1e-37)
# No Philox word gives more noise than this.
LARGEST_GUMBEL = tl.constexpr(22.9)
# Mass that may be left out of a total: far less than what moves the edge of top-p by rounding.
NEGLIGIBLE = tl.constexpr(1e-6)
# A plan is small, unless it races a tile: then alone in its row, with as many threads as help, and as registers allow
# where it looks for adjusted tokens as well. Votes are a handful.
_PLAN_WARPS, _RACING_PLAN_WARPS, _VOTE_WARPS = 8, 16, 2
# With more of them ptxas keeps registers in memory.
_SELECT_WARPS = 4
# Candidates at a time: most draws have fewer.
CHUNK = 512
# Room for a token and its log-probability each: 64 MiB, whatever the number of rows.
MOST_CANDIDATES = 2**23
NO_TOKEN = tl.constexpr(2147483647)
LOWEST_KEY = tl.constexpr(-2147483648)


def mixture_sample(
    logits: list[Tensor],
    weights: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    min_ps: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    combine: int,
    top_logprobs: int,
    adjusted_tokens: Tensor | None,
    adjusted_values: Tensor | None,
    adjusted_bits: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """The six results of the op for T logits ``[..., V]``; a tensor of rows takes the place of its number."""
    batch, device = logits[0].shape[:-1].numel(), weights.device
    outputs = (
        torch.empty(batch, dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.float32, device=device),
        torch.empty((len(logits), batch), dtype=torch.float32, device=device),
        torch.empty(batch, dtype=torch.bool, device=device),
        torch.empty((batch, top_logprobs), dtype=torch.int64, device=device),
        torch.empty((batch, top_logprobs), dtype=torch.float32, device=device),
    )
    if batch:
        settings = SampleSettings(
            *(
                number if rows is None else rows.contiguous()
                for number, rows in zip(
                    (temperature, top_k, top_p, min_p), (temperatures, top_ks, top_ps, min_ps), strict=True
                )
            )
        )
        offer = Offer(mask, adjusted_tokens, adjusted_values, adjusted_bits)
        with torch.cuda.device_of(weights):
            scratch = scan(logits, weights, combine, offer=offer)
            _Draw(scratch, settings, offer, seeds, positions, top_logprobs).run(outputs)
    return outputs


def _mode(settings: SampleSettings) -> int:
    if any(isinstance(value, Tensor) for value in settings):
        return ANY.value
    temperature, top_k, top_p, min_p = settings
    if temperature < COLDEST:
        return GREEDY.value
    if top_k > 0:
        return TOP_K.value
    if top_p < 1:
        return NUCLEUS.value
    return MIN_P.value if min_p > 0 or temperature < COLD.value else RACE.value


def _plan_warps(mode: int, offer: int) -> int:
    return _RACING_PLAN_WARPS if mode in (RACE.value, ANY.value) and not offer else _PLAN_WARPS


class _Draw:
    """One call's scratch and launches after the scan."""

    def __init__(
        self, scratch: Scan, settings: SampleSettings, offer: Offer, seeds: Tensor, positions: Tensor, top_logprobs: int
    ) -> None:
        self.scratch = scratch
        self.rows, self.tiles = scratch.rows, scratch.tiles
        self.mode = _mode(settings)
        of_rows = sum(1 << bit for bit, value in enumerate(settings) if isinstance(value, Tensor))
        self.asked = {"MODE": self.mode, "ROWS": of_rows}
        self.offer, self.offer_kind = offer.arguments(scratch.weights), {"OFFER": offer.kind}
        self.is_vote = scratch.combine == VOTE.value
        self.keys = seeds.contiguous(), positions.contiguous()
        self.top_logprobs = top_logprobs
        temperature, top_k, top_p, min_p = settings
        # Numbers as float32 and int32 hold them; the kernels do the same to each row's.
        self.settings = (
            temperature if isinstance(temperature, Tensor) else min(temperature, HOTTEST.value),
            top_k if isinstance(top_k, Tensor) else min(top_k, self.rows.vocabulary),
            top_p if isinstance(top_p, Tensor) else max(top_p, LEAST_TOP_P.value),
            min_p,
        )
        self.shape = {
            "T": len(self.rows.tensors),
            "COMBINE": scratch.combine,
            "TILES": triton.next_power_of_2(self.tiles),
            "num_warps": WARPS,
        }
        self.groups = {"TILE": TILE, "GROUP": GROUP, "GROUPS": self.shape["TILES"] * (TILE // GROUP)}
        per_row = self.rows.count
        self.valid = self._empty(per_row, dtype=torch.bool)
        self.upper = self._empty(per_row, self.tiles * (TILE // GROUP))
        # Of all tokens as they are, for the likeliest.
        self.upper_of_all = torch.empty_like(self.upper) if offer.kind and top_logprobs else self.upper
        self.anchor = self._empty(per_row)
        # What the search, the filters' candidates and those for the likeliest tokens have to reach.
        self.search_floor, self.filter_floor, self.top_floor = self.floors = self._empty(3, per_row)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.scratch.weights.device)

    def run(self, outputs: tuple[Tensor, ...]) -> None:
        """Launch what the settings need."""
        searches = not self.is_vote and self.mode in (GREEDY.value, RACE.value, ANY.value)
        selects = self.is_vote or self.mode not in (GREEDY.value, RACE.value)
        if selects or self.top_logprobs:
            self._make_room()
        if self.is_vote:
            self._count_votes(self.valid, self.offer_kind)
        else:
            self._plan()
        if self.top_logprobs:
            self._find_likeliest(*outputs[4:])
        if searches:
            self._search(outputs[:4])
        if selects:
            self._select(outputs[:4])

    def _make_room(self) -> None:
        """For candidates: a vote's are the voted tokens, those of a tile otherwise follow those of the tile before."""
        count, vocabulary = self.rows.count, self.rows.vocabulary
        self.capacity = self.shape["T"] if self.is_vote else vocabulary
        self.segments = 1 if self.is_vote else self.tiles
        self.rows_at_once = count if self.is_vote else min(count, max(MOST_CANDIDATES // vocabulary, 1))
        self.counts = self._empty(self.rows_at_once, self.segments, dtype=torch.int32)
        self.ids = self._empty(self.rows_at_once, self.capacity, dtype=torch.int32)
        self.log_probs = self._empty(self.rows_at_once, self.capacity)

    def _portions(self) -> Iterator[tuple[int, int]]:
        """The first row and the number of rows of each portion for whose candidates there is room."""
        for first in range(0, self.rows.count, self.rows_at_once):
            yield first, min(self.rows_at_once, self.rows.count - first)

    def _plan(self) -> None:
        scratch, rows = self.scratch, self.rows
        plan_kernel[(rows.count,)](
            *scratch.experts, *scratch.partials, scratch.group_max, scratch.plain_max, *self.keys, self.offer,
            self.valid, self.upper, self.upper_of_all, self.anchor, self.floors, *self.settings, self.top_logprobs,
            rows.count, rows.vocabulary, self.tiles,
            **self.asked, **self.offer_kind, CHUNK=CHUNK, **self.groups,
            **self.shape | {"num_warps": _plan_warps(self.mode, self.offer_kind["OFFER"])},
        )  # fmt: skip

    def _count_votes(self, valid: Tensor, offer_kind: dict[str, int]) -> None:
        scratch, rows = self.scratch, self.rows
        votes_kernel[(rows.count,)](
            *scratch.partials, scratch.tile_first, self.offer, valid, self.counts, self.ids, self.log_probs,
            *self.settings, rows.count, rows.vocabulary, self.tiles, ROWS=self.asked["ROWS"], **offer_kind, CHUNK=CHUNK,
            EXPERTS=triton.next_power_of_2(self.shape["T"]), **self.shape | {"num_warps": _VOTE_WARPS},
        )  # fmt: skip

    def _collect(self, first_row: int, count: int, floor: Tensor, upper: Tensor, offer_kind: dict[str, int]) -> None:
        """Write down the tokens of some rows that reach the floor of their row, in ascending order."""
        scratch, rows = self.scratch, self.rows
        for write in (False, True):
            collect_kernel[(count * self.tiles,)](
                *scratch.experts, *scratch.normalisers, self.offer, upper, floor, self.counts, self.ids, self.log_probs,
                first_row, rows.count, rows.vocabulary, self.tiles, WRITE=write, **offer_kind, TILE=TILE, GROUP=GROUP,
                **self.shape,
            )  # fmt: skip

    def _find_likeliest(self, top_tokens: Tensor, top_log_probs: Tensor) -> None:
        if self.is_vote and self.offer_kind["OFFER"]:
            self._count_votes(torch.empty_like(self.valid), {"OFFER": 0})
        for first_row, count in self._portions():
            if not self.is_vote:
                self._collect(first_row, count, self.top_floor, self.upper_of_all, {"OFFER": 0})
            likeliest_kernel[(count,)](
                self.counts, self.ids, self.log_probs, self.valid, top_tokens, top_log_probs, self.top_logprobs,
                first_row, self.capacity, self.segments, SEGMENTS=triton.next_power_of_2(self.segments), CHUNK=CHUNK,
                num_warps=_PLAN_WARPS,
            )  # fmt: skip
        if self.is_vote and self.offer_kind["OFFER"]:
            self._count_votes(self.valid, self.offer_kind)

    def _search(self, outputs: tuple[Tensor, ...]) -> None:
        """Greedy and plain sampling: every tile's best token, then the best of them."""
        scratch, rows = self.scratch, self.rows
        score = self._empty(rows.count, self.tiles)
        token = self._empty(rows.count, self.tiles, dtype=torch.int32)
        search_kernel[(rows.count * self.tiles,)](
            *scratch.experts, *scratch.normalisers, *self.keys, self.offer, self.upper, self.anchor, self.search_floor,
            *self.settings, score, token, rows.count, rows.vocabulary, self.tiles,
            **self.asked, **self.offer_kind, T=self.shape["T"], COMBINE=scratch.combine, TILE=TILE, GROUP=GROUP,
            num_warps=WARPS,
        )  # fmt: skip
        finish_kernel[(rows.count,)](
            *scratch.experts, *scratch.normalisers, self.offer, score, token, self.valid, self.upper, *outputs,
            *self.settings, rows.count, rows.vocabulary, self.tiles, **self.asked, **self.offer_kind, **self.groups,
            **self.shape,
        )  # fmt: skip

    def _select(self, outputs: tuple[Tensor, ...]) -> None:
        """Filters and votes: the draw among the candidates."""
        scratch, rows = self.scratch, self.rows
        for first_row, count in self._portions():
            if not self.is_vote:
                self._collect(first_row, count, self.filter_floor, self.upper, self.offer_kind)
            select_kernel[(count,)](
                *scratch.experts, *scratch.normalisers, scratch.tile_max, scratch.tile_first, *self.keys, self.offer,
                self.counts, self.ids, self.log_probs, self.valid, self.upper, *outputs, *self.settings,
                first_row, rows.count, rows.vocabulary, self.tiles, self.capacity, self.segments,
                **self.asked, **self.offer_kind, SEGMENTS=triton.next_power_of_2(self.segments), CHUNK=CHUNK,
                **self.groups, **self.shape | {"num_warps": _SELECT_WARPS},
            )  # fmt: skip


@triton.jit
def row_settings(row, temperature, top_k, top_p, min_p, vocabulary, ROWS: tl.constexpr):
    """Temperature, top-k, top-p and log of min-p of one row, its mode, and whether all of them are in their ranges.

    Each is a number for all rows, or where its bit in ``ROWS`` is set a pointer to those of all rows.
    """
    usable = True
    if ROWS & 1:
        given = tl.load(temperature + row)
        usable = usable & (given >= 0) & (given < float("inf"))
        heat = tl.minimum(given, HOTTEST).to(tl.float32)
    else:
        heat = temperature
    if ROWS & 2:
        count = tl.load(top_k + row)
        usable = usable & (count >= 0)
        kept = tl.minimum(count, vocabulary).to(tl.int32)
    else:
        kept = top_k
    if ROWS & 4:
        share = tl.load(top_p + row)
        usable = usable & (share > 0) & (share <= 1)
        nucleus = tl.maximum(share, LEAST_TOP_P).to(tl.float32)
    else:
        nucleus = top_p
    if ROWS & 8:
        ratio = tl.load(min_p + row)
        usable = usable & (ratio >= 0) & (ratio <= 1)
        least = ratio.to(tl.float32)
    else:
        least = min_p
    mode = tl.where((least > 0) | (heat < COLD), MIN_P, RACE)
    mode = tl.where(nucleus < 1, NUCLEUS, mode)
    mode = tl.where(kept > 0, TOP_K, mode)
    mode = tl.where(heat < GREEDILY_COLD, GREEDY, mode)
    # A smaller number than float32 holds would make all of it float64 in some releases of Triton.
    log_min_p = tl.where(least > 0, tl.log(tl.maximum(least, 1.2e-38)), FARTHEST)
    return tl.maximum(heat, GREEDILY_COLD), kept, nucleus, log_min_p, mode, usable


@triton.jit
def is_searched(mode):
    """Whether a row of this mode is found by the search; the others are selected from candidates."""
    return (mode == GREEDY) | (mode == RACE)


@triton.jit
def gumbel(word):
    """Standard Gumbel noise ``-log(-log(1 - u))`` with ``u = (word + 1/2) / 2**32`` of uint32 words, in float32.

    ``-log(1 - u)`` keeps its relative precision: a small ``u`` is used as it is, a large one through ``1 - u``, whose
    bits are those of the inverted word.
    """
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rounded = 1.0 - u
    # log1p(x) = log(y) x / (y - 1) for y = 1 + x as rounded (Goldberg 1991, theorem 4).
    small = tl.where(rounded == 1.0, u, tl.log(rounded) * (u / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return -tl.log(tl.where(u < 0.5, small, -tl.log(rest)))


@triton.jit
def philox_words(seed, position, tokens):
    """Philox4x32-10 word of each token (uint32); of the int64 position the low 32 bits count."""
    first, second, third, fourth = tl.philox(seed, tokens >> 2, position.to(tl.int32), 0, 0)
    low = tl.where((tokens & 1) == 0, first, second)
    high = tl.where((tokens & 1) == 0, third, fourth)
    return tl.where((tokens & 2) == 0, low, high)


@triton.jit
def philox_words_in_a_row(seed, position, start, SIZE: tl.constexpr):
    """``philox_words`` of the tokens ``start``, ``start + 1``, ...; one block of words serves four of them."""
    counters = start // 4 + tl.arange(0, SIZE // 4)
    first, second, third, fourth = tl.philox(seed, counters, position.to(tl.int32), 0, 0)
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit
def key_of(value):
    """int32 in the order of float32 values."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def race_tile(
    row, tile, best, logits, outer, step, inner, weights, top, log_sum, shift, seeds, positions, offer, upper, anchor,
    temperature, rows, vocabulary, tiles,
    OFFER: tl.constexpr, T: tl.constexpr, COMBINE: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The tile's highest ``(log_prob - anchor) / temperature + noise`` and its token, if it may reach ``best``.

    As ``-log(-log(1 - u)) <= -log(u)``, a token can only win if ``u < exp((upper - anchor) / temperature - best)``,
    which is a comparison of its Philox word with a number: few tokens' logits are read.
    """
    GROUPS: tl.constexpr = TILE // GROUP
    group = tl.arange(0, GROUPS)
    bound = tl.load(upper + (row * tiles + tile) * GROUPS + group)
    lead = (bound + slack(bound, row, top, rows, T, COMBINE) - anchor) / temperature - best + 1e-4
    score, token = -float("inf"), NO_TOKEN
    if tl.max(lead, axis=0) > -LARGEST_GUMBEL:
        tokens = tl.arange(0, TILE)
        limit = tl.exp(tl.minimum(lead, 0.0)) * 4295396761.6 + 1024.0
        limits = tl.reshape(tl.broadcast_to(limit[:, None], (GROUPS, GROUP)), (TILE,))
        tokens += tile * TILE
        words = philox_words_in_a_row(tl.load(seeds + row), tl.load(positions + row), tile * TILE, TILE)
        near = (words.to(tl.float32) <= limits) & (tokens < vocabulary)
        if tl.max(near.to(tl.int32), axis=0) > 0:
            found = log_prob(
                tokens, near, row, logits, outer, step, inner, weights, top, log_sum, shift, rows, T, COMBINE
            )
            found = offered(found, tokens, near, row, rows, offer, OFFER)
            scores = tl.where(
                near & (found > -float("inf")), (found - anchor) / temperature + gumbel(words), -float("inf")
            )
            score, token = first_argmax(scores, tokens)
    return score, token


@triton.jit
def top_k_edge(lower, top_k):
    """At least ``top_k`` tokens reach this: each group holds one that reaches its lower bound."""
    keys = key_of(lower)
    edge = tl.full((), LOWEST_KEY, tl.int64)
    for bit in range(32):
        trial = edge + (tl.full((), 1, tl.int64) << (31 - bit))
        enough = tl.sum((keys >= trial).to(tl.int32), axis=0) >= top_k
        edge = tl.where(enough, trial, edge)
    key = edge.to(tl.int32)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(key > key_of(tl.full((), LOWEST, tl.float32)), value, LOWEST)


@triton.jit
def nucleus_floor(
    row, anchor, temperature, top_p, weights, tile_max, tile_sum, top, log_sum, shift, count, rows, tiles,
    OFFER: tl.constexpr, T: tl.constexpr, COMBINE: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A log-probability below which no token can be in the nucleus, and what lies below it can be left out of sums.

    The n tokens of a tile that are below a floor f have together at most the tile's mass and at most ``n exp(f)``. That
    bounds the sum of ``p ** (1 / temperature)`` over them: below 1 by ``exp(f) ** (1 / temperature - 1)`` times
    theirs, above 1 by n times the power of the mean (Jensen). Each of the ``count`` adjusted tokens has at most
    ``exp(f)``. All relative to the likeliest token.
    """
    tile = tl.arange(0, TILES)
    mass = tl.zeros((TILES,), tl.float32)
    for t in range(T):
        slot = T if COMBINE == LOGPROB else t
        at = (slot * rows + row) * tiles + tile
        largest = tl.load(tile_max + at, mask=tile < tiles, other=LOWEST)
        sums = tl.load(tile_sum + at, mask=tile < tiles, other=0.0)
        # The product's shift has no weight; it counts once.
        scale = tl.exp(tl.load(shift + slot * rows + row))
        if COMBINE == LOGPROB:
            scale = tl.where(t == 0, scale, 0.0)
        mass += tl.where(scale > 0, tl.exp(largest - tl.load(top + slot * rows + row)) * sums * scale, 0.0)
    log_mass = tl.log(mass)
    log_size = tl.log(TILE * 1.0)
    inverse = 1.0 / temperature
    # At temperature 1 the total of tokens as they are is known to be 1, whatever is left out.
    weighs_one = (temperature == 1.0) & (OFFER == 0)
    allowed = tl.where(weighs_one, 1.0 - top_p - 1e-4, tl.minimum(NEGLIGIBLE, 0.5 * (1.0 - top_p)))
    low, high = -100.0, 0.0
    for _ in range(24):
        middle = 0.5 * (low + high)
        below = tl.minimum(log_mass, log_size + middle)
        cold = middle * (inverse - 1.0) + below - anchor * inverse
        hot = log_size + (below - log_size - anchor) * inverse
        left_out = tl.sum(tl.exp(tl.where(temperature <= 1.0, cold, hot)), axis=0)
        if ADJUSTED & OFFER:
            left_out += count * tl.exp((middle - anchor) * inverse)
        scaled = tl.where(weighs_one, left_out * tl.exp(anchor), left_out)
        low = tl.where(scaled <= allowed, middle, low)
        high = tl.where(scaled <= allowed, high, middle)
    return tl.where(low > -100.0, low, LOWEST)


@triton.jit
def are_adjustments_usable(row, rows, vocabulary, offer, CHUNK: tl.constexpr):
    """Whether a row's adjustments are such as ``token_adjustments`` makes."""
    good = True
    for start in range(0, offer[4], CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < offer[4]
        tokens = tl.load(offer[1] + row * offer[4] + place, mask=inside, other=-1)
        last = tl.load(offer[1] + row * offer[4] + place - 1, mask=inside & (place > 0), other=-2)
        first = offer[2] + row * offer[4] + place
        bias = tl.load(first, mask=inside, other=0.0)
        repetition = tl.load(first + rows * offer[4], mask=inside, other=1.0)
        penalty = tl.load(first + 2 * rows * offer[4], mask=inside, other=0.0)
        right = (bias < float("inf")) & (repetition > 0) & (repetition < float("inf")) & (penalty > -float("inf"))
        follows = (place == 0) | ((last >= 0) & (last < tokens))
        right = (right & follows & (tokens < vocabulary)) | (tokens < 0)
        good = good & (tl.min(right.to(tl.int32), axis=0) > 0)
    return good


@triton.jit
def bound_adjusted(
    row, logits, outer, step, inner, weights, top, log_sum, shift, offer, upper, rows, vocabulary,
    OFFER: tl.constexpr, T: tl.constexpr, COMBINE: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Raise the row's group bounds ``upper`` to what its adjusted tokens are offered at; return the largest of that."""
    # The bounds were written by other threads.
    tl.debug_barrier()
    best = -float("inf")
    for start in range(0, offer[4], CHUNK):
        place = start + tl.arange(0, CHUNK)
        tokens = tl.load(offer[1] + row * offer[4] + place, mask=place < offer[4], other=-1)
        is_real = (tokens >= 0) & (tokens < vocabulary)
        if MASK & OFFER:
            is_real = is_real & bits_of(offer[0], tokens, is_real, row, offer[5])
        found = log_prob(
            tokens, is_real, row, logits, outer, step, inner, weights, top, log_sum, shift, rows, T, COMBINE
        )
        value = tl.where(is_real, changed(found, place, is_real, row, rows, offer), -float("inf"))
        tl.atomic_max(upper + tokens // GROUP, value, mask=value > -float("inf"))
        best = tl.maximum(best, tl.max(value, axis=0))
    tl.debug_barrier()
    return best


@triton.jit(do_not_specialize=SIZES)
def plan_kernel(
    logits, outer, step, inner, weights, weight_step, tile_max, tile_sum, top, log_sum, shift, group_max, plain_max,
    seeds, positions, offer, valid, upper, upper_of_all, anchor, floors, temperature, top_k, top_p, min_p, top_count,
    rows, vocabulary, tiles,
    MODE: tl.constexpr, ROWS: tl.constexpr, OFFER: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    T: tl.constexpr, COMBINE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Bounds of one row, and the log-probabilities (or the race's score) that its searches must reach. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    weights += row * weight_step
    temperature, top_k, top_p, log_min_p, own_mode, in_range = row_settings(
        row, temperature, top_k, top_p, min_p, vocabulary, ROWS
    )
    mode = own_mode if MODE == ANY else MODE
    usable = merge_tiles(row, weights, tile_max, tile_sum, top, log_sum, shift, rows, tiles, T, COMBINE, TILES)
    groups = tiles * (TILE // GROUP)
    if COMBINE == LOGPROB:
        anchor_product(
            row, logits, outer, step, inner, weights, tile_max, top, group_max, rows, vocabulary, tiles,
            T, TILES, TILE, GROUP,
        )  # fmt: skip
    maxima = plain_max if OFFER else group_max
    high, low = group_bounds(row, maxima, tile_max, top, log_sum, shift, rows, groups, tiles, T, COMBINE, GROUPS)
    group = tl.arange(0, GROUPS)
    tl.store(upper + row * groups + group, high, mask=group < groups)
    likeliest = tl.max(low, axis=0)
    if ADJUSTED & OFFER:
        best = bound_adjusted(
            row, logits, outer, step, inner, weights, top, log_sum, shift, offer, upper + row * groups, rows,
            vocabulary, OFFER, T, COMBINE, GROUP, CHUNK,
        )  # fmt: skip
        likeliest = tl.maximum(likeliest, best)
        usable = usable & are_adjustments_usable(row, rows, vocabulary, offer, CHUNK)
    # Experts without a common token leave no bound to stand on.
    usable = usable & (likeliest > -float("inf")) & in_range
    tl.store(valid + row, usable)
    tl.store(anchor + row, likeliest)
    reach = likeliest - slack(likeliest, row, top, rows, T, COMBINE)
    if top_count > 0:
        low_of_all = low
        if OFFER:
            high_of_all, low_of_all = group_bounds(
                row, group_max, tile_max, top, log_sum, shift, rows, groups, tiles, T, COMBINE, GROUPS
            )
            tl.store(upper_of_all + row * groups + group, high_of_all, mask=group < groups)
        top_edge = top_k_edge(low_of_all, top_count)
        top_reach = tl.maximum(top_edge - slack(top_edge, row, top, rows, T, COMBINE), LOWEST)
        tl.store(floors + 2 * rows + row, tl.where(usable, top_reach, float("inf")))
    if mode == TOP_K:
        edge = top_k_edge(low, top_k)
        reach = tl.maximum(edge - slack(edge, row, top, rows, T, COMBINE), LOWEST)
    if mode == NUCLEUS:
        reach = nucleus_floor(
            row, likeliest, temperature, top_p, weights, tile_max, tile_sum, top, log_sum, shift, offer[4], rows, tiles,
            OFFER, T, COMBINE, TILES, TILE,
        )  # fmt: skip
    if mode == MIN_P:
        reach = tl.maximum(reach + temperature * log_min_p, LOWEST)
    if mode == RACE:
        # The bounds were written by other threads.
        tl.debug_barrier()
        _, first = first_argmax(high, group)
        reach, _ = race_tile(
            row, tl.where(usable & (first != NO_TOKEN), first // (TILE // GROUP), 0), LOWEST,
            logits, outer, step, inner, weights, top, log_sum, shift, seeds, positions, offer, upper, likeliest,
            temperature, rows, vocabulary, tiles, OFFER, T, COMBINE, TILE, GROUP,
        )  # fmt: skip
        # Where no plain token is possible.
        reach = tl.maximum(reach, LOWEST)
    tl.store(floors + row, tl.where(usable & is_searched(mode), reach, float("inf")))
    tl.store(floors + rows + row, tl.where(usable & (is_searched(mode) == 0), reach, float("inf")))


@triton.jit(do_not_specialize=SIZES)
def search_kernel(
    logits, outer, step, inner, weights, weight_step, top, log_sum, shift, seeds, positions, offer, upper, anchor,
    floor, temperature, top_k, top_p, min_p, score, token, rows, vocabulary, tiles,
    MODE: tl.constexpr, ROWS: tl.constexpr, OFFER: tl.constexpr,
    T: tl.constexpr, COMBINE: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The best token of one tile of one row. Grid: rows * tiles."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    weights += row * weight_step
    temperature, _, _, _, own_mode, _ = row_settings(row, temperature, top_k, top_p, min_p, vocabulary, ROWS)
    mode = own_mode if MODE == ANY else MODE
    reach = tl.load(floor + row)
    best, winner = -float("inf"), NO_TOKEN
    if mode == RACE:
        if reach < float("inf"):
            best, winner = race_tile(
                row, tile, reach, logits, outer, step, inner, weights, top, log_sum, shift, seeds, positions, offer,
                upper, tl.load(anchor + row), temperature, rows, vocabulary, tiles, OFFER, T, COMBINE, TILE, GROUP,
            )  # fmt: skip
    else:
        bound = tl.load(upper + (row * tiles + tile) * (TILE // GROUP) + tl.arange(0, TILE // GROUP))
        if tl.max(bound, axis=0) >= reach:
            tokens = tile * TILE + tl.arange(0, TILE)
            found = log_prob(
                tokens, tokens < vocabulary, row, logits, outer, step, inner, weights, top, log_sum, shift, rows,
                T, COMBINE,
            )  # fmt: skip
            found = offered(found, tokens, tokens < vocabulary, row, rows, offer, OFFER)
            best, winner = first_argmax(found, tokens)
    tl.store(score + row * tiles + tile, best)
    tl.store(token + row * tiles + tile, winner)


@triton.jit(do_not_specialize=SIZES)
def collect_kernel(
    logits, outer, step, inner, weights, weight_step, top, log_sum, shift, offer, upper, floor, counts, ids, log_probs,
    first_row, rows, vocabulary, tiles,
    WRITE: tl.constexpr, OFFER: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    T: tl.constexpr, COMBINE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Count the candidates in one tile of one row, or write them after those before. Grid: some rows * tiles."""
    place = (tl.program_id(0) // tiles).to(tl.int64)
    row = first_row + place
    tile = tl.program_id(0) % tiles
    weights += row * weight_step
    reach = tl.load(floor + row)
    bound = tl.load(upper + (row * tiles + tile) * (TILE // GROUP) + tl.arange(0, TILE // GROUP))
    count = 0
    if tl.max(bound + slack(bound, row, top, rows, T, COMBINE), axis=0) >= reach:
        tokens = tile * TILE + tl.arange(0, TILE)
        found = log_prob(
            tokens, tokens < vocabulary, row, logits, outer, step, inner, weights, top, log_sum, shift, rows, T, COMBINE
        )
        found = offered(found, tokens, tokens < vocabulary, row, rows, offer, OFFER)
        kept = (found >= reach).to(tl.int32)
        count = tl.sum(kept, axis=0)
        if WRITE:
            earlier = tl.arange(0, TILES)
            before = tl.sum(tl.load(counts + place * tiles + earlier, mask=earlier < tile, other=0), axis=0)
            at = place * vocabulary + before + tl.cumsum(kept, axis=0) - 1
            tl.store(ids + at, tokens, mask=kept > 0)
            tl.store(log_probs + at, found, mask=kept > 0)
    if not WRITE:
        tl.store(counts + place * tiles + tile, count)


@triton.jit(do_not_specialize=SIZES)
def votes_kernel(
    weights, weight_step, tile_max, tile_sum, top, log_sum, shift, tile_first, offer, valid, counts, ids, log_probs,
    temperature, top_k, top_p, min_p, rows, vocabulary, tiles,
    ROWS: tl.constexpr, OFFER: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr,
    T: tl.constexpr, COMBINE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The tokens that some expert votes for, each once, in ascending order. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    weights += row * weight_step
    _, _, _, _, _, in_range = row_settings(row, temperature, top_k, top_p, min_p, vocabulary, ROWS)
    usable = merge_tiles(row, weights, tile_max, tile_sum, top, log_sum, shift, rows, tiles, T, COMBINE, TILES)
    usable = usable & in_range
    if ADJUSTED & OFFER:
        usable = usable & are_adjustments_usable(row, rows, vocabulary, offer, CHUNK)
    expert = tl.arange(0, EXPERTS)
    winners = tl.full((EXPERTS,), -1, tl.int32)
    shares = tl.zeros((EXPERTS,), tl.float32)
    for t in range(T):
        winner = vote_of(t, row, shift, tile_max, tile_first, top, rows, tiles, TILES)
        share = votes_for(winner, row, weights, shift, tile_max, tile_first, top, rows, tiles, T, TILES)
        winners = tl.where(expert == t, winner, winners)
        shares = tl.where(expert == t, share, shares)
    # A token's first voter writes it down, after the lower ones.
    same = winners[:, None] == winners[None, :]
    earlier = expert[:, None] < expert[None, :]
    is_first = tl.sum((same & earlier).to(tl.int32), axis=0) == 0
    counted = (is_first & (winners >= 0)).to(tl.int32)
    if OFFER:
        shares = offered(shares, winners, winners >= 0, row, rows, offer, OFFER)
        counted = tl.where(shares > -float("inf"), counted, 0)
    rank = tl.sum((winners[:, None] < winners[None, :]).to(tl.int32) * counted[:, None], axis=0)
    tl.store(ids + row * T + rank, winners, mask=counted > 0)
    tl.store(log_probs + row * T + rank, shares, mask=counted > 0)
    count = tl.where(usable, tl.sum(counted, axis=0), 0)
    tl.store(counts + row, count)
    tl.store(valid + row, count > 0)


@triton.jit(do_not_specialize=SIZES)
def likeliest_kernel(
    counts, ids, log_probs, valid, out_top_tokens, out_top_log_probs, top_count, first_row, capacity, segments,
    SEGMENTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The likeliest of one row's candidates, the likeliest first, of equals the lowest id. Grid: some rows."""
    place = tl.program_id(0).to(tl.int64)
    row = first_row + place
    segment = tl.arange(0, SEGMENTS)
    count = tl.sum(tl.load(counts + place * segments + segment, mask=segment < segments, other=0), axis=0)
    usable = tl.load(valid + row)
    last, last_token = float("inf"), -1
    for n in range(top_count):
        best, winner = -float("inf"), NO_TOKEN
        for start in range(0, count, CHUNK):
            index = start + tl.arange(0, CHUNK)
            inside = index < count
            some = tl.load(log_probs + place * capacity + index, mask=inside, other=-float("inf"))
            tokens = tl.load(ids + place * capacity + index, mask=inside, other=NO_TOKEN)
            is_behind = (some < last) | ((some == last) & (tokens > last_token))
            chunk_best, chunk_winner = first_argmax(tl.where(is_behind, some, -float("inf")), tokens)
            winner = tl.where(chunk_best > best, chunk_winner, winner)
            best = tl.maximum(best, chunk_best)
        at = row * top_count + n
        tl.store(out_top_tokens + at, tl.where(usable & (winner != NO_TOKEN), winner, -1).to(tl.int64))
        tl.store(out_top_log_probs + at, tl.where(usable, best, float("nan")))
        last, last_token = best, winner


@triton.jit
def weight_from(key, log_probs, count, top, temperature, WEIGHED: tl.constexpr, CHUNK: tl.constexpr):
    """Number, or relative mass, of the candidates whose key is at least ``key`` (an int64)."""
    total = 0.0
    for start in range(0, count, CHUNK):
        index = start + tl.arange(0, CHUNK)
        some = tl.load(log_probs + index, mask=index < count, other=-float("inf"))
        weight = tl.exp((some - top) / temperature) if WEIGHED else tl.full((CHUNK,), 1.0, tl.float32)
        reached = (index < count) & (key_of(some) >= key)
        total += tl.sum(tl.where(reached, weight, 0.0), axis=0)
    return total


@triton.jit
def weight_before(token, log_prob, ids, log_probs, count, top, temperature, CHUNK: tl.constexpr):
    """Relative mass of the candidates that come before a token: the likelier ones, and of equals the lower ids."""
    total = 0.0
    for start in range(0, count, CHUNK):
        index = start + tl.arange(0, CHUNK)
        some = tl.load(log_probs + index, mask=index < count, other=-float("inf"))
        tokens = tl.load(ids + index, mask=index < count, other=NO_TOKEN)
        is_before = (some > log_prob) | ((some == log_prob) & (tokens < token))
        total += tl.sum(tl.where(is_before, tl.exp((some - top) / temperature), 0.0), axis=0)
    return total


@triton.jit
def find_edge(target, least, log_probs, count, top, temperature, WEIGHED: tl.constexpr, CHUNK: tl.constexpr):
    """Largest key from which the candidates upwards, of those from ``least`` on, weigh ``target``; else the lowest."""
    edge = tl.full((), LOWEST_KEY, tl.int64)
    digit = tl.arange(0, 16)
    for place in range(8):
        shift = 28 - 4 * place
        trials = tl.maximum(edge + (digit.to(tl.int64) << shift), least).to(tl.int32)
        weights = tl.zeros((16,), tl.float32)
        for start in range(0, count, CHUNK):
            index = start + tl.arange(0, CHUNK)
            some = tl.load(log_probs + index, mask=index < count, other=-float("inf"))
            weight = tl.exp((some - top) / temperature) if WEIGHED else tl.full((CHUNK,), 1.0, tl.float32)
            weight = tl.where(index < count, weight, 0.0)
            reached = key_of(some)[None, :] >= trials[:, None]
            weights += tl.sum(tl.where(reached, weight[None, :], 0.0), axis=1)
        # The first trial is the edge so far.
        enough = tl.sum(((digit > 0) & (weights >= target)).to(tl.int64), axis=0)
        edge += enough << shift
    return edge


@triton.jit
def largest_of(log_probs, count, CHUNK: tl.constexpr):
    """Largest log-probability of the candidates."""
    top = -float("inf")
    for start in range(0, count, CHUNK):
        index = start + tl.arange(0, CHUNK)
        some = tl.load(log_probs + index, mask=index < count, other=-float("inf"))
        top = tl.maximum(top, tl.max(some, axis=0))
    return top


@triton.jit
def race_kept(
    row, least, edge, above, target, top, seeds, positions, ids, log_probs, count, temperature, log_min_p, mode,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Winner among the candidates that the filters keep, and its log-probability.

    They keep keys from ``least`` and above ``edge``, and the lowest ids at it.
    """
    best, winner, picked = -float("inf"), NO_TOKEN, -float("inf")
    ties_before = 0
    for start in range(0, count, CHUNK):
        index = start + tl.arange(0, CHUNK)
        inside = index < count
        some = tl.load(log_probs + index, mask=inside, other=-float("inf"))
        tokens = tl.load(ids + index, mask=inside, other=NO_TOKEN)
        score = some
        if mode != GREEDY:
            keys = key_of(some)
            tied = (inside & (keys == edge)).to(tl.int32)
            rank = ties_before + tl.cumsum(tied, axis=0) - tied
            ties_before += tl.sum(tied, axis=0)
            mass = tl.exp((some - top) / temperature)
            admitted = (keys > edge) | ((tied > 0) & (above + rank * mass < target))
            kept = admitted & (keys >= least) & (some >= top + temperature * log_min_p)
            words = philox_words(tl.load(seeds + row), tl.load(positions + row), tokens)
            score = tl.where(inside & kept, (some - top) / temperature + gumbel(words), -float("inf"))
        chunk_best, chunk_winner = first_argmax(score, tokens)
        chunk_picked = tl.max(tl.where(tokens == chunk_winner, some, -float("inf")), axis=0)
        winner = tl.where(chunk_best > best, chunk_winner, winner)
        picked = tl.where(chunk_best > best, chunk_picked, picked)
        best = tl.maximum(best, chunk_best)
    return winner, picked


@triton.jit
def write_sample(
    row, token, picked, usable, logits, outer, step, inner, weights, top, log_sum,
    out_tokens, out_log_probs, out_experts, out_valid, rows, T: tl.constexpr,
):  # fmt: skip
    """One row's results; ``picked`` is the token's log-probability."""
    tl.store(out_tokens + row, tl.where(usable, token, -1).to(tl.int64))
    tl.store(out_log_probs + row, tl.where(usable, picked, float("nan")))
    tl.store(out_valid + row, usable)
    for t in tl.static_range(T):
        start = logits[t] + row_offset(row, outer[t], step[t], inner)
        # Of an expert that was not read the log-sum is NaN.
        z = tl.load(start + token, mask=usable & (tl.load(weights + t) != 0), other=0.0).to(tl.float32)
        own = (z - tl.load(top + t * rows + row)) - tl.load(log_sum + t * rows + row)
        tl.store(out_experts + t * rows + row, tl.where(usable, own, float("nan")))


@triton.jit
def likeliest_of_best_group(
    row, offer, upper, logits, outer, step, inner, weights, top, log_sum, shift, rows, vocabulary, tiles,
    OFFER: tl.constexpr, T: tl.constexpr, COMBINE: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The token of a valid row in which nothing won: rounding alone ruled all out, of logits as large as floats get."""
    groups = tiles * (TILE // GROUP)
    group = tl.arange(0, GROUPS)
    bounds = tl.load(upper + row * groups + group, mask=group < groups, other=-float("inf"))
    tokens = tl.argmax(bounds, axis=0) * GROUP + tl.arange(0, GROUP)
    found = log_prob(
        tokens, tokens < vocabulary, row, logits, outer, step, inner, weights, top, log_sum, shift, rows, T, COMBINE
    )
    found = offered(found, tokens, tokens < vocabulary, row, rows, offer, OFFER)
    _, winner = first_argmax(found, tokens)
    return winner


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    logits, outer, step, inner, weights, weight_step, top, log_sum, shift, offer, score, token, valid, upper,
    out_tokens, out_log_probs, out_experts, out_valid, temperature, top_k, top_p, min_p, rows, vocabulary, tiles,
    MODE: tl.constexpr, ROWS: tl.constexpr, OFFER: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    T: tl.constexpr, COMBINE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The best of one row's tiles. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    if MODE == ANY:
        _, _, _, _, mode, _ = row_settings(row, temperature, top_k, top_p, min_p, vocabulary, ROWS)
        if is_searched(mode) == 0:
            return
    weights += row * weight_step
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    scores = tl.load(score + row * tiles + tile, mask=inside, other=-float("inf"))
    _, winner = first_argmax(scores, tl.load(token + row * tiles + tile, mask=inside, other=NO_TOKEN))
    usable = tl.load(valid + row)
    if usable & (winner == NO_TOKEN):
        winner = likeliest_of_best_group(
            row, offer, upper, logits, outer, step, inner, weights, top, log_sum, shift, rows, vocabulary, tiles,
            OFFER, T, COMBINE, TILE, GROUP, GROUPS,
        )  # fmt: skip
    one = tl.zeros((1,), tl.int32) + winner
    found = log_prob(
        one, one < vocabulary, row, logits, outer, step, inner, weights, top, log_sum, shift, rows, T, COMBINE
    )
    write_sample(
        row, winner, tl.max(found, axis=0), usable, logits, outer, step, inner, weights, top, log_sum,
        out_tokens, out_log_probs, out_experts, out_valid, rows, T,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    logits, outer, step, inner, weights, weight_step, top, log_sum, shift, tile_max, tile_first, seeds, positions,
    offer, counts, ids, log_probs, valid, upper, out_tokens, out_log_probs, out_experts, out_valid,
    temperature, top_k, top_p, min_p, first_row, rows, vocabulary, tiles, capacity, segments,
    MODE: tl.constexpr, ROWS: tl.constexpr, OFFER: tl.constexpr, SEGMENTS: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, COMBINE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Filters and draw among one row's candidates. Grid: some rows."""
    place = tl.program_id(0).to(tl.int64)
    row = first_row + place
    temperature, top_k, top_p, log_min_p, own_mode, _ = row_settings(
        row, temperature, top_k, top_p, min_p, vocabulary, ROWS
    )
    mode = own_mode if MODE == ANY else MODE
    if MODE == ANY and COMBINE != VOTE:  # noqa: SIM102  (this one is decided when the kernel is compiled)
        if is_searched(mode):
            return
    weights += row * weight_step
    segment = tl.arange(0, SEGMENTS)
    count = tl.sum(tl.load(counts + place * segments + segment, mask=segment < segments, other=0), axis=0)
    ids += place * capacity
    log_probs += place * capacity
    largest = largest_of(log_probs, count, CHUNK)
    least = tl.full((), LOWEST_KEY, tl.int64)
    if (mode != GREEDY) & (top_k > 0) & (top_k < count):
        least = find_edge(top_k, least, log_probs, count, largest, temperature, False, CHUNK)
    winner, picked = race_kept(
        row, least, tl.full((), LOWEST_KEY, tl.int64), 0.0, float("inf"), largest, seeds, positions, ids, log_probs,
        count, temperature, log_min_p, mode, CHUNK,
    )  # fmt: skip
    if (mode != GREEDY) & (top_p < 1.0) & (winner != NO_TOKEN):
        total = weight_from(least, log_probs, count, largest, temperature, True, CHUNK)
        if COMBINE != VOTE:
            # Some tokens may be missing from the candidates, but all together weigh 1.
            weighs_one = (mode == NUCLEUS) & (temperature == 1.0) & (OFFER == 0)
            total = tl.where(weighs_one, tl.maximum(total, tl.exp(-largest)), total)
        target = top_p * total
        if weight_before(winner, picked, ids, log_probs, count, largest, temperature, CHUNK) >= target:
            edge = find_edge(target, least, log_probs, count, largest, temperature, True, CHUNK)
            above = weight_from(tl.maximum(edge + 1, least), log_probs, count, largest, temperature, True, CHUNK)
            winner, picked = race_kept(
                row, least, edge, above, target, largest, seeds, positions, ids, log_probs, count, temperature,
                log_min_p, mode, CHUNK,
            )  # fmt: skip
    usable = tl.load(valid + row)
    if usable & (winner == NO_TOKEN):
        if COMBINE == VOTE:
            winner, picked = race_kept(
                row, least, least, 0.0, 0.0, largest, seeds, positions, ids, log_probs, count, temperature, log_min_p,
                GREEDY, CHUNK,
            )  # fmt: skip
        else:
            winner = likeliest_of_best_group(
                row, offer, upper, logits, outer, step, inner, weights, top, log_sum, shift, rows, vocabulary, tiles,
                OFFER, T, COMBINE, TILE, GROUP, GROUPS,
            )  # fmt: skip
    if COMBINE == VOTE:
        picked = votes_for(winner, row, weights, shift, tile_max, tile_first, top, rows, tiles, T, TILES)
    else:
        one = tl.zeros((1,), tl.int32) + winner
        found = log_prob(
            one, one < vocabulary, row, logits, outer, step, inner, weights, top, log_sum, shift, rows, T, COMBINE
        )
        picked = tl.max(found, axis=0)
    write_sample(
        row, winner, picked, usable, logits, outer, step, inner, weights, top, log_sum,
        out_tokens, out_log_probs, out_experts, out_valid, rows, T,
    )  # fmt: skip


# 128 tiles: a vocabulary of 262,144.
_TILED = {"T": 5, "TILES": 128}
_TILE = {"TILE": TILE, "GROUP": GROUP}
_GROUPS = _TILE | {"GROUPS": 128 * TILE // GROUP}
_PLANNED = _GROUPS | {"CHUNK": CHUNK}
_MIXED = (0, LOGPROB.value)
# Each row its own.
_NARROW = {"temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32"}
_WIDE = {"temperature": "*fp64", "top_k": "*i64", "top_p": "*fp64", "min_p": "*fp64"}


def _rows(types: dict[str, str], offer: int = 0) -> dict[str, int]:
    return {"ROWS": 15 if types else 0, "OFFER": offer}


# Settings of every kind, once with all that an offer may have.
_ALL = MASK.value + ADJUSTED.value
AHEAD_OF_TIME = [
    *(
        ahead_of_time(
            plan_kernel, _plan_warps(mode, offer), types=types, MODE=mode, **_rows(types, offer), COMBINE=combine,
            **_PLANNED, **_TILED,
        )
        for mode, types, offer in (
            *((mode, {}, 0) for mode in range(ANY.value)), (ANY.value, _NARROW, 0), (ANY.value, _WIDE, 0),
            (NUCLEUS.value, {}, _ALL), (ANY.value, _NARROW, _ALL),
        )
        for combine in _MIXED
    ),
    *(
        ahead_of_time(search_kernel, types=types, MODE=mode, **_rows(types, offer), T=5, COMBINE=combine, **_TILE)
        for mode, types, offer in (
            (GREEDY.value, {}, 0), (RACE.value, {}, 0), (ANY.value, _NARROW, 0), (ANY.value, _NARROW, _ALL),
        )
        for combine in _MIXED
    ),
    *(
        ahead_of_time(
            finish_kernel, types=types, MODE=mode, **_rows(types, offer), COMBINE=combine, **_GROUPS, **_TILED
        )
        for mode, types, offer in ((RACE.value, {}, 0), (ANY.value, _NARROW, 0), (ANY.value, _NARROW, _ALL))
        for combine in _MIXED
    ),
    *(
        ahead_of_time(collect_kernel, WRITE=write, OFFER=offer, COMBINE=combine, **_TILE, **_TILED)
        for write in (False, True)
        for combine in _MIXED
        for offer in (0, _ALL)
    ),
    # Triton compiles arguments that are 1 as constants.
    ahead_of_time(
        plan_kernel, MODE=TOP_K.value, **_rows({}), GROUPS=16, CHUNK=CHUNK, COMBINE=0, T=1, TILES=1, **_TILE, rows=1,
        tiles=1,
    ),
    ahead_of_time(
        select_kernel, _SELECT_WARPS, MODE=TOP_K.value, **_rows({}), SEGMENTS=1, CHUNK=CHUNK, COMBINE=0, T=1, TILES=1,
        rows=1, GROUPS=16, **_TILE,
    ),
    *(
        ahead_of_time(
            votes_kernel, _VOTE_WARPS, types=_NARROW, **_rows(_NARROW, offer), CHUNK=CHUNK, EXPERTS=8,
            COMBINE=VOTE.value, **_TILED,
        )
        for offer in (0, _ALL)
    ),
    ahead_of_time(likeliest_kernel, _PLAN_WARPS, SEGMENTS=128, CHUNK=CHUNK),
    *(
        ahead_of_time(
            select_kernel, _SELECT_WARPS, types=types, MODE=mode, **_rows(types, offer), SEGMENTS=128, COMBINE=combine,
            **_PLANNED, **_TILED,
        )
        for mode, combine, types, offer in (
            (TOP_K.value, 0, {}, 0),
            (NUCLEUS.value, LOGPROB.value, {}, 0),
            (GREEDY.value, VOTE.value, {}, 0),
            (ANY.value, 0, _NARROW, 0),
            (ANY.value, LOGPROB.value, _NARROW, 0),
            (ANY.value, VOTE.value, _WIDE, 0),
            (ANY.value, 0, _NARROW, _ALL),
        )
    ),
]  # fmt: skip
