"""The configuration of an ensemble, and what a saved one may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ensemw2s.data.tokens import described_format
from ensemw2s.ensemble.experts import context_lengths
from ensemw2s.models.base_reference import check_base
from ensemw2s.models.mixture import Experts
from ensemw2s.models.saved import check_tokens
from ensemw2s.ops.checks import COMBINES
from ensemw2s.runtime.values import shown

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class EnsembleConfig(PreTrainedConfig):
    """Configuration of a `TokenEnsemble`.

    Attributes:
        expert_weights: T positive floats, the boosting weights a_t (natural-log units); normalised when used.
        combine: "prob", "logprob" or "vote" (method, phase 2).
        kind: "adapters" (on one base model) or "models".
        base: for adapters, where the base model comes from: `source`, and perhaps `keep_layers` and `dtype` as in
            `ensemw2s.load_model`; None if its weights are saved with the ensemble.
        question_format: how the experts were asked in their training, as `QuestionFormat.describe` says it; None
            stands for the default format.

    Raises:
        ValueError: any other key in `base` or `question_format`, or a value that cannot be meant.
    """

    model_type = "ensemw2s"

    def __init__(
        self,
        expert_weights: Sequence[float] = (),
        combine: str = "prob",
        kind: str = "adapters",
        base: Mapping[str, Any] | None = None,
        question_format: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.expert_weights = [float(weight) for weight in expert_weights]
        self.combine = combine
        self.kind = kind
        self.base = check_base(base, "EnsembleConfig")
        self.question_format = described_format(question_format, "EnsembleConfig")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> EnsembleConfig:
        """Return the configuration that a saved ensemble's `config.json` holds.

        Raises:
            ValueError: a key that no ensemble saves, or a value that is none of its; names both and the file.
        """
        check_settings(config_dict, str(Path(kwargs.get("name_or_path") or "") / "config.json"))
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def of(cls, experts: Experts, **settings: Any) -> EnsembleConfig:
        """Describe `experts`: vocabulary and special tokens of the first one, the shortest context of all."""
        first = experts.expert_config(0).get_text_config(decoder=True)
        shared: dict[str, Any] = {name: getattr(first, name, None) for name in ("vocab_size", *_SPECIAL_TOKENS)}
        shared["max_position_embeddings"] = min(context_lengths(experts).values(), default=None)
        return cls(kind=experts.kind, is_decoder=True, tie_word_embeddings=False, **shared, **settings)


# What an ensemble's `config.json` holds: the keys of ours, and those that transformers gives every configuration. Some
# of its releases put the hub's commit among what they have read from the file.
_OURS = (
    "expert_weights", "combine", "kind", "base", "question_format", "vocab_size", "max_position_embeddings",
    *_SPECIAL_TOKENS,
)  # fmt: skip
_EVERY = {"is_decoder", "tie_word_embeddings", "use_cache", "torch_dtype", "_commit_hash"}
_EVERY |= PreTrainedConfig().to_dict().keys()


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for settings that no ensemble saves; `where` begins the message."""
    kind = settings.get("model_type", EnsembleConfig.model_type)
    if kind != EnsembleConfig.model_type:
        raise ValueError(
            f"{where} is of a {shown(kind)} model, not of an ensemble: load it with load_model, or with transformers' "
            "AutoModelForCausalLM.from_pretrained"
        )
    unknown = sorted(map(str, settings.keys() - {*_OURS, *_EVERY}))
    if unknown:
        raise ValueError(f"{where}: {shown(unknown[0])} is no setting of an ensemble: delete it, or pass it yourself")
    checks = {
        "expert_weights": lambda value: (
            isinstance(value, list)
            and all(type(weight) in (int, float) and 0 < weight < float("inf") for weight in value)
        ),
        "combine": lambda value: value in COMBINES,
        "kind": lambda value: value in ("adapters", "models"),
        "vocab_size": lambda value: type(value) is int and value > 0,
        "max_position_embeddings": lambda value: value is None or (type(value) is int and value > 0),
    }
    for key, is_good in checks.items():
        if key in settings and not is_good(settings[key]):
            raise ValueError(f"{where}: {key} cannot be {shown(settings[key])}")
    for key in _SPECIAL_TOKENS:
        check_tokens(key, settings.get(key), settings, where)
    check_base(settings.get("base"), where)
    described_format(settings.get("question_format"), where)


def check_described(config: EnsembleConfig, experts: Experts, folder: Path) -> None:
    """Raise ValueError for a configuration that promises more than the experts hold."""
    own = EnsembleConfig.of(experts)
    for key in ("vocab_size", "max_position_embeddings"):
        says, has = getattr(config, key, None), getattr(own, key)
        if has is not None and (says is None or says > has or (key == "vocab_size" and says != has)):
            raise ValueError(f"{folder / 'config.json'}: {key} is {shown(says)}, but the experts' is {has}: correct it")
