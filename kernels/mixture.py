"""What the mixture kernels share: one read of the logits, the normalisers it gives, and log-probabilities from them.

The vocabulary is cut into tiles. One program reads one tile of one row from all experts and leaves its maxima and its
sum of exponentials; a program per row merges those. So few rows use the whole GPU as many rows do, and a row's
numbers never depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Small enough that one row of a usual vocabulary occupies most multiprocessors.
TILE = 2048
# Bounds are kept per group: 128 tokens is one token in 64 bytes of bounds, and still names few candidates.
GROUP = 128
# 16 logits a thread: two loads of 16-bit types. With half as many a scan took 25 instructions a logit instead of 18; an
# H100 has time for 20 while it reads one.
WARPS = 4

PROB = tl.constexpr(0)
LOGPROB = tl.constexpr(1)
VOTE = tl.constexpr(2)
# Bits of what an offer has.
MASK = tl.constexpr(1)
ADJUSTED = tl.constexpr(2)
LOWEST = tl.constexpr(-3.4028234663852886e38)
MASKED = tl.constexpr(-100)

# Arguments for whose values Triton shall not compile a kernel anew, as it does for 1 and for multiples of 16.
SIZES = ["rows", "tiles", "first_row", "inner", "capacity", "segments", "top_k", "top_count"]

# Types by which the mixture kernels can be compiled without a GPU; whatever is not named is float32 scratch.
_TYPES = {
    **dict.fromkeys(("inner", "rows", "vocabulary", "tiles", "capacity", "segments", "weight_step"), "i32"),
    **dict.fromkeys(("first_row", "top_k", "top_count"), "i32"),
    **dict.fromkeys(("temperature", "top_p", "min_p"), "fp32"),
    **dict.fromkeys(("labels", "seeds", "positions", "out_tokens", "out_top_tokens"), "*i64"),
    **dict.fromkeys(("tile_first", "counts", "ids", "token"), "*i32"),
    **dict.fromkeys(("valid", "out_valid", "out_correct"), "*i1"),
}


def ahead_of_time(
    kernel: Any, num_warps: int = WARPS, dtype: str = "bf16", types: dict[str, str] | None = None, **constexprs: Any
) -> tuple[Any, ...]:
    """(kernel, signature, constexprs, num_warps) of a kernel whose arguments bear this file's names."""
    experts = constexprs.get("T", 1)
    types = {
        **_TYPES,
        **(types or {}),
        "logits": (f"*{dtype}",) * experts,
        "outer": ("i64",) * experts,
        "step": ("i64",) * experts,
        "offer": ("*i32", "*i32", "*fp32", "*i32", "i32", "i32"),
    }
    signature = {n: "constexpr" if n in constexprs else types.get(n, "*fp32") for n in kernel.arg_names}
    return kernel, signature, constexprs, num_warps


class Rows(NamedTuple):
    """Tensors ``[..., V]`` as rows: row ``i`` of tensor ``t`` is at ``i // inner * outer[t] + i % inner * step[t]``.

    Attributes:
        tensors: One or more tensors of one shape, last stride 1.
        outer: Stride between blocks of ``inner`` rows, one per tensor.
        step: Stride between the rows of a block, one per tensor.
        inner: Rows per block.
        count: Rows.
        vocabulary: V.
    """

    tensors: tuple[Tensor, ...]
    outer: tuple[int, ...]
    step: tuple[int, ...]
    inner: int
    count: int
    vocabulary: int


def rows_of(tensors: Sequence[Tensor]) -> Rows:
    """Rows of tensors ``[..., V]``; copied only where two strides cannot describe their leading axes."""
    shape = tensors[0].shape[:-1]
    count = shape.numel()
    for split in range(len(shape) + 1):
        strides = [(_joint_stride(x, 0, split), _joint_stride(x, split, len(shape))) for x in tensors]
        if all(outer is not None and step is not None for outer, step in strides):
            outer, step = zip(*strides, strict=True)
            return Rows(tuple(tensors), outer, step, max(shape[split:].numel(), 1), count, tensors[0].shape[-1])
    return rows_of([x.contiguous() for x in tensors])


def _joint_stride(tensor: Tensor, first: int, last: int) -> int | None:
    """The one stride that walks through the axes first, ..., last - 1 as if they were one; None if there is none."""
    axes = [(n, s) for n, s in zip(tensor.shape[first:last], tensor.stride()[first:last], strict=True) if n != 1]
    if any(s != n_next * s_next for (_, s), (n_next, s_next) in pairwise(axes)):
        return None
    return axes[-1][1] if axes else 0


class Offer(NamedTuple):
    """Which tokens a row may draw, and at which changed log-probabilities; see ``ops.token_adjustments``.

    Attributes:
        mask: int32 ``[rows, words]``, a bit for each token that may be drawn, or None.
        tokens: int32 ``[rows, count]``, adjusted tokens, or None.
        values: float32 ``[3, rows, count]`` of them, or None.
        listed: int32 ``[rows, words]``, a bit for each of them, or None.
    """

    mask: Tensor | None = None
    tokens: Tensor | None = None
    values: Tensor | None = None
    listed: Tensor | None = None

    @property
    def kind(self) -> int:
        """The bits of ``MASK`` and ``ADJUSTED``; 0 where all tokens may be drawn as they are."""
        return MASK.value * (self.mask is not None) + ADJUSTED.value * (self.tokens is not None)

    def arguments(self, other: Tensor) -> tuple[Any, ...]:
        """One kernel argument, a tuple; ``other`` stands where there is no tensor."""
        some = self.mask if self.mask is not None else self.listed
        words = 0 if some is None else some.shape[1]
        count = 0 if self.tokens is None else self.tokens.shape[1]
        return *(other if part is None else part.contiguous() for part in self), count, words


class Scan(NamedTuple):
    """Scratch of one read of T experts' logits; ``S`` is T, and one more (the product) for ``"logprob"``.

    Attributes:
        rows: The experts' rows.
        weights: float32 ``[T]``, or ``[..., T]`` of each row.
        combine: Position in ``COMBINES``.
        tiles: Tiles per row.
        tile_max: float32 ``[S, rows, tiles]``, the largest logit, at least float32's lowest. The product's scores are
            taken beside the experts' largest logits in the tile; ``merge_tiles`` makes that those in the row, and
            leaves the difference behind, as ``[S, ...]``.
        tile_sum: float32 ``[S, rows, tiles]``, the sum of ``exp(logit - tile_max)``; NaN in a tile with NaN or +inf.
        tile_first: int32 ``[T, rows, tiles]``, for ``"vote"`` the lowest id of the largest logit.
        group_max: float32 ``[T, rows, groups]``, the largest logit of each group, or ``[1, ...]`` of the product.
        plain_max: The same of the tokens that may be drawn as they are, where an offer leaves out some.
        top: float32 ``[S, rows]``, the largest logit; of the product the likeliest token's score, see
            ``anchor_product``.
        log_sum: float32 ``[S, rows]``, log of the sum of ``exp(logit - top)``; NaN without finite logits.
        shift: float32 ``[S, rows]``, ``log(w) - log_sum``, or -inf for an expert of weight 0.
    """

    rows: Rows
    weights: Tensor
    combine: int
    tiles: int
    tile_max: Tensor
    tile_sum: Tensor
    tile_first: Tensor
    group_max: Tensor
    plain_max: Tensor
    top: Tensor
    log_sum: Tensor
    shift: Tensor

    @property
    def experts(self) -> tuple[object, ...]:
        """Kernel arguments that name the logits."""
        return self.rows.tensors, self.rows.outer, self.rows.step, self.rows.inner

    @property
    def partials(self) -> tuple[Any, ...]:
        """Kernel arguments of ``merge_tiles``."""
        return *_with_step(self.weights), self.tile_max, self.tile_sum, self.top, self.log_sum, self.shift

    @property
    def normalisers(self) -> tuple[Any, ...]:
        """Kernel arguments of ``log_prob``."""
        return *_with_step(self.weights), self.top, self.log_sum, self.shift


def _with_step(weights: Tensor) -> tuple[Tensor, int]:
    """Contiguous weights and what leads from those of a row to the next row's: 0 if all rows share them."""
    return weights, weights.shape[-1] if weights.dim() > 1 else 0


def scan(
    logits: Sequence[Tensor],
    weights: Tensor,
    combine: int,
    labels: Tensor | None = None,
    offer: Offer | None = None,
) -> Scan:
    """Read the logits once, but not experts of weight 0, nor rows whose label (int64 ``[rows]``) is masked."""
    rows, weights = rows_of(logits), weights.contiguous()
    tiles = triton.cdiv(rows.vocabulary, TILE)
    experts = len(logits)
    is_product, is_vote = combine == LOGPROB.value, combine == VOTE.value
    slots = experts + is_product
    offer = offer or Offer()
    like = {"dtype": torch.float32, "device": weights.device}
    out = Scan(
        rows,
        weights,
        combine,
        tiles,
        torch.empty((slots + is_product, rows.count, tiles), **like),
        torch.empty((slots, rows.count, tiles), **like),
        torch.empty((experts, rows.count, tiles) if is_vote else 1, dtype=torch.int32, device=weights.device),
        *(
            torch.empty((1 if is_product else experts, rows.count, tiles * (TILE // GROUP)) if is_kept else 1, **like)
            for is_kept in (True, bool(offer.kind))
        ),
        *(torch.empty((slots, rows.count), **like) for _ in range(3)),
    )
    scan_kernel[(rows.count * tiles,)](
        *out.experts,
        *_with_step(weights),
        weights if labels is None else labels,
        out.tile_max,
        out.tile_sum,
        out.tile_first,
        out.group_max,
        out.plain_max,
        offer.arguments(weights),
        rows.count,
        rows.vocabulary,
        tiles,
        T=experts,
        COMBINE=combine,
        HAS_LABELS=labels is not None,
        OFFER=offer.kind,
        TILE=TILE,
        GROUP=GROUP,
        num_warps=WARPS,
    )
    return out


@triton.jit
def row_offset(row, outer, step, inner):
    """Offset of a row (int64) from the start of its tensor."""
    return row // inner * outer + row % inner * step


@triton.jit
def unmasked(label, vocabulary):
    """Tokens of a row that are read: none beside a masked label."""
    return tl.where(label != MASKED, vocabulary, 0)


@triton.jit
def weight_total(weights, T: tl.constexpr):
    """Largest weight, sum of the weights divided by it, and whether they are usable.

    They are if none is negative, NaN or infinite and not all are zero. Their own sum may be more than float32 holds.
    """
    largest = 0.0
    usable = True
    for t in range(T):
        weight = tl.load(weights + t)
        usable = usable & (weight >= 0)
        largest = tl.maximum(largest, weight)
    total = 0.0
    for t in range(T):
        total += tl.load(weights + t) / largest
    return largest, total, usable & (largest > 0) & (largest < float("inf"))


@triton.jit
def product_term(share, z, top):
    """``share * (z - top)`` with ``top >= z``, by halves: ``z - top`` may be more than float32 holds."""
    return 2.0 * share * (0.5 * z - 0.5 * top)


@triton.jit
def scan_tile(z, slot, row, tile, tile_max, tile_sum, rows, tiles):
    """Leave the normaliser of one tile of scores ``z``."""
    top = tl.maximum(tl.max(z, axis=0), LOWEST)
    at = (slot * rows + row) * tiles + tile
    tl.store(tile_max + at, top)
    tl.store(tile_sum + at, tl.sum(tl.exp(z - top), axis=0))
    return top


@triton.jit
def scan_groups(z, slot, row, tile, group_max, rows, tiles, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Leave the maximum of each group of a tile."""
    GROUPS: tl.constexpr = TILE // GROUP
    top = tl.max(tl.reshape(z, (GROUPS, GROUP)), axis=1)
    tl.store(group_max + ((slot * rows + row) * tiles + tile) * GROUPS + tl.arange(0, GROUPS), top)


@triton.jit
def bits_of(packed, tokens, inside, row, words):
    """The bits of some tokens in a row of an int32 ``[rows, words]``."""
    word = tl.load(packed + row * words + tokens // 32, mask=inside, other=0)
    return ((word >> (tokens % 32)) & 1) != 0


@triton.jit
def is_plain(tokens, inside, row, offer, OFFER: tl.constexpr):
    """Whether tokens may be drawn, and as they are."""
    plain = inside
    if MASK & OFFER:
        plain = plain & bits_of(offer[0], tokens, inside, row, offer[5])
    if ADJUSTED & OFFER:
        plain = plain & (bits_of(offer[3], tokens, inside, row, offer[5]) == 0)
    return plain


@triton.jit
def changed(found, place, inside, row, rows, offer):
    """What the log-probabilities of the adjusted tokens at these places of a row's list become."""
    first = offer[2] + row * offer[4] + place
    bias = tl.load(first, mask=inside, other=0.0)
    repetition = tl.load(first + rows * offer[4], mask=inside, other=1.0)
    penalty = tl.load(first + 2 * rows * offer[4], mask=inside, other=0.0)
    shifted = found + bias
    return tl.minimum(tl.where(shifted < 0, shifted * repetition, shifted / repetition) - penalty, -LOWEST)


@triton.jit
def offered(found, tokens, inside, row, rows, offer, OFFER: tl.constexpr):
    """The log-probabilities at which tokens are offered, out of the mixture's; -inf where they may not be drawn."""
    result = found
    if ADJUSTED & OFFER:
        listed = bits_of(offer[3], tokens, inside, row, offer[5])
        low, high = tl.zeros_like(tokens), tl.zeros_like(tokens) + offer[4]
        for _ in range(32):
            middle = (low + high) // 2
            searching = listed & (low < high)
            other = tl.load(offer[1] + row * offer[4] + middle, mask=searching, other=-1)
            is_before = searching & (other >= 0) & (other < tokens)
            low = tl.where(is_before, middle + 1, low)
            high = tl.where(searching & (is_before == 0), middle, high)
        result = tl.where(listed, changed(found, low, listed & (low < offer[4]), row, rows, offer), found)
    if MASK & OFFER:
        result = tl.where(bits_of(offer[0], tokens, inside, row, offer[5]), result, -float("inf"))
    return result


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    logits, outer, step, inner, weights, weight_step, labels, tile_max, tile_sum, tile_first, group_max, plain_max,
    offer, rows, vocabulary, tiles,
    T: tl.constexpr, COMBINE: tl.constexpr, HAS_LABELS: tl.constexpr, OFFER: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of one row, all experts. Grid: rows * tiles."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    weights += row * weight_step
    tokens = tile * TILE + tl.arange(0, TILE)
    end = vocabulary
    if HAS_LABELS:
        end = unmasked(tl.load(labels + row), vocabulary)
    inside = tokens < end
    if OFFER:
        plain = is_plain(tokens, inside, row, offer, OFFER)
    if COMBINE == LOGPROB:
        largest, total, _ = weight_total(weights, T)
        product = tl.zeros((TILE,), tl.float32)
    for t in tl.static_range(T):
        start = logits[t] + row_offset(row, outer[t], step[t], inner)
        is_read = tl.where(tl.load(weights + t) != 0, inside, False)
        z = tl.load(start + tokens, mask=is_read, other=-float("inf")).to(tl.float32)
        top = scan_tile(z, t, row, tile, tile_max, tile_sum, rows, tiles)
        if COMBINE == LOGPROB:
            share = tl.load(weights + t) / largest / total
            product += tl.where(share > 0, product_term(share, z, top), 0.0)
        else:
            scan_groups(z, t, row, tile, group_max, rows, tiles, TILE, GROUP)
            if OFFER:
                scan_groups(tl.where(plain, z, -float("inf")), t, row, tile, plain_max, rows, tiles, TILE, GROUP)
        if COMBINE == VOTE:
            first = tl.min(tl.where(z == top, tokens, vocabulary), axis=0)
            tl.store(tile_first + (t * rows + row) * tiles + tile, first)
    if COMBINE == LOGPROB:
        product = tl.where(inside, product, -float("inf"))
        scan_tile(product, T, row, tile, tile_max, tile_sum, rows, tiles)
        scan_groups(product, 0, row, tile, group_max, rows, tiles, TILE, GROUP)
        if OFFER:
            scan_groups(tl.where(plain, product, -float("inf")), 0, row, tile, plain_max, rows, tiles, TILE, GROUP)


@triton.jit
def merge_tiles(
    row, weights, tile_max, tile_sum, top, log_sum, shift, rows, tiles,
    T: tl.constexpr, COMBINE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Normalisers of one row out of those of its tiles (at most ``TILES``); returns whether the row is valid."""
    largest_weight, total, valid = weight_total(weights, T)
    tile = tl.arange(0, TILES)
    descent = tl.zeros((TILES,), tl.float32)
    for slot in range(T + (1 if COMBINE == LOGPROB else 0)):
        share = 1.0
        if slot < T:
            share = tl.load(weights + slot) / largest_weight / total
        at = (slot * rows + row) * tiles + tile
        largest = tl.load(tile_max + at, mask=tile < tiles, other=LOWEST)
        sums = tl.load(tile_sum + at, mask=tile < tiles, other=0.0)
        if COMBINE == LOGPROB:  # noqa: SIM102  (this one is decided when the kernel is compiled)
            if slot == T:
                largest = tl.where(sums > 0, largest + descent, LOWEST)
                tl.store(tile_max + at, largest, mask=tile < tiles)
                tl.store(tile_max + ((T + 1) * rows + row) * tiles + tile, descent, mask=tile < tiles)
        row_top = tl.max(largest, axis=0)
        row_sum = tl.sum(sums * tl.exp(largest - row_top), axis=0)
        usable = (row_sum > 0) & (row_sum < float("inf"))
        valid = valid & (usable | (share == 0))
        row_log_sum = tl.where(usable, tl.log(row_sum), float("nan"))
        tl.store(top + slot * rows + row, row_top)
        tl.store(log_sum + slot * rows + row, row_log_sum)
        row_shift = tl.where(share > 0, tl.log(share) - row_log_sum, -float("inf"))
        tl.store(shift + slot * rows + row, row_shift)
        descent += tl.where(share > 0, product_term(share, largest, row_top), 0.0)
    # The same program reads the normalisers next, in other threads.
    tl.debug_barrier()
    return valid


@triton.jit
def product_score(tokens, inside, row, logits, outer, step, inner, weights, top, rows, T: tl.constexpr):
    """The product's score of some tokens beside the experts' largest logits; -inf where not ``inside``."""
    largest, total, _ = weight_total(weights, T)
    product = tl.zeros_like(tokens).to(tl.float32)
    for t in tl.static_range(T):
        start = logits[t] + row_offset(row, outer[t], step[t], inner)
        share = tl.load(weights + t) / largest / total
        is_read = tl.where(share > 0, inside, False)
        z = tl.load(start + tokens, mask=is_read, other=-float("inf")).to(tl.float32)
        product += tl.where(share > 0, product_term(share, z, tl.load(top + t * rows + row)), 0.0)
    return tl.where(inside, product, -float("inf"))


@triton.jit
def anchor_product(
    row, logits, outer, step, inner, weights, tile_max, top, group_max, rows, vocabulary, tiles,
    T: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Make the product's ``top`` the likeliest token's score as ``product_score`` finds it.

    Where the experts disagree by far the scores are large numbers, and roundings of them too: the likeliest token is
    likely in the arithmetic of the passes that follow only if the others are compared with its score there.
    """
    tile = tl.arange(0, TILES)
    largest = tl.load(tile_max + (T * rows + row) * tiles + tile, mask=tile < tiles, other=-float("inf"))
    best = tl.argmax(largest, axis=0)
    group = tl.arange(0, TILE // GROUP)
    maxima = tl.load(group_max + (row * tiles + best) * (TILE // GROUP) + group)
    tokens = best * TILE + tl.argmax(maxima, axis=0) * GROUP + tl.arange(0, GROUP)
    scores = product_score(tokens, tokens < vocabulary, row, logits, outer, step, inner, weights, top, rows, T)
    tl.store(top + T * rows + row, tl.max(scores, axis=0))
    tl.debug_barrier()


@triton.jit
def add_term(x, largest, total):
    """``log(exp(largest) * total + exp(x))`` as a largest term and a sum relative to it; starts at LOWEST and 0."""
    fall = tl.exp(-tl.abs(x - largest))
    return tl.maximum(x, largest), tl.where(x > largest, total * fall + 1.0, total + fall)


@triton.jit
def log_prob(
    tokens, inside, row, logits, outer, step, inner, weights, top, log_sum, shift, rows,
    T: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """The mixture's log-probability of some tokens (a block or a scalar) of a row; -inf where not ``inside``."""
    if COMBINE == LOGPROB:
        score = product_score(tokens, inside, row, logits, outer, step, inner, weights, top, rows, T)
        return tl.minimum((score - tl.load(top + T * rows + row)) - tl.load(log_sum + T * rows + row), 0.0)
    largest = tl.zeros_like(tokens).to(tl.float32) + LOWEST
    total = tl.zeros_like(largest)
    for t in tl.static_range(T):
        start = logits[t] + row_offset(row, outer[t], step[t], inner)
        row_shift = tl.load(shift + t * rows + row)
        is_read = tl.where(row_shift > -float("inf"), inside, False)
        z = tl.load(start + tokens, mask=is_read, other=-float("inf")).to(tl.float32)
        x = (z - tl.load(top + t * rows + row)) + row_shift
        largest, total = add_term(tl.where(row_shift > -float("inf"), x, -float("inf")), largest, total)
    return tl.where(total > 0, tl.log(total) + largest, -float("inf"))


@triton.jit
def group_bounds(
    row, group_max, tile_max, top, log_sum, shift, rows, groups, tiles,
    T: tl.constexpr, COMBINE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Upper and lower bounds on the largest log-probability in each group of a row: two float32 ``[GROUPS]``."""
    group = tl.arange(0, GROUPS)
    inside = group < groups
    if COMBINE == LOGPROB:
        z = tl.load(group_max + row * groups + group, mask=inside, other=-float("inf"))
        descents = tile_max + ((T + 1) * rows + row) * tiles
        descent = tl.load(descents + group // (groups // tiles), mask=inside, other=0.0)
        exact = (z + (descent - tl.load(top + T * rows + row))) - tl.load(log_sum + T * rows + row)
        return exact, exact
    largest = tl.full((GROUPS,), LOWEST, tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    for t in range(T):
        z = tl.load(group_max + (t * rows + row) * groups + group, mask=inside, other=-float("inf"))
        row_shift = tl.load(shift + t * rows + row)
        x = (z - tl.load(top + t * rows + row)) + row_shift
        largest, total = add_term(tl.where(row_shift > -float("inf"), x, -float("inf")), largest, total)
    possible = total > 0
    return tl.where(possible, tl.log(total) + largest, -float("inf")), tl.where(possible, largest, -float("inf"))


@triton.jit
def vote_of(t, row, shift, tile_max, tile_first, top, rows, tiles, TILES: tl.constexpr):
    """The lowest id of expert t's largest logit; -1 for an expert of weight 0."""
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    at = (t * rows + row) * tiles + tile
    largest = tl.load(tile_max + at, mask=inside, other=LOWEST)
    first = tl.load(tile_first + at, mask=inside, other=2147483647)
    winner = tl.min(tl.where(largest == tl.load(top + t * rows + row), first, 2147483647), axis=0)
    return tl.where(tl.load(shift + t * rows + row) > -float("inf"), winner, -1)


@triton.jit
def votes_for(token, row, weights, shift, tile_max, tile_first, top, rows, tiles, T: tl.constexpr, TILES: tl.constexpr):
    """Log of the share of the weight that votes for a token."""
    largest, total, _ = weight_total(weights, T)
    share = 0.0
    for t in range(T):
        winner = vote_of(t, row, shift, tile_max, tile_first, top, rows, tiles, TILES)
        share += tl.where(winner == token, tl.load(weights + t) / largest / total, 0.0)
    return tl.log(share)


@triton.jit
def slack(bound, row, top, rows, T: tl.constexpr, COMBINE: tl.constexpr):
    """Rounding that a bound or a log-probability of this size may have in a row."""
    of_product = 0.0
    if COMBINE == LOGPROB:
        of_product = 1e-7 * (8 + T) * tl.abs(tl.load(top + T * rows + row))
    return 2e-5 + of_product + 1e-6 * tl.minimum(tl.abs(bound), 1e30)


@triton.jit
def first_argmax(score, token):
    """Largest score of a block and its lowest token; -inf and 2147483647 for a block without finite scores."""
    best = tl.max(score, axis=0)
    ties = (score == best) & (score > -float("inf"))
    return best, tl.min(tl.where(ties, token, 2147483647), axis=0)


AHEAD_OF_TIME = [
    ahead_of_time(scan_kernel, T=t, COMBINE=combine, HAS_LABELS=True, OFFER=kind, TILE=TILE, GROUP=GROUP)
    for t, combine, kind in (
        (1, PROB.value, 0),
        (5, PROB.value, 0),
        (5, LOGPROB.value, 0),
        (5, VOTE.value, 0),
        (5, PROB.value, MASK.value + ADJUSTED.value),
        (5, LOGPROB.value, MASK.value + ADJUSTED.value),
    )
]
