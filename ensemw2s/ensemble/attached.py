"""Adapters that experts carry on a base, each deleted when nothing holds it any more."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary, finalize

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ensemw2s.models.sharing import turn_of


class Adapter:
    """One adapter on a base; when nothing refers to this any more, the adapter is deleted from the base."""

    def __init__(self, base: PeftModel, name: str) -> None:
        self.base, self.name = base, name
        plain = plain_model(base)
        living.setdefault(plain, WeakValueDictionary())[name] = self
        finalize(self, turn_of(plain).when_free, partial(_delete_adapter, base, name)).atexit = False

    def __reduce__(self) -> Any:
        # Of a copy of the base, this becomes one more adapter.
        return Adapter, (self.base, self.name)


# Of a plain model: the `PeftModel` through which experts carry their adapters on it, and those adapters by name.
wrappers: WeakKeyDictionary[nn.Module, ReferenceType[PeftModel]] = WeakKeyDictionary()
living: WeakKeyDictionary[nn.Module, WeakValueDictionary[str, Adapter]] = WeakKeyDictionary()


def plain_model(base: nn.Module) -> Any:
    """Return the model beneath peft's wrapper, if it has one."""
    return base.get_base_model() if isinstance(base, PeftModel) else base


def wrapper_of(base: nn.Module) -> PeftModel | None:
    """Return the `PeftModel` that carries adapters on a base, if there is one, for more adapters."""
    known = wrappers.get(plain_model(base), lambda: None)
    wrapped = base if isinstance(base, PeftModel) else known()
    return wrapped if wrapped is not None and wrapped.peft_config else None


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
