"""Many experts behind one interface: adapters on one base model, or whole models side by side."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ensemw2s.ensemble.attached import Adapter, plain_model, wrapper_of, wrappers
from ensemw2s.ensemble.stacked import StackedAdapters, stackable
from ensemw2s.models.adapters import attach_adapter, sort_settings
from ensemw2s.models.mixture import Experts, Pass, Result
from ensemw2s.models.sharing import NotShareable, searched, turn_if_wrapped, turn_of, view

# Layers of peft whose forward pass changes nothing; others merge weights or set parametrisations for its time.
_QUIET_LAYERS = (LoraLinear, Embedding, Conv1d, Conv2d, Conv3d)


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
        self.adapters: tuple[Adapter, ...] = ()
        for folder in folders:
            self.add(folder)

    @property
    def names(self) -> list[str]:
        """Return what peft calls the adapters on this base."""
        return [adapter.name for adapter in self.adapters]

    def add(self, folder: str | os.PathLike[str]) -> None:
        """Append the adapter saved in `folder`; see `attach_adapter` for errors, which leave all as it was."""
        plain = plain_model(self.base)
        with turn_of(plain):
            wrapped = wrapper_of(self.base)
            taken = {*getattr(plain, "peft_config", {}), *(wrapped.peft_config if wrapped is not None else {})}
            name = next(name for name in map("expert_{}".format, itertools.count(1)) if name not in taken)
            carrier = attach_adapter(wrapped or plain, folder, f"expert {len(self) + 1}", name=name)
            if wrapped is None:
                wrappers[plain] = ref(carrier)
            if not self.adapters:
                carrier.eval().requires_grad_(False)
            else:
                # Others on this base may be in training, by their owner.
                for path, weight in carrier.named_parameters():
                    if name in path.split("."):
                        weight.requires_grad_(False)
            self.base = carrier
            self.adapters = (*self.adapters, Adapter(carrier, name))

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
        plain, name = plain_model(self.base), self.names[index]
        turn = turn_of(plain)
        with turn:
            layers = [module for module in searched(plain) if isinstance(module, BaseTunerLayer)]
            merged = next((layer for layer in layers if layer.merged), None)
            if merged is not None:
                raise ValueError(
                    f"the base model's weights have adapter {merged.merged_adapters[0]!r} merged into them, so no "
                    "expert would be itself: call unmerge_adapter() on the base first"
                )
            try:
                model = view(self.base, _activation(self.base, layers, name))
            except NotShareable:
                return None, turn
        return model, turn_if_wrapped(plain) if all(type(layer) in _QUIET_LAYERS for layer in layers) else turn

    def passes(self) -> list[Pass]:
        """Return one pass for the adapters that are plain LoRA on linear layers, and one for each of the others."""
        with turn_of(plain_model(self.base)):
            plain = stackable(self.base, self.names)
            together = tuple(t for t, name in enumerate(self.names) if name in plain)
            try:
                stacked = StackedAdapters(self.base, [self.adapters[t] for t in together]) if together else None
            except NotShareable:
                return super().passes()
        stack = [Pass(together, stacked)] if together else []
        return stack + [one for one in super().passes() if one.experts[0] not in together]

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
        with turn_of(plain_model(self.base)):
            sort_settings(self.base)
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
            plain.save_pretrained(folder, state_dict=self.base_weights(), **options)

    def base_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of a base that carries adapters, without these and by the base's own names."""
        weights: dict[str, torch.Tensor] = self.base.get_base_model().state_dict()
        return {_unwrapped(name): value for name, value in weights.items() if not self._is_adapters(name)}

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


def _activation(base: Any, layers: Sequence[Any], name: str) -> dict[nn.Module, dict[str, Any]]:
    """Return the attributes of modules with which an adapter is the active one, as `PeftModel.set_adapter` does it.

    Raises NotShareable for kinds of adapters where that is more than to tell each layer so.
    """
    tuner = base.base_model
    plainly = isinstance(tuner, BaseTuner) and type(tuner).set_adapter is BaseTuner.set_adapter
    if not plainly or any(type(layer).set_adapter is not BaseTunerLayer.set_adapter for layer in layers):
        raise NotShareable(f"{type(tuner).__name__} has its own way to make an adapter the active one")
    changes: dict[nn.Module, dict[str, Any]] = {base: {"active_adapter": name, "_adapters_disabled": False}}
    changes[base.base_model] = {"active_adapter": name}
    changes |= {layer: {"_active_adapter": [name], "_disable_adapters": False} for layer in layers}
    for module in searched(base):
        if isinstance(module, AuxiliaryTrainingWrapper):
            active = [name] if name in module._adapters else []
            changes[module] = {"_active_adapter": active, "_disable_adapters": False}
    return changes


class ModelExperts(Experts):
    """T whole models, of one or several architectures over one vocabulary."""

    kind = "models"

    def __init__(self, models: Sequence[PreTrainedModel] = ()) -> None:
        super().__init__()
        self.models: Any = nn.ModuleList().eval()
        for model in models:
            self.add(model)

    def add(self, model: PreTrainedModel) -> None:
        """Append a model; raises ValueError for another dtype or size of vocabulary than the first expert's."""
        if len(self) and model.dtype != self.models[0].dtype:
            raise ValueError(
                f"expert {len(self) + 1} is in {model.dtype}, expert 1 in {self.models[0].dtype}: load all in one dtype"
            )
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
        on_cpu = all(next(self.models[index].parameters()).device.type == "cpu" for index in indices)
        # A compiled pass is one graph, which knows no threads.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not on_cpu:
            return super().map(run, indices)
        threads = torch.get_num_threads()
        count = min(len(indices), threads)
        if count < 2:
            return super().map(run, indices)
        # Other threads compute in the modes of this one, which has no gradients.
        inference = torch.is_inference_mode_enabled()
        autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def run_one(index: int) -> Result:
            with (
                torch.inference_mode(inference),
                torch.no_grad(),
                torch.autocast("cpu", dtype, autocast),
                self.expert(index) as model,
            ):
                return run(model, index)

        return list(_workers(count, threads // count).map(run_one, indices))

    def save_expert(self, index: int, folder: Path, **options: Any) -> None:
        """Write one model; `options` are those of transformers' `save_pretrained`."""
        self.models[index].save_pretrained(folder, **options)


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


def context_lengths(experts: Experts) -> dict[int, int]:
    """Return how many tokens each expert reads, by its number from 0, leaving out those that name no limit."""
    configs = {t: experts.expert_config(t).get_text_config(decoder=True) for t in range(len(experts))}
    lengths = {t: getattr(config, "max_position_embeddings", None) for t, config in configs.items()}
    return {t: length for t, length in lengths.items() if length is not None}
