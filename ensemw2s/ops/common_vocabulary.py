"""``common_vocabulary``: logits of experts that number their tokens each in its own way, over one vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ensemw2s.ops.checks import check_logits, check_same_device, check_tensor, shown, tensor_list


def common_vocabulary(logits: Sequence[Tensor], maps: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """Bring T experts' logits into one vocabulary of V tokens, as every op of this package wants them.

    Tokenizers of one family are often padded to different sizes (151,936 and 152,064 tokens): there no map is needed,
    V is the smallest size, and what comes back are views, which cost nothing. An expert with a map is gathered into new
    memory, one pass over its logits.

    An expert's distribution is then that over the tokens which the common vocabulary has: what its softmax gave others
    is shared out among these.

    Args:
        logits: T tensors ``[..., V_t]`` with equal leading axes.
        maps: For each expert int32 or int64 ``[V]``, its own id of every common token, -1 where it has no such token;
            or None where common token v is its own token v. None altogether is None for each.

    Returns:
        T tensors ``[..., V]``, -inf where an expert has no such token; differentiable. On a GPU, where nothing waits
        for it, a map's id that the expert does not have makes its rows NaN.

    Raises:
        ValueError: Not a map for each expert; maps of several lengths; an expert without a map that has fewer tokens
            than the common vocabulary; or, on a CPU, an id that is neither -1 nor one of the expert's.
        TypeError: A map or logits of another kind or dtype.
    """
    experts = [check_logits(expert, f"logits[{t}]") for t, expert in enumerate(tensor_list(logits, "logits"))]
    given = [None] * len(experts) if maps is None else list(maps)
    if not experts or len(given) != len(experts):
        raise ValueError(f"maps must have one entry for each of {len(experts)} experts, at least one; got {len(given)}")
    lengths = {len(_checked(each, experts[t], t)) for t, each in enumerate(given) if each is not None}
    if len(lengths) > 1:
        raise ValueError(f"maps must all have the length of the common vocabulary, got lengths {sorted(lengths)}")
    size = lengths.pop() if lengths else min(expert.shape[-1] for expert in experts)
    for t, (expert, each) in enumerate(zip(experts, given, strict=True)):
        if each is None and expert.shape[-1] < size:
            raise ValueError(
                f"maps[{t}] is None, but logits[{t}] has {expert.shape[-1]} tokens and the common vocabulary {size}: "
                "give a map with -1 for those that it lacks"
            )
    return [x[..., :size] if each is None else _gathered(x, each) for x, each in zip(experts, given, strict=True)]


def _checked(own_ids: Tensor, expert: Tensor, t: int) -> Tensor:
    name = f"maps[{t}]"
    check_tensor(own_ids, name)
    if own_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {own_ids.dtype}")
    if own_ids.dim() != 1 or not len(own_ids):
        raise ValueError(f"{name} must be [V] with at least one token, got shape {tuple(own_ids.shape)}")
    check_same_device(own_ids, expert, name)
    if own_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(value) for value in own_ids.aminmax())
        if low < -1 or high >= expert.shape[-1]:
            raise ValueError(
                f"{name} holds {shown(low if low < -1 else high)}, expected -1 or an id below {expert.shape[-1]}, the "
                f"number of tokens of logits[{t}]"
            )
    return own_ids


def _gathered(logits: Tensor, own_ids: Tensor) -> Tensor:
    own_size = logits.shape[-1]
    found = logits.index_select(-1, own_ids.clamp(0, own_size - 1)).masked_fill(own_ids == -1, -torch.inf)
    if own_ids.device.type == "cpu":
        return found
    return found.masked_fill((own_ids < -1) | (own_ids >= own_size), torch.nan)
