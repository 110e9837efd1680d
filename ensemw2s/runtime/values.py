"""What a value that is given from outside may be: its declared type, its range, and how much of a bad one is shown.

A dataclass of settings declares types; `RANGES` says which of their values make sense, by the setting's name. Every
message begins with that name, so that whoever knows where the setting stands (`config`) can write its path in front.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import reprlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 120, 120
_LONGEST = 200
# Names that an unknown one may stand for, in one message.
_MOST_NAMED = 4
# PyTorch, NumPy and C++ count in 32 bits here and there; no setting means anything beyond.
LARGEST = 2**31 - 1
SEEDS = f"[0, {2**32 - 1}]"

# The names of settings by the values that they may have: of our own settings, of peft's LoraConfig, and of those of
# transformers' arguments that would break a training or void it. Class and name where two settings share one.
_SETTINGS = {
    "(0, inf)": (
        "num_train_epochs", "logging_steps", "save_steps", "temperature", "top_temperature", "lora_alpha"
    ),
    "[0, inf)": (
        "learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "resolution", "minutes",
        "Sampling.temperature", "top_k",
    ),
    "[1, inf)": (
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit",
        "window", "weight_cap", "top_logprobs", "max_new_tokens", "batch_size", "r",
    ),
    "[2, inf)": ("num_classes", "error_folds", "max_length", "folds", "min_values", "relabel_folds"),
    "[1, 2]": ("relabel_rounds",),
    "[1, 10]": ("generations",),
    "-1 or [1, inf)": ("max_steps",),
    "(-inf, 0]": ("min_confidence",),
    "(0, 1]": ("shrinkage", "draw_fraction", "soft_weight", "keep_fraction", "share", "top_p"),
    "(0, 1)": ("chain_gain",),
    "[0, 1)": (
        "adam_beta1", "adam_beta2", "uniform_mix", "effective_sample_size_floor", "min_effective_sample_size",
        "lora_dropout",
    ),
    "[0, 1]": ("confidence_alpha", "confidence_warmup", "tolerance", "min_p", "loss_tail"),
    "[1, 1024]": ("threads", "jobs"),
    "[1, 10000]": ("num_rounds",),
    SEEDS: ("seed", "data_seed"),
    # Question i draws from this number + i, in 64 bits.
    f"[0, {2**62}]": ("Sampling.seed",),
}  # fmt: skip
RANGES = {name: allowed for allowed, names in _SETTINGS.items() for name in names}

# Setting -> whether it does something, given the others, and when it does in words.
Uses = Mapping[str, tuple[Callable[[Any], bool], str]]


class IdleSettingError(ValueError):
    """A setting that would do nothing, because of another one."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


def shown(value: Any) -> str:
    """Return a value as an error shows it: its `repr`, cut to 200 characters, however large or deep it is."""
    try:
        text = _SHORT.repr(value)
    except ValueError:
        # Python does not turn whole numbers of more than 4,300 digits into text.
        text = f"a whole number of {value.bit_length()} bits" if isinstance(value, int) else object.__repr__(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def shown_names(names: Iterable[Any], most: int = 12) -> str:
    """Return names as an error lists them, the first `most` of them; "none" if there are none."""
    known = list(names)
    first = ", ".join(name if len(name := str(item)) <= 60 else f"{name[:57]}..." for item in known[:most])
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return f"{first or 'none'}{more}"


def check_number(name: str, value: Any, range_name: str | None = None, *, whole: bool = False) -> None:
    """Refuse what is no number (TypeError, as `require_numbers`) or outside its range (ValueError; NaN is in none).

    Errors call the value `name`, which is also its key of `RANGES` unless `range_name` is another.
    """
    require_numbers(whole=whole, **{name: value})
    _check_range(name, value, RANGES[range_name or name])


def require_numbers(*, whole: bool = False, **values: Any) -> None:
    """Raise TypeError, naming it, for a value that is no number (a bool is none), or not a whole one; NaN passes."""
    for name, value in values.items():
        # NumPy's numbers are such numbers, too.
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
            raise TypeError(f"{name} must be a {'whole ' if whole else ''}number, got {shown(value)}")


def check_names(given: Iterable[Any], allowed: Iterable[str], prefix: str = "") -> None:
    """Raise ValueError for a name of a setting that is not among those allowed; says which one may be meant."""
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            near = _nearest(str(name), allowed)
            meant = " or ".join(f"{prefix}{other}" for other in near)
            hint = f"did you mean {meant}?" if near else f"valid keys are {', '.join(allowed)}"
            raise ValueError(f"unknown key {prefix}{name!s:.100}: {hint}")


def _nearest(name: str, allowed: Sequence[str]) -> list[str]:
    """Return the names that this one may stand for: like it, with these initials, or with it among their words."""
    alike = difflib.get_close_matches(name, allowed, n=1)
    initials = [other for other in allowed if "".join(word[0] for word in other.split("_") if word) == name]
    longer = [other for other in allowed if len(name) > 2 and f"_{name.strip('_')}_" in f"_{other}_"]
    return list(dict.fromkeys(initials + alike + longer))[:_MOST_NAMED]


def check_fields(settings: Any, inherited: type | None = None) -> None:
    """Check all fields of a dataclass of settings by their declared types (TypeError) and `RANGES` (ValueError).

    A value that is none of those declared one by one is a ValueError, too. Of the fields that only a base class of
    another package declares, `inherited`, those in `RANGES` are checked.
    """
    kind = type(settings)
    bases = [base for base in kind.__mro__ if base not in getattr(inherited, "__mro__", ())]
    own = {name for base in bases for name in vars(base).get("__annotations__", ())}
    for field in dataclasses.fields(kind):
        if field.name in RANGES or field.name in own:
            check_value(kind, field.name, getattr(settings, field.name))


def check_value(kind: type, name: str, value: Any, prefix: str = "") -> None:
    """Check a value for the field `name` of the dataclass `kind`; see `check_fields`. Errors begin with `prefix`."""
    declared = _declarations(kind)[name]
    if isinstance(value, dict) and get_origin(declared) is dict:
        wrong = next((key for key, item in value.items() if not _fits(item, get_args(declared)[1])), None)
        if wrong is not None:
            expected = _in_words(get_args(declared)[1])
            raise TypeError(f"{prefix}{name}.{wrong:.60} must be {expected}, got {shown(value[wrong])}")
    if not _fits(value, declared):
        if choices := _choices(declared):
            raise ValueError(f"{prefix}{name} must be one of {', '.join(choices)}, got {shown(value)}")
        raise TypeError(f"{prefix}{name} must be {_in_words(declared)}, got {shown(value)}")
    allowed = RANGES.get(f"{kind.__name__}.{name}", RANGES.get(name))
    if allowed and isinstance(value, (int, float)):
        _check_range(f"{prefix}{name}", value, allowed)


def check_in_use(settings: Any, uses: Uses, defaults: Mapping[str, Any] | None = None) -> None:
    """Raise `IdleSettingError` for a setting of a dataclass that is set and would do nothing.

    `defaults` are the values that settings have if nobody sets them, where they are not those of the class.
    """
    for name, (is_used, when) in uses.items():
        value = getattr(settings, name)
        unset = (defaults or {}).get(name, getattr(type(settings), name))
        if value != unset and not is_used(settings):
            raise IdleSettingError(
                name, f"{name}={shown(value)} does nothing without {when}: set that, or leave it out"
            )


_declarations = cache(get_type_hints)


def _alternatives(declared: Any) -> tuple[Any, ...]:
    return get_args(declared) if get_origin(declared) in (Union, types.UnionType) else (declared,)


def _fits(value: Any, declared: Any) -> bool:
    origin = get_origin(declared)
    if declared is Any:
        return True
    if len(_alternatives(declared)) > 1:
        return any(_fits(value, alternative) for alternative in _alternatives(declared))
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(declared))
    if declared in (int, float):
        # A bool is an int to Python, and True is no number of rounds.
        return isinstance(value, int if declared is int else (int, float)) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(declared)[0]) for item in value)
    if origin is dict:
        key, item = get_args(declared)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    return isinstance(value, declared) if isinstance(declared, type) else True


def _choices(declared: Any) -> list[str]:
    """Return the values that are declared one by one, if there is no other alternative than None."""
    alternatives = [alternative for alternative in _alternatives(declared) if alternative is not type(None)]
    if len(alternatives) == 1 and get_origin(alternatives[0]) is Literal:
        return [str(choice) for choice in get_args(alternatives[0])]
    return []


def _in_words(declared: Any) -> str:
    if len(_alternatives(declared)) > 1:
        return " | ".join(map(_in_words, _alternatives(declared)))
    if declared is type(None):
        return "None"
    if get_origin(declared) is Literal:
        return " | ".join(map(repr, get_args(declared)))
    return declared.__name__ if isinstance(declared, type) and not get_args(declared) else str(declared)


def _check_range(name: str, value: float, allowed: str) -> None:
    if isinstance(value, numbers.Integral) and allowed.endswith("inf)") and value > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, got {shown(value)}")
    if not any(_contains(part, value) for part in allowed.split(" or ")):
        raise ValueError(f"{name} must be {_range_in_words(allowed)}, got {shown(value)}")


def _contains(part: str, value: float) -> bool:
    if part[0] not in "[(":
        return value == float(part)
    low, high = map(float, part[1:-1].split(","))
    above = value >= low if part[0] == "[" else value > low
    below = value <= high if part[-1] == "]" else value < high
    # A whole number beyond any float would overflow wherever it is used.
    return above and below and abs(value) <= sys.float_info.max


def _range_in_words(allowed: str) -> str:
    words = []
    for part in allowed.split(" or "):
        low, _, high = part.strip("[]()").partition(", ")
        if part.startswith("[") and high == "inf":
            words.append(f"at least {low}")
        elif part == "(0, inf)":
            words.append("above 0 and finite")
        elif low == "-inf":
            words.append(f"at most {high}")
        elif high.isdigit() and int(high) > 1 and part.endswith("]"):
            words.append(f"from {low} to {high}")
        else:
            words.append(f"in {part}" if high else low)
    return " or ".join(words)


def has_surrogates(text: str) -> bool:
    """Say whether a text holds halves of characters, which no file can (JSON's escapes can make them)."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def is_finite_number(value: Any) -> bool:
    """Say whether a value, also as text, is a finite number."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False
