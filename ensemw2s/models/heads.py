"""The output head of a causal language model: which rows go through it, and what is computed there instead of logits.

The head is where a small model spends a large share of its work and most of its memory. Everything here acts inside the
model's own forward pass, on the head module alone, so that any wrapper for adapters or several processes stays intact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ensemw2s.models.sharing import NotShareable, turn_of, view

# What the probe puts in place of logits runs from minus this to this: no soft cap in use leaves such values alone.
_PROBE_RANGE = 100.0


def output_head(model: Any) -> nn.Module:
    """Return the module that maps hidden states to logits, with whatever an adapter wraps around it.

    Raises:
        TypeError: the model has no output embeddings.
    """
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise TypeError(
            f"{type(model).__name__} has no output embeddings (`get_output_embeddings()` is None): "
            "expected a causal language model whose last layer maps hidden states to the vocabulary"
        )
    return head


@contextmanager
def own_head(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, the yielded model is `model` with an output head of its own.

    The functions below change the head of the model that they are given. Where other threads may run that model, they
    are given this one. A model that only its own modules can run is held by one thread at a time instead.

    Raises:
        TypeError: the model has no output embeddings.
    """
    try:
        mine = view(model, {output_head(model): {}})
    except NotShareable:
        mine = model
    with turn_of(model) if mine is model else nullcontext():
        yield mine


@contextmanager
def only_positions(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within the block, `model(...).logits` holds the rows of `positions` alone.

    Args:
        model: a causal language model, wrapped by peft or not.
        positions: bool [batch, length], whose n true entries are kept in row-major order; or int64 [n], positions in
            the flattened [batch, length], in the order wanted.

    Raises:
        TypeError: the model has no output embeddings to select in front of.
    """

    def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden, kept = inputs[0], positions.to(inputs[0].device)
        return (hidden[kept] if kept.dtype == torch.bool else hidden.flatten(0, 1)[kept],)

    with output_head(model).register_forward_pre_hook(select):
        yield


@contextmanager
def replaced_head(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, `head` maps hidden states by `forward`.

    The head is still called where the model calls it, after its own hooks: that is where a sharded model has its
    weights together, and what `forward` returns is an output of the model, which a wrapper can follow back.

    Args:
        head: see `output_head`.
        forward: takes hidden states [batch, length, d] and returns what becomes the model's `.logits`.
    """
    # Device maps put a forward of their own on the instance.
    before = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def states_before(
    head: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any], select: Callable[[Tensor], Tensor]
) -> Tensor:
    """Run a model up to its output head, which is not run, and return a part of the hidden states there.

    Args:
        head: the `output_head` of the model.
        forward: calls the model.
        inputs: keyword arguments of the model, beside `use_cache`.
        select: takes the hidden states [batch, length, d] and returns what is kept of them.
    """
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        kept.append(select(hidden))
        return hidden[..., :1]

    with replaced_head(head, keep):
        forward(**inputs, use_cache=False)
    return kept[0]


def linear_of(head: nn.Module) -> nn.Linear | None:
    """Return the linear layer without bias that is all of `head`, or None if it is anything else.

    A whole layer that peft trains beside the original (`modules_to_save`) is followed; a layer that carries a LoRA
    product, is quantised, parametrised or moved between devices is something else.
    """
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return None
    return head


@torch.no_grad()
def gives_the_logits(head: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Return whether what `head` gives are the model's logits, no soft cap or scale being put on them afterwards.

    One forward pass in evaluation mode, which draws no random numbers, with known values in place of the head's
    output: they have to come out as they went in.

    Args:
        head: the `output_head` of the model.
        model: the model, in any wrapper.
        inputs: keyword arguments of the model; a row of one token is enough.
    """
    size = getattr(head, "out_features", None)
    if size is None:
        return False
    given: list[Tensor] = []

    def known(hidden: Tensor) -> Tensor:
        values = torch.linspace(-_PROBE_RANGE, _PROBE_RANGE, size, dtype=hidden.dtype, device=hidden.device)
        given.append(values.expand(*hidden.shape[:-1], size))
        return given[-1]

    training = model.training
    if training:
        model.eval()
    try:
        with replaced_head(head, known):
            logits = model(**inputs).logits
    finally:
        if training:
            model.train()
    return len(given) == 1 and torch.equal(logits.float(), given[0].to(logits.device).float())


def obstacle(head: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """Say why the loss cannot be taken from the hidden states in front of `head`; None if it can.

    The arguments are those of `gives_the_logits`.
    """
    if linear_of(head) is None:
        kind = "has a bias" if type(head) is nn.Linear and head.bias is not None else f"is a {type(head).__name__}"
        return f"its output head {kind}, not a plain linear layer"
    if not gives_the_logits(head, model, inputs):
        return "it changes what its output head gives (a soft cap or a scale of the logits)"
    return None


def for_product(hidden: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return hidden states [n, d] and the weight [V, d] of a head in one dtype: autocast's, or else the head's."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else linear.weight.dtype
    return hidden.to(dtype), linear.weight.to(dtype)
