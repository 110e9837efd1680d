"""Many experts behind one interface: adapters on one base model, or whole models side by side."""

from __future__ import annotations

import functools
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ensemw2s.adapters import attach_adapter

# Up to this many rows and on several threads, MKL takes two thirds of the time for (W x^T)^T that it takes for x W^T,
# since it shares out the rows of its first factor. With more rows, turning the result round costs what is gained.
_FEW_ROWS = 64

Result = TypeVar("Result")


class Experts(nn.Module, ABC):
    """T causal language models over one vocabulary. Experts are numbered from 0."""

    kind: str

    @abstractmethod
    def __len__(self) -> int:
        """Return T."""

    @abstractmethod
    def expert(self, index: int) -> AbstractContextManager[nn.Module]:
        """Within the block, the yielded module is expert `index`."""

    @abstractmethod
    def expert_config(self, index: int) -> PreTrainedConfig:
        """Return the model configuration of expert `index`."""

    @abstractmethod
    def selected(self, indices: Sequence[int]) -> Experts:
        """Return the named experts, sharing their weights with these."""

    @abstractmethod
    def save_expert(self, index: int, folder: Path, **options: Any) -> None:
        """Write expert `index` to `folder` as safetensors; `options` are those of transformers' `save_pretrained`."""

    def stacked(self) -> StackedAdapters | None:
        """Return all experts as one model for stacked rows, or None where each has to run by itself."""
        return None

    def map(self, run: Callable[[nn.Module, int], Result], indices: Sequence[int]) -> list[Result]:
        """Return `run(expert, index)` for some experts, one after the other."""
        results = []
        for index in indices:
            with self.expert(index) as model:
                results.append(run(model, index))
        return results


class AdapterExperts(Experts):
    """T adapters (LoRA and its kin, by peft) on one base model, whose weights are held once.

    Args:
        base: the pre-trained model without adapters.
        folders: one saved adapter each.
    """

    kind = "adapters"

    def __init__(self, base: PreTrainedModel | PeftModel, folders: Sequence[str | os.PathLike[str]] = ()) -> None:
        super().__init__()
        # A `PeftModel` from the first adapter on.
        self.base: Any = base
        self.names: list[str] = []
        for folder in folders:
            self.add(folder)

    def add(self, folder: str | os.PathLike[str]) -> None:
        """Append the adapter saved in `folder`; see `adapters.attach_adapter` for errors, which leave all as it was."""
        # Experts that were selected from others share their base, and with it the names already taken.
        taken = self.base.peft_config if isinstance(self.base, PeftModel) else {}
        name = next(name for name in map("expert_{}".format, itertools.count(1)) if name not in taken)
        self.base = attach_adapter(self.base, folder, f"expert {len(self) + 1}", name=name)
        self.names.append(name)
        self.base.eval().requires_grad_(False)

    def __len__(self) -> int:
        return len(self.names)

    @contextmanager
    def expert(self, index: int) -> Iterator[nn.Module]:
        """Within the block, adapter `index` is the active one."""
        if self.base.active_adapter != self.names[index]:
            self.base.set_adapter(self.names[index], inference_mode=True)
        yield self.base

    def stacked(self) -> StackedAdapters | None:
        """Return the adapters as they are now for one forward pass, if all of them are plain LoRA on linear layers."""
        return StackedAdapters(self.base, self.names) if can_stack(self.base, self.names) else None

    def expert_config(self, index: int) -> PreTrainedConfig:
        """Return the base model's configuration, which all experts share."""
        return self.base.config

    def selected(self, indices: Sequence[int]) -> AdapterExperts:
        """Return the named adapters on the same base."""
        chosen = AdapterExperts(self.base)
        chosen.names = [self.names[index] for index in indices]
        return chosen

    def save_expert(self, index: int, folder: Path, **options: Any) -> None:
        """Write one adapter, never sharded; peft puts a named one in a folder of its own, which is lifted here."""
        # The base's own embeddings are not the adapter's; to find out whether they changed, peft would ask the hub.
        self.base.save_pretrained(str(folder), selected_adapters=[self.names[index]], save_embedding_layers=False)
        nested = folder / self.names[index]
        for file in nested.iterdir():
            file.rename(folder / file.name)
        nested.rmdir()

    def save_base(self, folder: Path, **options: Any) -> None:
        """Write the base model without its adapters; `options` are those of transformers' `save_pretrained`."""
        if not isinstance(self.base, PeftModel):
            self.base.save_pretrained(folder, **options)
            return
        plain: Any = self.base.get_base_model()
        weights = {_unwrapped(name): value for name, value in plain.state_dict().items() if not self._is_adapters(name)}
        plain.save_pretrained(folder, state_dict=weights, **options)

    def _is_adapters(self, name: str) -> bool:
        """Return whether a tensor of the wrapped base belongs to an adapter."""
        parts = name.split(".")
        own = not set(parts[-2:]).isdisjoint(self.base.peft_config)
        return own or self.base.base_model.prefix in name or "modules_to_save" in parts


def _unwrapped(name: str) -> str:
    """Return what a tensor is called without peft, which moves what it wraps inwards."""
    for wrapper in (".base_layer.", ".original_module.", ".token_adapter."):
        name = name.replace(wrapper, ".")
    return name


def can_stack(base: nn.Module, names: Sequence[str]) -> bool:
    """Return whether the adapters differ from the base in nothing but LoRA products added to linear layers.

    Layers whose forward pass someone has wrapped, as accelerate does to move weights about, are left alone.
    """
    if not isinstance(base, PeftModel):
        return False
    if any(not _is_plain(base.peft_config[name]) for name in names):
        return False
    for module in _outer_modules(base.get_base_model()):
        if isinstance(module, AuxiliaryTrainingWrapper) and any(name in module._adapters for name in names):
            return False
        if not isinstance(module, BaseTunerLayer):
            continue
        if type(module) is not LoraLinear or module.merged or any(name in module.lora_variant for name in names):
            return False
        if "forward" in vars(module):
            return False
        if any(module.lora_B[name].bias is not None for name in names if name in module.lora_B):
            return False
    return True


def _outer_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model, of what peft has wrapped the wrapper alone."""
    yield model
    if not isinstance(model, BaseTunerLayer | AuxiliaryTrainingWrapper):
        for child in model.children():
            yield from _outer_modules(child)


def _is_plain(config: Any) -> bool:
    return config.peft_type == PeftType.LORA and config.bias == "none" and not config.layer_replication


class StackedAdapters:
    """T LoRA adapters on one base model, run as one model on T batches of rows that are stacked, expert after expert.

    The base's weights are read once per pass for all experts; each adapter's product is added to the rows of its
    expert by one batched product per linear layer. Adapters of one shape are held once: the weights of all adapters
    on the base become views of one tensor per layer.

    Args:
        base: the model that carries the adapters.
        names: the T adapters, in the order of their rows.
    """

    def __init__(self, base: PeftModel, names: Sequence[str]) -> None:
        self.base = base
        self.count = len(names)
        self.forwards: dict[Any, Any] = {}
        for module in _outer_modules(base.get_base_model()):
            if isinstance(module, LoraLinear):
                inner: Any = module.base_layer
                product = partial(_linear, inner) if _is_bare(inner) else inner
                self.forwards[module] = partial(_stacked_forward, product, *_stack(module, names))
            elif _is_bare(module):
                self.forwards[module] = partial(_contiguous_linear, module)

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """Within the block, the yielded model takes stacked rows."""
        for module, forward in self.forwards.items():
            module.forward = forward
        try:
            yield self.base
        finally:
            for module in self.forwards:
                del module.forward


def repeat_rows(inputs: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """Return a model's inputs with the rows of its tensors [B, ...] stacked `copies` times, one batch per expert."""
    return {
        name: value.repeat(copies, 1) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


def _stack(module: Any, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `A` [T, rank, in], `B` [T, out, rank] and the scales [T, 1, 1] of a layer; 0 where an adapter has none."""
    own = [name for name in names if name in module.lora_A]
    weight = module.lora_A[own[0]].weight if own else module.base_layer.weight
    scales = weight.new_tensor([module.scaling[name] if name in own else 0.0 for name in names])[:, None, None]
    if len(own) == len(names) and len({module.r[name] for name in module.lora_A}) == 1:
        places = [list(module.lora_A).index(name) for name in names]
        return _rows(_as_one(module.lora_A), places), _rows(_as_one(module.lora_B), places), scales
    rank = max((module.r[name] for name in own), default=0)
    first = weight.new_zeros(len(names), rank, module.in_features)
    second = weight.new_zeros(len(names), module.out_features, rank)
    for name in own:
        first[names.index(name), : module.r[name]] = module.lora_A[name].weight
        second[names.index(name), :, : module.r[name]] = module.lora_B[name].weight
    return first, second, scales


# Of the layers of all adapters at one place in the model: the tensor that holds their weights.
_stacks: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()


def _as_one(layers: nn.ModuleDict) -> torch.Tensor:
    """Return the equally shaped weights of `layers` as one tensor, of which they are views from now on."""
    weights: list[Any] = [layer.weight for layer in layers.values()]
    stack = _stacks.get(layers)
    if stack is None or not _are_rows_of(stack, weights):
        # Tensors made in inference mode could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            stack = torch.stack(weights)
            for weight, row in zip(weights, stack, strict=True):
                weight.data = row
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
    result = base_layer(x)
    if not first.shape[1]:
        return result.contiguous()
    rows = x.reshape(first.shape[0], -1, first.shape[2]).to(first.dtype)
    added = torch.bmm(torch.bmm(rows, first.mT).mul_(scales), second.mT)
    return added.view(result.shape).to(result.dtype).add_(result)


def _is_bare(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of torch's own, to which nobody has attached anything."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return `x W^T + b`, perhaps as a transposed view."""
    rows = x.reshape(-1, layer.in_features)
    few = len(rows) <= _FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu"
    if not few or torch.get_num_threads() == 1 or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, layer.weight, layer.bias)
    # MKL multiplies by one row half as fast as by two.
    twice = rows.repeat(2, 1) if len(rows) == 1 else rows
    result = torch.mm(layer.weight, twice.T).T[: len(rows)]
    return (result if layer.bias is None else result + layer.bias).view(*x.shape[:-1], -1)


def _contiguous_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return `x W^T + b`."""
    return _linear(layer, x).contiguous()


class ModelExperts(Experts):
    """T whole models, of one or several architectures over one vocabulary."""

    kind = "models"

    def __init__(self, models: Sequence[PreTrainedModel] = ()) -> None:
        super().__init__()
        self.models: Any = nn.ModuleList()
        for model in models:
            self.add(model)

    def add(self, model: PreTrainedModel) -> None:
        """Append a model; raises ValueError if its vocabulary has another size than the first expert's."""
        if len(self) and model.config.vocab_size != self.models[0].config.vocab_size:
            raise ValueError(
                f"expert {len(self) + 1} has a vocabulary of {model.config.vocab_size} tokens, expert 1 one of "
                f"{self.models[0].config.vocab_size}: experts mix token by token, so they must share one tokenizer"
            )
        self.models.append(model.eval().requires_grad_(False))

    def __len__(self) -> int:
        return len(self.models)

    @contextmanager
    def expert(self, index: int) -> Iterator[nn.Module]:
        """Within the block, the yielded module is model `index`."""
        yield self.models[index]

    def expert_config(self, index: int) -> PreTrainedConfig:
        """Return the configuration of model `index`."""
        return self.models[index].config

    def selected(self, indices: Sequence[int]) -> ModelExperts:
        """Return the named models."""
        return ModelExperts([self.models[index] for index in indices])

    def map(self, run: Callable[[nn.Module, int], Result], indices: Sequence[int]) -> list[Result]:
        """Return `run(model, index)` for some models; on a CPU they run side by side and share out its threads."""
        threads = torch.get_num_threads()
        count = min(len(indices), threads)
        on_cpu = all(next(self.models[index].parameters()).device.type == "cpu" for index in indices)
        if count < 2 or not on_cpu or torch.is_grad_enabled():
            return super().map(run, indices)
        models = [self.models[index] for index in indices]
        return list(_workers(count, threads // count).map(_in_modes_of_this_thread(run), models, indices))

    def save_expert(self, index: int, folder: Path, **options: Any) -> None:
        """Write one model; `options` are those of transformers' `save_pretrained`."""
        self.models[index].save_pretrained(folder, **options)


@functools.cache
def _workers(count: int, threads: int) -> ThreadPoolExecutor:
    """Return `count` threads, each of which computes with `threads` of torch's."""
    return ThreadPoolExecutor(count, "expert", initializer=lambda: torch.set_num_threads(threads))


# A forked process inherits the pool but not its threads.
os.register_at_fork(after_in_child=_workers.cache_clear)


def _in_modes_of_this_thread(run: Callable[..., Result]) -> Callable[..., Result]:
    """Return `run` for another thread, with inference mode and autocast as they are in this one; without gradients."""
    inference = torch.is_inference_mode_enabled()
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run_there(*args: Any) -> Result:
        with (
            torch.inference_mode(inference),
            torch.no_grad(),
            torch.autocast("cpu", enabled=autocast[0], dtype=autocast[1]),
        ):
            return run(*args)

    return run_there
