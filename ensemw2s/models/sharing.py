"""What threads share of a model, and how each still runs its own version of it.

Which adapter is active, which rows reach the output head and what a layer computes are attributes of modules. Who needs
others runs a `view` of the model; what can only be done on its own modules takes its one `Turn`.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

# What is registered on a view, or on the model after the view was made, concerns that one alone.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
# A forward pass put on the instance, and where accelerate keeps the one that it wraps.
_FORWARDS = ("forward", "_old_forward")


class NotShareable(TypeError):
    """A model whose forward pass is tied to its own modules, so that no other tree of modules can run it."""


def view(model: nn.Module, changes: Mapping[nn.Module, Mapping[str, Any]]) -> nn.Module:
    """Return a model that shares everything with `model`, except that some modules have other attributes.

    The modules named, and those that contain them, are copies; all others are the model's own. Weights and buffers
    are shared even where they are put anew, as by `model.to`; hooks and modules that the model gets later are not.
    Copies run eagerly where the model's own module was compiled in place (`module.compile()`).

    Args:
        model: stays as it is.
        changes: modules of the model -> attribute -> value on the copy. An empty one makes a copy to be changed later.

    Raises:
        NotShareable: a module that contains one of those runs a forward pass which leads back to the model's own
            modules.
    """
    twins: dict[nn.Module, nn.Module] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        if module not in twins:
            children = {name: twin_of(child) for name, child in _searched_children(module)}
            moved = any(module._modules[name] is not child for name, child in children.items())
            copied = moved or module in changes
            twins[module] = _twin(module, children, moved, changes.get(module, {})) if copied else module
        return twins[module]

    return twin_of(model)


def searched(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model, but not those in which peft keeps the weights of all adapters of a layer."""
    seen: set[nn.Module] = set()
    left = [model]
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            yield module
            left += (child for _, child in _searched_children(module))


def _searched_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    own = [(name, child) for name, child in dict(module._modules).items() if child is not None]
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return [(name, child) for name, child in own if not isinstance(child, nn.ModuleDict)]
    return own


def _twin(module: nn.Module, children: Mapping[str, nn.Module], moved: bool, changes: Mapping[str, Any]) -> nn.Module:
    twin: nn.Module = type(module).__new__(type(module))
    # Copied in one go: another thread may be setting an attribute.
    state = dict(vars(module))
    state["_modules"] = {**module._modules, **children}
    state["_compiled_call_impl"] = None
    for name in _HOOKS:
        state[name] = state[name].copy()
    for name in _FORWARDS if moved else ():
        if name in state and name not in changes:
            state[name] = _rebound(state[name], module, twin)
    vars(twin).update(state)
    vars(twin).update(changes)
    return twin


def _rebound(forward: Any, module: nn.Module, twin: nn.Module) -> Callable[..., Any]:
    """Return a forward pass of `module` as one of `twin`."""
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return MethodType(forward.__func__, twin)
    if isinstance(forward, functools.partial) and any(value is module for value in forward.args):
        values = [twin if value is module else value for value in forward.args]
        return functools.update_wrapper(functools.partial(forward.func, *values, **forward.keywords), forward)
    raise NotShareable(f"the forward pass of a {type(module).__name__} was replaced by {type(forward).__name__}")


class Turn:
    """The lock of one model, for what only one thread may do at a time, and the deeds that wait for it to be free."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._lock.release()
        self._do_what_waits()

    def when_free(self, deed: Callable[[], None]) -> None:
        """Do `deed` as soon as no thread has its turn: at once, or by whoever ends the turn; never waits.

        A garbage collector may call this, in any thread and in the middle of anything, so also within a turn.
        """
        self._waiting.append(deed)
        self._do_what_waits()

    def _do_what_waits(self) -> None:
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                if self._depth or not self._waiting:
                    return
                self._depth += 1
                try:
                    self._waiting.popleft()()
                finally:
                    self._depth -= 1
            finally:
                self._lock.release()


_turns: WeakKeyDictionary[nn.Module, Turn] = WeakKeyDictionary()


@torch.compiler.disable
def turn_of(model: nn.Module) -> Turn:
    """Return what a thread holds while it does with a model what only one may do at a time."""
    return _turns.setdefault(model, Turn())


def turn_if_wrapped(model: nn.Module) -> AbstractContextManager[Any]:
    """Return the turn of a model whose forward pass somebody has replaced; else nothing that has to be held.

    accelerate does it, to move weights in and out as they are needed.
    """
    return turn_of(model) if "forward" in vars(model) else nullcontext()
