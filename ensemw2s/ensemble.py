"""`TokenEnsemble`: T experts and their boosting weights as one transformers model.

The next-token distribution is a mixture of the experts' (EnsemW2S, section "weak experts' ensemble"; method, phase 2):
`p(v) = sum_t w_t p_t(v)` with `w_t = a_t / sum_s a_s` for `combine="prob"`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ensemw2s import ops
from ensemw2s.cost import count
from ensemw2s.decoding import fused_sample, label_questions
from ensemw2s.experts import AdapterExperts, Experts, ModelExperts, StackedAdapters, require_weights
from ensemw2s.files import new_folder, read_json, write_json
from ensemw2s.models import CACHE, MODEL_WEIGHTS, load_model
from ensemw2s.training import only_positions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

COMBINE = ("prob", "logprob", "vote")
RECORD_FILE = "boosting.json"
# What transformers passes to every model's forward and an ensemble has no use for.
_NOT_NEEDED = ("return_dict", "cache_position")


class EnsembleConfig(PreTrainedConfig):
    """Configuration of a `TokenEnsemble`.

    Attributes:
        expert_weights: T positive floats, the boosting weights a_t (natural-log units); normalised when used.
        combine: "prob", "logprob" or "vote" (method, phase 2).
        kind: "adapters" (on one base model) or "models".
        base: for adapters, where the base model comes from: `{"source": ..., "keep_layers": ...}` as in
            `models.load_model`, or None if its weights are saved with the ensemble.
    """

    model_type = "ensemw2s"

    def __init__(
        self,
        expert_weights: Sequence[float] = (),
        combine: str = "prob",
        kind: str = "adapters",
        base: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.expert_weights = [float(weight) for weight in expert_weights]
        self.combine = combine
        self.kind = kind
        self.base = dict(base) if base else None

    @classmethod
    def of(cls, experts: Experts, **settings: Any) -> EnsembleConfig:
        """Describe `experts`, taking vocabulary size and special tokens from the first one."""
        first = experts.expert_config(0).get_text_config(decoder=True)
        shared: dict[str, Any]
        names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
        shared = {name: getattr(first, name, None) for name in names}
        return cls(kind=experts.kind, is_decoder=True, tie_word_embeddings=False, **shared, **settings)


class EnsembleCache(Cache):
    """The key/value caches of all experts as one object.

    Its `layers` are all experts' layers in a row, so what transformers does to a cache (reorder, repeat, select, crop,
    reset) reaches every expert; `experts[t]` is the cache that expert t itself sees, holding the same layer objects.
    Experts that run as one model have one cache, `experts[0]`, whose rows are stacked, expert after expert.

    Args:
        configs: one model configuration per cache.
        stacked: the experts as one model, or None.
    """

    def __init__(self, configs: Iterable[PreTrainedConfig], stacked: StackedAdapters | None = None) -> None:
        self.stacked = stacked
        self.experts = [DynamicCache(config=config) for config in configs]
        super().__init__(layers=[layer for cache in self.experts for layer in cache.layers])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i what row `beam_idx[i]` was, for every expert."""
        super().reorder_cache(self._rows(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of every expert."""
        super().batch_select_indices(self._rows(indices))

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the stacked rows that belong to some rows of the batch."""
        if self.stacked is None or not self.get_seq_length():
            return rows
        count = self.stacked.count
        starts = torch.arange(count, device=rows.device) * (self.layers[0].keys.shape[0] // count)
        return (starts[:, None] + rows).flatten()


class TokenEnsemble(PreTrainedModel, GenerationMixin):
    """A mixture of T causal language models that behaves like one.

    `forward` returns the mixture's log-probabilities as `.logits` (float32; `log_softmax` leaves them unchanged), and
    `generate` does what it does for any transformers model. Build one with `from_adapters` or `from_models`, or load
    a saved one with `from_pretrained`.

    Args:
        config: weights and combination.
        experts: the T experts.

    Raises:
        ValueError: no expert, a number of weights other than T, a weight that is not positive and finite, or an
            unknown `combine`.
    """

    config_class = EnsembleConfig
    base_model_prefix = "experts"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: EnsembleConfig, experts: Experts) -> None:
        _check(config.expert_weights, config.combine, len(experts))
        super().__init__(config)
        self.experts = experts
        self.generation_config = _generation_config(experts)
        self.eval()

    @classmethod
    def from_adapters(
        cls,
        base: PreTrainedModel,
        folders: Sequence[str | os.PathLike[str]],
        expert_weights: Sequence[float],
        *,
        combine: str = "prob",
        base_reference: Mapping[str, Any] | None = None,
    ) -> TokenEnsemble:
        """Build an ensemble from saved adapters of one base model.

        Args:
            base: the base model; it is wrapped in place.
            folders: T folders written by peft.
            expert_weights: T positive floats.
            combine: how distributions are combined.
            base_reference: keyword arguments of `models.load_model` that load `base` again. With it a saved
                ensemble refers to its base instead of holding a copy.
        """
        experts = AdapterExperts(base, [Path(folder) for folder in folders])
        _check(expert_weights, combine, len(experts))
        settings = {"expert_weights": expert_weights, "combine": combine, "base": base_reference}
        return cls(EnsembleConfig.of(experts, **settings), experts)

    @classmethod
    def from_models(
        cls, models: Sequence[PreTrainedModel], expert_weights: Sequence[float], *, combine: str = "prob"
    ) -> TokenEnsemble:
        """Build an ensemble from whole models over one vocabulary."""
        experts = ModelExperts(models)
        _check(expert_weights, combine, len(experts))
        return cls(EnsembleConfig.of(experts, expert_weights=expert_weights, combine=combine), experts)

    @property
    def num_experts(self) -> int:
        """Return T."""
        return len(self.experts)

    def mixture_weights(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the expert weights as float32 [T] on `device`, not normalised."""
        return torch.tensor(self.config.expert_weights, dtype=torch.float32, device=device)

    def __getitem__(self, index: slice) -> TokenEnsemble:
        """Return the ensemble of some experts, sharing their weights: `ensemble[:3]` is the first three."""
        if not isinstance(index, slice):
            raise TypeError(f"an ensemble is sliced, as in ensemble[:3]; got index {index!r}")
        return self.reweighted(self.config.expert_weights[index], range(self.num_experts)[index])

    def reweighted(self, expert_weights: Sequence[float], indices: Sequence[int] | None = None) -> TokenEnsemble:
        """Return an ensemble of the experts `indices` (all of them if None) with other weights, sharing theirs."""
        indices = range(self.num_experts) if indices is None else indices
        experts = self.experts.selected(indices)
        _check(expert_weights, self.config.combine, len(experts))
        settings = {"combine": self.config.combine, "base": self.config.base}
        return TokenEnsemble(EnsembleConfig.of(experts, expert_weights=expert_weights, **settings), experts)

    def new_cache(self) -> EnsembleCache:
        """Return an empty cache for all experts, with the adapters as they are now."""
        stacked = self.experts.stacked()
        count = 1 if stacked else self.num_experts
        return EnsembleCache((self.experts.expert_config(t) for t in range(count)), stacked)

    def expert_logits(
        self,
        indices: Iterable[int],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: EnsembleCache | None = None,
        last_only: bool = False,
    ) -> list[torch.Tensor]:
        """Run some experts on one batch and return their logits, each in the expert's own dtype.

        Args:
            indices: which experts to run.
            input_ids: int64 [B, L].
            attention_mask: int64 [B, past + L]; None means no padding.
            positions: bool [B, L]; keep only its n true entries, giving logits [n, V].
            position_ids: int64 [B, L]; None leaves them to the expert.
            cache: what the experts have seen before; it grows by L.
            last_only: compute logits of the last position only, giving [B, 1, V].
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "use_cache": cache is not None,
        }
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if last_only:
            inputs["logits_to_keep"] = 1
        if cache is not None and cache.stacked:
            return _stacked_logits(cache.stacked, cache.experts[0], inputs, list(indices))
        logits = []
        for index in indices:
            if cache is not None:
                inputs[CACHE] = cache.experts[index]
            with self.experts.expert(index) as model:
                if positions is None:
                    logits.append(model(**inputs).logits)
                else:
                    with only_positions(model, positions):
                        logits.append(model(**inputs).logits)
                count(model, input_ids, attention_mask, logits[-1].shape[:-1].numel())
        return logits

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the mixture's log-probabilities as float32 `.logits` [B, L, V] (or the last `logits_to_keep`).

        Args:
            input_ids: int64 [B, L].
            attention_mask: int64 [B, past + L].
            position_ids: int64 [B, L].
            cache: an `EnsembleCache`; None or another empty cache starts one if `use_cache` is true.
            labels: int64 [B, L], -100 where ignored; the loss is the mean negative log-probability of the next label.
            use_cache: return a cache (the default is not to).
            logits_to_keep: 0 for all positions.
            past_key_values: what transformers before 5.24 calls `cache`.
            kwargs: `return_dict` and `cache_position`, which transformers passes along and no ensemble needs.

        Raises:
            TypeError: any other keyword with a value, such as `inputs_embeds`: experts share no embedding.
            ValueError: `labels` with `combine="vote"`, whose log-probabilities are -inf off the vote; or a filled
                cache that is not an `EnsembleCache`.
        """
        if labels is not None and self.config.combine == "vote":
            raise ValueError('combine="vote" has no loss: its distribution is 0 off the vote; use "prob" or "logprob"')
        unknown = sorted(name for name, value in kwargs.items() if name not in _NOT_NEEDED and value is not None)
        if unknown:
            raise TypeError(f"an ensemble's forward does not know {', '.join(unknown)}: leave them out")
        cache = cache if cache is not None else past_key_values
        if cache is not None and not isinstance(cache, EnsembleCache):
            if cache.get_seq_length():
                raise ValueError(
                    f"cache is a filled {type(cache).__name__}: an ensemble needs the EnsembleCache that it "
                    "returned, or the one from ensemble.new_cache()"
                )
            cache = None
        if cache is None and use_cache:
            cache = self.new_cache()
        logits = self.expert_logits(
            range(self.num_experts),
            input_ids,
            attention_mask,
            position_ids=position_ids,
            cache=cache,
            last_only=logits_to_keep == 1,
        )
        if logits_to_keep > 1:
            logits = [row[:, -logits_to_keep:] for row in logits]
        log_probs = ops.mixture_log_probs(logits, self.mixture_weights(logits[0].device), combine=self.config.combine)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.nll_loss(
                log_probs[:, :-1].flatten(0, 1),
                labels[:, 1:].flatten().to(log_probs.device),
                ignore_index=-100,
            )
        return CausalLMOutputWithPast(loss=loss, logits=log_probs, **{CACHE: cache})

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *, fused: bool = True, **kwargs: Any) -> Any:
        """Generate token ids as any transformers model does.

        Plain greedy decoding and sampling with temperature, top-k, top-p and min-p end each step in one fused op
        (`ops.mixture_sample`); anything else takes transformers' own loops.

        Args:
            inputs: int64 [B, length] prompts, or pass `input_ids`; left-padded if their lengths differ.
            fused: False always takes transformers' own loops.
            kwargs: as for `transformers.GenerationMixin.generate`.

        Raises:
            ValueError: beam search with `combine="vote"`, or a prompt longer than an expert's context.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None:
            self._check_prompt(prompt.shape[1])
        config = kwargs.get("generation_config") or self.generation_config
        beams = kwargs.get("num_beams", config.num_beams) or 1
        if beams > 1 and self.config.combine == "vote":
            raise ValueError(
                'combine="vote" cannot rank beams: it gives one token all the mass; use "prob" or "logprob"'
            )
        if kwargs.get("use_cache", True):
            kwargs.setdefault(CACHE, self.new_cache())
            if fused and beams == 1 and kwargs.get("assistant_model") is None and not kwargs.get("synced_gpus"):
                # `generate` hands a custom loop everything but the streamer.
                kwargs.setdefault("custom_generate", partial(fused_sample, streamer=kwargs.get("streamer")))
        return super().generate(inputs, **kwargs)

    def label(self, questions: Dataset, processing_class: PreTrainedTokenizerBase, **options: Any) -> Dataset:
        """Answer questions; see `decoding.label_questions`."""
        return label_questions(self, questions, processing_class, **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the ensemble to one folder, whole or not at all.

        Args:
            save_directory: takes the place of what is there.
            processing_class: the tokenizer, saved along.
            record: a JSON-able account of the boosting run, saved as `boosting.json`.

        Raises:
            DiskFullError: the disk is full; what was at `save_directory` before is untouched.
        """
        with new_folder(save_directory) as folder:
            self.config.save_pretrained(folder)
            self.generation_config.save_pretrained(folder)
            for index in range(self.num_experts):
                self.experts.save_expert(index, folder / "experts" / str(index + 1))
            if isinstance(self.experts, AdapterExperts) and self.config.base is None:
                self.experts.save_base(folder / "base")
            if processing_class is not None:
                processing_class.save_pretrained(folder)
            if record is not None:
                write_json(folder / RECORD_FILE, record)
            (folder / "README.md").write_text(model_card(self), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: EnsembleConfig | None = None,
        **model_init_kwargs: Any,
    ) -> TokenEnsemble:
        """Load a saved ensemble from a folder or the hub.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or a hub id.
            config: used in place of the saved one.
            model_init_kwargs: passed on to each model's `from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            FileNotFoundError: the folder or an expert's weights are missing; names which.
        """
        folder = _local_folder(pretrained_model_name_or_path)
        config = config or EnsembleConfig.from_pretrained(folder)
        folders = [folder / "experts" / str(t + 1) for t in range(len(config.expert_weights))]
        if config.kind == "models":
            for number, path in enumerate(folders, 1):
                require_weights(path, MODEL_WEIGHTS, f"expert {number} of {len(folders)}")
            experts: Experts = ModelExperts([load_model(path, **model_init_kwargs) for path in folders])
        else:
            if config.base is None:
                require_weights(folder / "base", MODEL_WEIGHTS, "the experts' base model")
            base = dict(config.base or {"source": folder / "base"})
            experts = AdapterExperts(load_model(base.pop("source"), **base, **model_init_kwargs), folders)
        return cls(config, experts)

    @staticmethod
    def read_record(save_directory: str | os.PathLike[str]) -> dict[str, Any]:
        """Return the boosting record that was saved with the ensemble."""
        return read_json(Path(save_directory) / RECORD_FILE)

    def _check_prompt(self, length: int) -> None:
        for index in range(self.num_experts):
            limit = getattr(self.experts.expert_config(index), "max_position_embeddings", None)
            if limit is not None and length > limit:
                raise ValueError(
                    f"the prompt has {length} tokens but expert {index + 1} reads at most {limit}: shorten the prompt"
                )


def model_card(ensemble: TokenEnsemble) -> str:
    """Return a README for a saved ensemble."""
    weights = ensemble.config.expert_weights
    rows = "\n".join(f"| {t} | {w:.4f} | {w / sum(weights):.4f} |" for t, w in enumerate(weights, 1))
    base = (ensemble.config.base or {}).get(
        "source", "saved in `base/`" if ensemble.config.kind == "adapters" else "none"
    )
    return (
        "---\nlibrary_name: ensemw2s\ntags: [ensemble, weak-to-strong]\n---\n\n"
        f"# A token-level ensemble of {len(weights)} experts\n\n"
        f"Made by ensemw2s. Combination: `{ensemble.config.combine}`. Base model: {base}.\n\n"
        f"| expert | weight | share |\n|---|---|---|\n{rows}\n\n"
        "```python\nfrom ensemw2s import TokenEnsemble\n\n"
        'ensemble = TokenEnsemble.from_pretrained("this-folder")\n```\n'
    )


def _stacked_logits(
    stacked: StackedAdapters, cache: Cache, inputs: dict[str, Any], indices: list[int]
) -> list[torch.Tensor]:
    """Run all experts in one forward pass and return the logits of those in `indices`."""
    repeated = {
        name: value.repeat(stacked.count, 1) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    with stacked.model() as model:
        logits = model(**repeated, **{CACHE: cache}).logits
    count(model, repeated["input_ids"], repeated["attention_mask"], logits.shape[:-1].numel())
    each = logits.unflatten(0, (stacked.count, -1)).unbind(0)
    return [each[index] for index in indices]


def _check(expert_weights: Sequence[float], combine: str, num_experts: int) -> None:
    if num_experts == 0:
        raise ValueError("an ensemble needs at least one expert, got none")
    if len(expert_weights) != num_experts:
        raise ValueError(f"expert_weights has {len(expert_weights)} values for {num_experts} experts: give one each")
    bad = [weight for weight in expert_weights if not 0 < weight < float("inf")]
    if bad:
        raise ValueError(f"expert_weights must be positive and finite, got {bad[0]}: leave such an expert out")
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")


def _generation_config(experts: Experts) -> GenerationConfig:
    with experts.expert(0) as model:
        settings: Any = model.generation_config
        return GenerationConfig.from_dict(settings.to_dict())


def _local_folder(name: str | os.PathLike[str]) -> Path:
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or str(name).count("/") > 1 or str(name).startswith((".", "/")):
        raise FileNotFoundError(f"{folder} is not a saved ensemble: it has no config.json")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name)))


AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig)
AutoModelForCausalLM.register(EnsembleConfig, TokenEnsemble)
