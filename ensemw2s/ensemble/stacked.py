"""LoRA experts on one base, run as one model on stacked rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ensemw2s.ensemble.attached import Adapter, living, plain_model
from ensemw2s.models.sharing import turn_if_wrapped, view
from ensemw2s.ops.products import FrozenWeights, is_for_onednn, linear, product_library

# Up to this many rows and on several threads, MKL takes two thirds of the time for (W x^T)^T that it takes for x W^T,
# since it shares out the rows of its first factor. With more rows, turning the result round costs what is gained.
_FEW_ROWS = 64


def stackable(base: nn.Module, names: Sequence[str]) -> set[str]:
    """Return the adapters among `names` that differ from the base in nothing but LoRA products added to linear layers.

    Where something merged adapters into a layer or wrapped its forward pass, as accelerate does to move weights about,
    there are none.
    """
    if not isinstance(base, PeftModel):
        return set()
    plain = {name for name in names if _is_plain(base.peft_config[name])}
    for module in _outer_modules(base.get_base_model()):
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        if "forward" in vars(module) or (isinstance(module, BaseTunerLayer) and module.merged):
            return set()
        plain -= _more_than_products(module)
    return plain


def _is_plain(config: Any) -> bool:
    return bool(config.peft_type == PeftType.LORA and config.bias == "none" and not config.layer_replication)


def _more_than_products(module: Any) -> set[str]:
    """Return the names of the adapters that do more in a module of peft's than to add a LoRA product to it."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return set(module._adapters)
    if type(module) is LoraLinear:
        return {*module.lora_variant, *(name for name in module.lora_B if module.lora_B[name].bias is not None)}
    held = (getattr(module, attribute, ()) for attribute in module.adapter_layer_names)
    return {name for adapters in held for name in adapters}


def _outer_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model, of what peft has wrapped the wrapper alone."""
    yield model
    if not isinstance(model, BaseTunerLayer | AuxiliaryTrainingWrapper):
        for child in model.children():
            yield from _outer_modules(child)


class StackedAdapters:
    """T LoRA adapters on one base model, run as one model on T batches of rows that are stacked, expert after expert.

    The base's weights are read once per pass for all experts; each adapter's product is added to the rows of its
    expert by one batched product per linear layer. Adapters of one shape are held once: the weights of all adapters
    on the base become views of one tensor per layer. What is run is a `sharing.view` of the base, so that passes of
    other threads, stacked or not, are none of its business.

    Args:
        base: the model that carries the adapters; the caller has its turn.
        adapters: the T adapters, in the order of their rows.

    Raises:
        NotShareable: the base can only be run by its own modules.
    """

    def __init__(self, base: PeftModel, adapters: Sequence[Adapter]) -> None:
        self.base: nn.Module = base
        self.adapters = tuple(adapters)
        self.count = len(self.adapters)
        names = [adapter.name for adapter in adapters]
        plain = base.get_base_model()
        ours = living[plain]
        changes: dict[nn.Module, dict[str, Any]] = {base: {"active_adapter": names[0]}}
        weights = FrozenWeights()
        for module in _outer_modules(plain):
            if isinstance(module, LoraLinear):
                inner: Any = module.base_layer
                product = partial(_linear, weights, inner) if _is_bare(inner) else partial(_own_result, inner)
                changes[module] = {"forward": partial(_stacked_forward, product, *_stack(module, names, ours))}
            elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                # It holds other adapters alone, of which none is to act.
                changes[module] = {"_disable_adapters": True}
            elif _is_bare(module):
                changes[module] = {"forward": partial(_contiguous_linear, weights, module)}
        self._model = view(base, changes)

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """Within the block, the yielded model takes stacked rows; other threads run it too, so do not change it."""
        with turn_if_wrapped(plain_model(self.base)):
            yield self._model


def _stack(
    module: Any, names: Sequence[str], ours: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `A` [T, rank, in], `B` [T, out, rank] and the scales [T, 1, 1] of a layer; 0 where an adapter has none.

    `ours` are the names of all experts' adapters on the base.
    """
    own = [name for name in names if name in module.lora_A]
    weight = module.lora_A[own[0]].weight if own else module.base_layer.weight
    scales = weight.new_tensor([module.scaling[name] if name in own else 0.0 for name in names])[:, None, None]
    together = [name for name in module.lora_A if name in ours]
    if len(own) == len(names) and len({module.r[name] for name in together}) == 1:
        places = [together.index(name) for name in names]
        first, second = (_as_one(layers, together) for layers in (module.lora_A, module.lora_B))
        return _rows(first, places), _rows(second, places), scales
    rank = max((module.r[name] for name in own), default=0)
    first = weight.new_zeros(len(names), rank, module.in_features)
    second = weight.new_zeros(len(names), module.out_features, rank)
    for name in own:
        first[names.index(name), : module.r[name]] = module.lora_A[name].weight
        second[names.index(name), :, : module.r[name]] = module.lora_B[name].weight
    return first, second, scales


# Of the layers of all adapters at one place in the model: the tensor that holds their weights.
_stacks: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()


def _as_one(layers: nn.ModuleDict, names: Sequence[str]) -> torch.Tensor:
    """Return the equally shaped weights of some layers as one tensor, of which they are views from now on."""
    some: list[Any] = [layers[name] for name in names]
    weights = [layer.weight for layer in some]
    stack = _stacks.get(layers)
    if stack is None or not _are_rows_of(stack, weights):
        # Tensors made in inference mode could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            stack = torch.stack(weights)
        if any(weight.requires_grad for weight in weights):
            # An optimizer holds them.
            return stack
        for layer, row in zip(some, stack, strict=True):
            # In one stroke: a thread that reads the old weight keeps it until it is done.
            layer.weight = nn.Parameter(row, requires_grad=False)
        _stacks[layers] = stack
    return stack


def _are_rows_of(stack: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    step = stack.stride(0) * stack.element_size()
    return [weight.data_ptr() for weight in weights] == [stack.data_ptr() + step * i for i in range(len(stack))]


def _rows(stack: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Return some rows, as a view where they are neighbours."""
    first = places[0]
    neighbours = places == list(range(first, first + len(places)))
    return stack[first : first + len(places)] if neighbours else stack[places]


def _stacked_forward(
    base_layer: Callable[[torch.Tensor], torch.Tensor],
    first: torch.Tensor,
    second: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    """Return `x W^T + s_t x_t A_t^T B_t^T` for the rows `x_t` of each expert t; x is [T * rows, ..., in]."""
    result = base_layer(x).contiguous()
    if not first.shape[1]:
        return result
    rows = x.reshape(first.shape[0], -1, first.shape[2]).to(first.dtype)
    if is_for_onednn(rows[0], first[0]):
        inner = torch.stack([linear(*pair) for pair in zip(rows, first, strict=True)])
    else:
        inner = torch.bmm(rows, first.mT)
    each = result.view(first.shape[0], -1, second.shape[1])
    if result.dtype == second.dtype and not torch.is_autocast_enabled(result.device.type):
        # Another tensor of this size would take longer to be had than to be filled.
        each.baddbmm_(inner.mul_(scales), second.mT)
        return result
    return (each + torch.bmm(inner.mul_(scales), second.mT)).view(result.shape).to(result.dtype)


def _is_bare(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of torch's own, to which nobody has attached anything."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _own_result(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return a layer's result, to be written to; its own may be kept by a hook."""
    return layer(x).clone()


def _linear(weights: FrozenWeights, layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return `x W^T + b`, perhaps as a transposed view."""
    rows = x.reshape(-1, layer.in_features)
    few = len(rows) <= _FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu"
    if not few or torch.get_num_threads() == 1 or torch.is_autocast_enabled("cpu") or product_library() == "onednn":
        return weights.linear(x, layer.weight, layer.bias)
    # MKL multiplies by one row half as fast as by two.
    twice = rows.repeat(2, 1) if len(rows) == 1 else rows
    result = torch.mm(layer.weight, twice.T).T[: len(rows)]
    return (result if layer.bias is None else result + layer.bias).view(*x.shape[:-1], -1)


def _contiguous_linear(weights: FrozenWeights, layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return `x W^T + b`."""
    return _linear(weights, layer, x).contiguous()
