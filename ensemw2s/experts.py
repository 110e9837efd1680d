"""Many experts behind one interface: adapters on one base model, or whole models side by side."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"


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
    def save_expert(self, index: int, folder: Path) -> None:
        """Write expert `index` to `folder` as safetensors."""

    def stacked(self) -> StackedAdapters | None:
        """Return all experts as one model for stacked rows, or None where they have to run one after the other."""
        return None


class AdapterExperts(Experts):
    """T adapters (LoRA and its kin, by peft) on one base model, whose weights are held once.

    Args:
        base: the pre-trained model without adapters.
        folders: one saved adapter each.
    """

    kind = "adapters"

    def __init__(self, base: PreTrainedModel | PeftModel, folders: Sequence[str | Path] = ()) -> None:
        super().__init__()
        # A `PeftModel` from the first adapter on.
        self.base: Any = base
        self.names: list[str] = []
        for folder in folders:
            self.add(folder)

    def add(self, folder: str | Path) -> None:
        """Append the adapter saved in `folder`; raises FileNotFoundError unless it holds safetensors weights."""
        require_weights(folder, (ADAPTER_WEIGHTS,), f"expert {len(self) + 1}")
        # Experts that were selected from others share their base, and with it the names already taken.
        taken = self.base.peft_config if isinstance(self.base, PeftModel) else {}
        name = next(name for name in map("expert_{}".format, itertools.count(1)) if name not in taken)
        if taken:
            self.base.load_adapter(str(folder), adapter_name=name)
        else:
            self.base = PeftModel.from_pretrained(self.base, str(folder), adapter_name=name)
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

    def save_expert(self, index: int, folder: Path) -> None:
        """Write one adapter; peft puts a named adapter in a folder of its own, which is lifted here."""
        self.base.save_pretrained(str(folder), selected_adapters=[self.names[index]])
        nested = folder / self.names[index]
        for file in nested.iterdir():
            file.rename(folder / file.name)
        nested.rmdir()

    def save_base(self, folder: Path) -> None:
        """Write the base model without its adapters."""
        if not isinstance(self.base, PeftModel):
            self.base.save_pretrained(folder)
            return
        prefix: Any = self.base.base_model.prefix
        plain: Any = self.base.get_base_model()
        # peft moves what it wraps to `.base_layer`, or `.original_module` beside a whole copy, and puts its own there.
        weights = {
            name.replace(".base_layer.", ".").replace(".original_module.", "."): value
            for name, value in plain.state_dict().items()
            if prefix not in name and ".modules_to_save." not in name
        }
        plain.save_pretrained(folder, state_dict=weights)


def can_stack(base: nn.Module, names: Sequence[str]) -> bool:
    """Return whether the adapters differ from the base in nothing but LoRA products added to linear layers."""
    if len(names) < 2 or not isinstance(base, PeftModel):
        return False
    if any(not _is_plain(base.peft_config[name]) for name in names):
        return False
    for module in base.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and any(name in module._adapters for name in names):
            return False
        if not isinstance(module, BaseTunerLayer):
            continue
        if type(module) is not LoraLinear or module.merged or any(name in module.lora_variant for name in names):
            return False
        if any(module.lora_B[name].bias is not None for name in names if name in module.lora_B):
            return False
    return True


def _is_plain(config: Any) -> bool:
    return config.peft_type == PeftType.LORA and config.bias == "none" and not config.layer_replication


class StackedAdapters:
    """T LoRA adapters on one base model, run as one model on T batches of rows that are stacked, expert after expert.

    The base's weights are read once per pass for all experts; each adapter's product is added to the rows of its
    expert by one batched product per linear layer. The adapters' weights are copied when this is made.

    Args:
        base: the model that carries the adapters.
        names: the T adapters, in the order of their rows.
    """

    def __init__(self, base: PeftModel, names: Sequence[str]) -> None:
        self.base = base
        self.count = len(names)
        self.forwards: dict[Any, Any] = {
            module: partial(_stacked_forward, module.base_layer, *_stack(module, names))
            for module in base.modules()
            if isinstance(module, LoraLinear)
        }

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


def _stack(module: Any, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `A` [T, in, rank] and `B` [T, rank, out] of a layer, zeros where an adapter leaves it alone."""
    own = [name for name in names if name in module.lora_A]
    rank = max((module.r[name] for name in own), default=0)
    weight = module.lora_A[own[0]].weight if own else module.base_layer.weight
    first = weight.new_zeros(len(names), module.in_features, rank)
    second = weight.new_zeros(len(names), rank, module.out_features)
    for index, name in enumerate(names):
        if name in own:
            first[index, :, : module.r[name]] = module.lora_A[name].weight.T
            second[index, : module.r[name]] = module.lora_B[name].weight.T * module.scaling[name]
    return first, second


def _stacked_forward(base_layer: nn.Module, first: torch.Tensor, second: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `x W + x_t A_t B_t` for the rows `x_t` of each expert t; x is [T * rows, ..., in]."""
    result = base_layer(x)
    if not first.shape[-1]:
        return result
    rows = x.reshape(first.shape[0], -1, first.shape[1]).to(first.dtype)
    return result + torch.bmm(torch.bmm(rows, first), second).view(result.shape).to(result.dtype)


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

    def save_expert(self, index: int, folder: Path) -> None:
        """Write one model."""
        self.models[index].save_pretrained(folder)


def require_weights(folder: str | Path, names: Sequence[str], owner: str) -> None:
    """Raise FileNotFoundError, naming `owner` and the folder, unless one of `names` is there and not empty."""
    files = [Path(folder) / name for name in names]
    if not any(file.is_file() and file.stat().st_size for file in files):
        raise FileNotFoundError(
            f"{owner}: {folder} holds no weights (expected {' or '.join(names)}). The folder is incomplete or not "
            "a saved expert: save it again, or copy it whole"
        )
