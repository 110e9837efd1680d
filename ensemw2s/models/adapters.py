"""Adapters that can be experts: which of peft's kinds, and how a saved one is loaded, whole or not at all.

peft does what an adapter's settings ask for, fills in what its weights lack and drops what it has no place for, with a
warning at most. Here every tensor has to fit, and an adapter that does not leaves the model as it was, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from ensemw2s.models.saved import REMEDY, first_line, read_settings, require_weights, require_whole
from ensemw2s.runtime.values import shown

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Each of these was trained, mixed, saved and loaded as two experts of one base (`tests/faults/folders.py`).
KINDS = (
    "LORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY",
    "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "PEANUT", "PSOFT", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING",
    "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
_NOT_MERGED = ("BEFT", "LILY")
# Settings of LoRA that may differ from their defaults. The others change the base's weights or layers for all experts,
# need a pass over data that nobody makes here, or import what they name.
_LORA = {
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_dora", "lora_bias", "target_parameters", "ensure_weight_tying", "use_qalora", "qalora_group_size",
    "trainable_token_indices", "runtime_config",
}  # fmt: skip
# What says where an adapter comes from and for what, which changes nothing that is computed here.
_ORIGIN = {field.name for field in dataclasses.fields(PeftConfig)}
_INITS = (True, False, "gaussian", "orthogonal", "mica")
# Once trained, these are plain LoRA, whatever began them.
_LOADED_INITS = (*_INITS, "eva")
_FLOATS = ("F16", "BF16", "F32")


def sort_settings(model: PeftModel) -> None:
    """Put the sets among the settings of all adapters in order: peft writes a set in another order in every process."""
    for config in model.peft_config.values():
        for name, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, name, sorted(value))


def check_peft_config(config: PeftConfig, where: str, *, loaded: bool = False, merged: bool = False) -> None:
    """Check that adapters of this configuration can be experts that share one base model.

    Students have the same: the base model stays as it is, and the adapter is all that is saved.

    Args:
        config: of peft.
        where: begins an error, e.g. "peft_config".
        loaded: whether the adapter is trained already.
        merged: whether it will be merged into its base.

    Raises:
        ValueError: names the setting.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in KINDS:
        raise ValueError(
            f"{where}: adapters of the kind {shown(kind)} cannot be experts of one base model, or are not known to "
            f"work as such: use peft.LoraConfig, or one of {', '.join(KINDS[1:])}"
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{where}: task_type={shown(str(getattr(config.task_type, 'value', config.task_type)))} is for models that "
            'do not write text: use task_type="CAUSAL_LM"'
        )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"{where}: bias={shown(getattr(config, 'bias', None))} trains biases of the base model, which has to stay "
            'as it is (experts share it): use bias="none"'
        )
    if merged and (kind in _NOT_MERGED or getattr(config, "lora_bias", False)):
        raise ValueError(
            f"{where}: with a model for each round adapters are merged into their models, which peft cannot do with "
            f"{kind if kind in _NOT_MERGED else 'lora_bias'}: use another kind, or one model for all rounds"
        )
    if kind == "LORA":
        _check_lora(config, where, _LOADED_INITS if loaded else _INITS)


def _check_lora(config: Any, where: str, inits: tuple[Any, ...]) -> None:
    init = config.init_lora_weights
    if not any(init is known if isinstance(known, bool) else init == known for known in inits):
        raise ValueError(
            f"{where}: init_lora_weights={shown(init)} changes the weights of the base model, which has to stay as it "
            f"is (experts share it), or needs a pass over data first: use {', '.join(map(repr, inits))}"
        )
    plain = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _LORA | _ORIGIN and value and value != getattr(plain, field.name, None):
            raise ValueError(
                f"{where}: {field.name}={shown(value)} does not work with experts of one base: leave it out"
            )
    if not (type(config.r) is int and config.r > 0):
        raise ValueError(f"{where}: r must be a whole number, at least 1, got {shown(config.r)}")


@contextmanager
def without_renamed_properties() -> Iterator[None]:
    """Keep peft quiet about a property of models that newer releases of transformers have renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def _read_peft_config(folder: Path, owner: str) -> PeftConfig:
    """Return the configuration of a saved adapter; raises as `saved.read_settings`, and ValueError for bad settings."""
    settings = read_settings(folder / ADAPTER_CONFIG, owner)
    where = f"{owner}: {folder / ADAPTER_CONFIG}"
    kind = settings.get("peft_type")
    if kind not in KINDS or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"{where}: peft_type {shown(kind)} is no kind of adapter that can be an expert (expected one of "
            f"{', '.join(KINDS)}). {REMEDY}"
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {field.name: field for field in dataclasses.fields(config_class)}
    given = {}
    for key, value in settings.items():
        if key in known and key not in ("auto_mapping", "runtime_config"):
            _check_type(known[key], value, where)
            given[key] = value
        elif value and key not in known:
            raise ValueError(f"{where}: {shown(key)} is no setting of this version of peft: upgrade peft, or delete it")
    try:
        config = config_class(**given)
        check_peft_config(config, where, loaded=True)
    except Exception as error:
        said = str(error) if where in str(error) else f"{where} is no adapter's ({first_line(error)}). {REMEDY}"
        raise ValueError(said) from error
    return config


def _check_type(field: dataclasses.Field[Any], value: Any, where: str) -> None:
    """Raise ValueError unless a value is of its default's type, and its numbers are finite."""
    default = field.default
    numbers = [value, *(value.values() if isinstance(value, dict) else ())]
    wrong = any(isinstance(number, float) and not math.isfinite(number) for number in numbers)
    if isinstance(default, bool):
        # How weights begin is said by True, False, or a word.
        wrong = wrong or not (isinstance(value, bool) or ("init" in field.name and isinstance(value, str)))
    elif isinstance(default, int | float):
        wrong = wrong or isinstance(value, bool) or not isinstance(value, int | float)
    if wrong:
        raise ValueError(f"{where}: {field.name} cannot be {shown(value)}. {REMEDY}")


def attach_adapter(
    base: Any, folder: str | os.PathLike[str], owner: str, *, name: str = "default", trainable: bool = False
) -> PeftModel:
    """Load a saved adapter onto a model, which an error leaves as it was.

    Args:
        base: a transformers model, which is wrapped in place, or a `PeftModel`, which gets one more adapter.
        folder: written by peft.
        owner: whom an error names, e.g. "expert 2".
        name: what the adapter is called.
        trainable: whether it is to be trained further.

    Returns:
        The `PeftModel`.

    Raises:
        FileNotFoundError: weights or `adapter_config.json` are missing.
        OSError: a file cannot be read.
        ValueError: settings that cannot be an expert's, or that this version of peft does not know; weights that are
            damaged, missing, NaN, left over, of another shape or dtype than the base asks for, or that would replace
            weights that all experts share.
    """
    folder = Path(folder)
    require_weights(folder, (ADAPTER_WEIGHTS,), owner)
    config = _read_peft_config(folder, owner)
    _check_tensors(folder, require_whole(folder, (ADAPTER_WEIGHTS,), owner), owner)
    _check_shared(base, folder, config, owner)
    try:
        with unchanged_on_error(base), without_renamed_properties():
            if isinstance(base, PeftModel):
                in_training = [weight for weight in base.parameters() if weight.requires_grad]
                base.load_adapter(str(folder), adapter_name=name, is_trainable=trainable, low_cpu_mem_usage=True)
                # peft 0.20 freezes what is there already.
                for weight in in_training:
                    weight.requires_grad_(True)
                model = base
            else:
                model = PeftModel.from_pretrained(
                    base, str(folder), adapter_name=name, is_trainable=trainable, config=config, low_cpu_mem_usage=True
                )
            _require_every_tensor(model, folder, name, owner)
    except (MemoryError, torch.OutOfMemoryError, _Unfit, Warning):
        # A warning is an error where Python is told so, and says nothing of the adapter.
        raise
    except KeyError as error:
        # Of a module that is saved whole.
        raise _Unfit(folder, owner, "lacks", [str(error.args[0])]) from error
    except Exception as error:
        raise ValueError(
            f"{owner}: the adapter in {folder} does not fit the base model ({first_line(error)}): load the base that "
            "it was trained on"
        ) from error
    return model


class _Unfit(ValueError):
    """The tensors of an adapter are not those that its base asks for."""

    def __init__(self, folder: Path, owner: str, what: str, keys: list[str]) -> None:
        super().__init__(
            f"{owner}: {folder / ADAPTER_WEIGHTS} {what} {', '.join(keys[:3])} ({len(keys)} tensors in all): it is "
            f"damaged, or belongs to another base model or configuration. {REMEDY}"
        )


def _check_tensors(folder: Path, dtypes: Mapping[str, str], owner: str) -> None:
    """Raise ValueError for tensors of a dtype in which no adapter is trained, and for such as are NaN or infinite."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as saved:
        for key, dtype in dtypes.items():
            if dtype not in _FLOATS and key.endswith(("weight", ".lora_A", ".lora_B")):
                raise ValueError(
                    f"{owner}: {folder / ADAPTER_WEIGHTS} holds {key} as {dtype}, expected {', '.join(_FLOATS)}. "
                    f"{REMEDY}"
                )
            tensor = saved.get_tensor(key)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{owner}: {folder / ADAPTER_WEIGHTS}: {key} holds NaN or infinite weights, so the expert is of no "
                    f"use. {REMEDY}"
                )


def _check_shared(base: Any, folder: Path, config: Any, owner: str) -> None:
    """Raise ValueError for an adapter that holds weights of the base itself, unless they are the base's own.

    peft saves whole embeddings with an adapter where the vocabulary was resized or the head is adapted, and loads them
    into the base, where they would replace those of every other expert.
    """
    shared = _shared_weights(base)
    copied = tuple(getattr(config, "modules_to_save", None) or ())
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as saved:
        for key in saved.keys():  # noqa: SIM118  (not a dict)
            name = _base_name(key)
            weight = shared.get(name)
            if weight is None or not weight.is_floating_point():
                continue
            shape = tuple(saved.get_slice(key).get_shape())
            if shape != tuple(weight.shape):
                raise ValueError(
                    f"{owner}: the adapter in {folder} was trained on another base or a resized vocabulary, its "
                    f"{name} being {list(shape)} and the base model's {list(weight.shape)}: experts mix token by "
                    "token, so they must share one base and one tokenizer"
                )
            is_copy = any(part in name.split(".") for part in copied)
            if not is_copy and not torch.equal(saved.get_tensor(key).to(weight), weight):
                raise ValueError(
                    f"{owner}: the adapter in {folder} brings its own {name}, which would replace the base model's for "
                    f'all experts: train it with modules_to_save=["{name.split(".")[-2]}"], or save whole models'
                )


def _shared_weights(base: Any) -> dict[str, torch.Tensor]:
    plain: Any = base.get_base_model() if isinstance(base, PeftModel) else base
    return {name.replace(".base_layer.", "."): weight for name, weight in plain.named_parameters()}


def _base_name(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _require_every_tensor(model: PeftModel, folder: Path, name: str, owner: str) -> None:
    """Raise ValueError unless the file holds the adapter's tensors, all of them and no others."""
    wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as saved:
        held = set(saved.keys())
    shared = _shared_weights(model)
    extra = sorted(key for key in held - wanted if _base_name(key) not in shared)
    empty = [key for key, weight in model.named_parameters() if name in key.split(".") and weight.is_meta]
    missing = sorted(wanted - held) or empty
    for what, keys in (("lacks", missing), ("holds besides what belongs there", extra)):
        if keys:
            raise _Unfit(folder, owner, what, keys)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """If the block fails, put the modules and settings of `model` back as they were; weights are taken to be so."""
    modules = [(vars(module), dict(vars(module))) for module in model.modules()]
    held = {id(value): value for _, state in modules for value in state.values()}
    containers = [(value, copy.copy(value)) for value in held.values() if isinstance(value, dict | list | set)]
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    except BaseException:
        for now, before in (*modules, *containers):
            _restore(now, before)
        for weight, requires_grad in trained:
            weight.requires_grad_(requires_grad)
        raise


def _restore(now: Any, before: Any) -> None:
    """Make a dictionary, list or set what it was; what is in both is never missing, since other threads may read it."""
    if isinstance(now, list):
        now[:] = before
    elif isinstance(now, set):
        now &= before
        now |= before
    else:
        for key in now.keys() - before.keys():
            del now[key]
        now.update({key: value for key, value in before.items() if now.get(key, now) is not value})
