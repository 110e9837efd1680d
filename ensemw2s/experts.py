"""Many experts behind one interface: adapters on one base model, or whole models side by side."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary, finalize, ref

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ensemw2s.adapters import attach_adapter
from ensemw2s.sharing import NotShareable, Turn, searched, turn_if_wrapped, turn_of, view

# Up to this many rows and on several threads, MKL takes two thirds of the time for (W x^T)^T that it takes for x W^T,
# since it shares out the rows of its first factor. With more rows, turning the result round costs what is gained.
_FEW_ROWS = 64
# Layers of peft whose forward pass changes nothing; others merge weights or set parametrisations for its time.
_QUIET_LAYERS = (LoraLinear, Embedding, Conv1d, Conv2d, Conv3d)

Result = TypeVar("Result")


class Experts(nn.Module, ABC):
    """T causal language models over one vocabulary. Experts are numbered from 0.

    Any number of threads may run the same experts, and add to them.
    """

    kind: str

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    @abstractmethod
    def __len__(self) -> int:
        """Return T."""

    @abstractmethod
    def members(self) -> Sequence[object]:
        """Return what tells each expert from any other; it keeps the expert's weights in memory."""

    @abstractmethod
    def expert(self, index: int) -> AbstractContextManager[nn.Module]:
        """Within the block, the yielded module runs as expert `index`. Others may run it too: do not change it."""

    @abstractmethod
    def carrier(self, index: int) -> nn.Module:
        """Return the model that carries expert `index`: itself, or the base that its adapter is on."""

    @abstractmethod
    def selected(self, indices: Sequence[int]) -> Experts:
        """Return the named experts, sharing their weights with these."""

    @abstractmethod
    def save_expert(self, index: int, folder: Path, **options: Any) -> None:
        """Write expert `index` to `folder` as safetensors; `options` are those of transformers' `save_pretrained`."""

    def expert_config(self, index: int) -> PreTrainedConfig:
        """Return the model configuration of expert `index`."""
        config: Any = self.carrier(index).config
        return config

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

    Whatever shares a base, be it views of one ensemble or ensembles built one by one, shares one `PeftModel` and its
    one turn (`sharing.turn_of`). An adapter is deleted from the base when no experts and no cache hold it any more;
    with the last adapter the base is plain again. Adapters that were put there by others are let alone, and so is the
    choice of the active one.

    Args:
        base: the pre-trained model, without adapters or with some of its owner's; it is frozen.
        folders: one saved adapter each.
    """

    kind = "adapters"

    def __init__(self, base: PreTrainedModel | PeftModel, folders: Sequence[str | os.PathLike[str]] = ()) -> None:
        super().__init__()
        # A `PeftModel` from the first adapter on.
        self.base: Any = base
        # Replaced as a whole, never changed: another thread may be reading it.
        self.adapters: tuple[_Adapter, ...] = ()
        for folder in folders:
            self.add(folder)

    @property
    def names(self) -> list[str]:
        """Return what peft calls the adapters on this base."""
        return [adapter.name for adapter in self.adapters]

    def add(self, folder: str | os.PathLike[str]) -> None:
        """Append the adapter saved in `folder`; see `adapters.attach_adapter` for errors, which leave all as it was."""
        plain = _plain_model(self.base)
        with turn_of(plain):
            wrapped = _wrapper_of(self.base)
            name = _free_name(plain, wrapped)
            carrier = attach_adapter(wrapped or plain, folder, f"expert {len(self) + 1}", name=name)
            if wrapped is None:
                _wrappers[plain] = ref(carrier)
            if not self.adapters:
                carrier.eval().requires_grad_(False)
            else:
                _freeze_adapter(carrier, name)
            self.base = carrier
            self.adapters = (*self.adapters, _Adapter(carrier, name))

    def turn(self) -> Turn:
        """Return what is held while adapters are put on the base, or its modules are gone through."""
        return turn_of(_plain_model(self.base))

    def __len__(self) -> int:
        return len(self.adapters)

    def members(self) -> Sequence[object]:
        """Return the adapters."""
        return self.adapters

    @contextmanager
    def expert(self, index: int) -> Iterator[nn.Module]:
        """Within the block, the yielded module is the base with adapter `index`, and that one alone, at work."""
        model, held = self._ready(index)
        with held:
            if model is None:
                # Only its own modules can run this base: the adapter is made the active one there.
                if self.base.active_adapter != self.names[index]:
                    self.base.set_adapter(self.names[index], inference_mode=True)
                model = self.base
            yield model

    @torch.compiler.disable
    def _ready(self, index: int) -> tuple[Any, Any]:
        """Return a model that runs as expert `index`, or None, and what has to be held for it."""
        plain, name, turn = _plain_model(self.base), self.names[index], self.turn()
        with turn:
            layers = [module for module in searched(plain) if isinstance(module, BaseTunerLayer)]
            _refuse_merged(layers)
            if not _switches_layers(self.base, layers):
                return None, turn
            try:
                model = view(self.base, _activation(self.base, layers, name))
            except NotShareable:
                return None, turn
        return model, turn_if_wrapped(plain) if all(type(layer) in _QUIET_LAYERS for layer in layers) else turn

    def stacked(self) -> StackedAdapters | None:
        """Return the adapters as they are now for one forward pass, if all of them are plain LoRA on linear layers."""
        with self.turn():
            if not can_stack(self.base, self.names):
                return None
            try:
                return StackedAdapters(self.base, self.adapters)
            except NotShareable:
                return None

    def carrier(self, index: int) -> nn.Module:
        """Return the base model, which all experts share."""
        return self.base

    def selected(self, indices: Sequence[int]) -> AdapterExperts:
        """Return the named adapters on the same base."""
        chosen = AdapterExperts(self.base)
        chosen.adapters = tuple(self.adapters[index] for index in indices)
        return chosen

    def save_expert(self, index: int, folder: Path, **options: Any) -> None:
        """Write one adapter, never sharded; peft puts a named one in a folder of its own, which is lifted here."""
        name = self.names[index]
        with self.turn():
            # The base's own embeddings are not the adapter's; to find out whether they changed, peft would ask the hub.
            self.base.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        nested = folder / name
        for file in nested.iterdir():
            file.rename(folder / file.name)
        nested.rmdir()

    def save_base(self, folder: Path, **options: Any) -> None:
        """Write the base model without its adapters; `options` are those of transformers' `save_pretrained`."""
        if not isinstance(self.base, PeftModel):
            self.base.save_pretrained(folder, **options)
            return
        plain: Any = self.base.get_base_model()
        with turn_of(plain):
            weights = {
                _unwrapped(name): value for name, value in plain.state_dict().items() if not self._is_adapters(name)
            }
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


class _Adapter:
    """One adapter on a base; when nothing refers to this any more, the adapter is deleted from the base."""

    def __init__(self, base: PeftModel, name: str) -> None:
        self.base, self.name = base, name
        plain = _plain_model(base)
        _living.setdefault(plain, WeakValueDictionary())[name] = self
        finalize(self, turn_of(plain).when_free, partial(_delete_adapter, base, name)).atexit = False

    def __reduce__(self) -> Any:
        # Of a copy of the base, this becomes one more adapter.
        return _Adapter, (self.base, self.name)


# Of a plain model: the `PeftModel` through which experts carry their adapters on it, and those adapters by name.
_wrappers: WeakKeyDictionary[nn.Module, ReferenceType[PeftModel]] = WeakKeyDictionary()
_living: WeakKeyDictionary[nn.Module, WeakValueDictionary[str, _Adapter]] = WeakKeyDictionary()


def _plain_model(base: nn.Module) -> Any:
    return base.get_base_model() if isinstance(base, PeftModel) else base


def _wrapper_of(base: nn.Module) -> PeftModel | None:
    """Return the `PeftModel` that carries adapters on a base, if there is one, for more adapters."""
    known = _wrappers.get(_plain_model(base), lambda: None)
    wrapped = base if isinstance(base, PeftModel) else known()
    return wrapped if wrapped is not None and wrapped.peft_config else None


def _free_name(plain: nn.Module, wrapped: PeftModel | None) -> str:
    taken = {*getattr(plain, "peft_config", {}), *(wrapped.peft_config if wrapped is not None else {})}
    return next(name for name in map("expert_{}".format, itertools.count(1)) if name not in taken)


def _freeze_adapter(base: PeftModel, name: str) -> None:
    # Others on this base may be in training, by their owner.
    for path, weight in base.named_parameters():
        if name in path.split("."):
            weight.requires_grad_(False)


def _delete_adapter(base: PeftModel, name: str) -> None:
    """Delete an adapter if it is there, and with the last one whatever peft had put around the base's layers."""
    if name not in base.peft_config or any(name in getattr(x, "merged_adapters", ()) for x in base.modules()):
        return
    others = [other for other in base.peft_config if other != name]
    if others and list(base.active_adapters) == [name]:
        # Or peft would choose another one itself, warn once per layer, and make it trainable.
        base.set_adapter(others[0], inference_mode=True)
    base.delete_adapter(name)
    if not base.peft_config and isinstance(base.base_model, BaseTuner):
        base.base_model.unload()


def _refuse_merged(layers: Sequence[BaseTunerLayer]) -> None:
    for layer in layers:
        if layer.merged:
            raise ValueError(
                f"the base model's weights have adapter {layer.merged_adapters[0]!r} merged into them, so no expert "
                "would be itself: call unmerge_adapter() on the base first"
            )


def _switches_layers(base: Any, layers: Sequence[BaseTunerLayer]) -> bool:
    """Return whether to make an adapter the active one is to tell each layer so, and nothing more."""
    tuner = base.base_model
    plainly = isinstance(tuner, BaseTuner) and type(tuner).set_adapter is BaseTuner.set_adapter
    return plainly and all(type(layer).set_adapter is BaseTunerLayer.set_adapter for layer in layers)


def _activation(base: Any, layers: Sequence[Any], name: str) -> dict[nn.Module, dict[str, Any]]:
    """Return the attributes of modules with which an adapter is the active one, as `PeftModel.set_adapter` does it."""
    changes: dict[nn.Module, dict[str, Any]] = {base: {"active_adapter": name, "_adapters_disabled": False}}
    changes[base.base_model] = {"active_adapter": name}
    changes |= {layer: {"_active_adapter": [name], "_disable_adapters": False} for layer in layers}
    for module in searched(base):
        if isinstance(module, AuxiliaryTrainingWrapper):
            active = [name] if name in module._adapters else []
            changes[module] = {"_active_adapter": active, "_disable_adapters": False}
    return changes


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
    on the base become views of one tensor per layer. What is run is a `sharing.view` of the base, so that passes of
    other threads, stacked or not, are none of its business.

    Args:
        base: the model that carries the adapters; the caller has its turn.
        adapters: the T adapters, in the order of their rows.

    Raises:
        NotShareable: the base can only be run by its own modules.
    """

    def __init__(self, base: PeftModel, adapters: Sequence[_Adapter]) -> None:
        self.base = base
        self.adapters = tuple(adapters)
        names = [adapter.name for adapter in adapters]
        plain = base.get_base_model()
        ours = _living[plain]
        changes: dict[nn.Module, dict[str, Any]] = {base: {"active_adapter": names[0]}}
        for module in _outer_modules(plain):
            if isinstance(module, LoraLinear):
                inner: Any = module.base_layer
                product = partial(_linear, inner) if _is_bare(inner) else inner
                changes[module] = {"forward": partial(_stacked_forward, product, *_stack(module, names, ours))}
            elif _is_bare(module):
                changes[module] = {"forward": partial(_contiguous_linear, module)}
        self._model = view(base, changes)

    @property
    def count(self) -> int:
        """Return T."""
        return len(self.adapters)

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """Within the block, the yielded model takes stacked rows; other threads run it too, so do not change it."""
        with turn_if_wrapped(_plain_model(self.base)):
            yield self._model

    def __deepcopy__(self, memo: dict[int, Any]) -> StackedAdapters:
        # A copy of a cache goes on with the same experts.
        return self


def repeat_rows(inputs: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """Return a model's inputs with the rows of its tensors [B, ...] stacked `copies` times, one batch per expert."""
    return {
        name: value.repeat(copies, 1) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


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
        self.models: Any = nn.ModuleList().eval()
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

    def members(self) -> Sequence[object]:
        """Return the models."""
        return tuple(self.models)

    @contextmanager
    def expert(self, index: int) -> Iterator[nn.Module]:
        """Within the block, the yielded module is model `index`."""
        model = self.models[index]
        with turn_if_wrapped(model):
            yield model

    def carrier(self, index: int) -> nn.Module:
        """Return model `index`."""
        return self.models[index]

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
        run = _in_modes_of_this_thread(run)

        def run_one(index: int) -> Result:
            with self.expert(index) as model:
                return run(model, index)

        return list(_workers(count, threads // count).map(run_one, indices))

    def save_expert(self, index: int, folder: Path, **options: Any) -> None:
        """Write one model; `options` are those of transformers' `save_pretrained`."""
        self.models[index].save_pretrained(folder, **options)


def damaged(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return bool [T, ...]: where an expert's logits [..., V] have NaN, +inf or no finite value."""
    return torch.stack([~expert.amax(-1).isfinite().to(logits[0].device) for expert in logits])


def refuse_damaged(damage: torch.Tensor, owners: Sequence[str], places: Sequence[str]) -> None:
    """Raise FloatingPointError if any of `damage` (bool [T, n]) is true, naming which of T owners and n places."""
    said = []
    for owner, places_of_one in zip(owners, damage.tolist(), strict=True):
        bad = list(dict.fromkeys(place for place, is_bad in zip(places, places_of_one, strict=True) if is_bad))
        if bad:
            more = " and more" if len(bad) > 5 else ""
            said.append(f"{owner} gave NaN, infinity or no finite logit for {', '.join(bad[:5])}{more}")
    if said:
        raise FloatingPointError(
            f"{'; '.join(said[:5])}: the weights are damaged or overflow in their dtype; load the experts in float32, "
            "or train what is damaged again"
        )


def expert_names(indices: Iterable[int]) -> list[str]:
    """Return how messages call the experts `indices` (from 0)."""
    return [f"expert {index + 1}" for index in indices]


@functools.cache
def _workers(count: int, threads: int) -> ThreadPoolExecutor:
    """Return `count` threads, each of which computes with `threads` of torch's."""
    before = torch.get_num_threads()
    begun = threading.Barrier(count + 1)

    def begin() -> None:
        # Asked once: at the first question a thread takes over the number that was set last anywhere.
        torch.get_num_threads()
        torch.set_num_threads(threads)
        begun.wait()

    pool = ThreadPoolExecutor(count, "expert", initializer=begin)
    for _ in range(count):
        pool.submit(int)
    begun.wait()
    # Or every thread that starts from now on would compute with as few.
    torch.set_num_threads(before)
    return pool


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
