"""Many experts behind one interface: adapters on one base model, or whole models side by side."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
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
