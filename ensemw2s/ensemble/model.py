"""`TokenEnsemble`: T experts and their boosting weights as one transformers model.

The next-token distribution is a mixture of the experts' (EnsemW2S, section "weak experts' ensemble"; method, phase 2):
`p(v) = sum_t w_t p_t(v)` with `w_t = a_t / sum_s a_s` for `combine="prob"`.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ensemw2s import ops
from ensemw2s.data.tokens import QuestionFormat, checked_format, format_of
from ensemw2s.ensemble.cache import EnsembleCache
from ensemw2s.ensemble.config import EnsembleConfig
from ensemw2s.ensemble.experts import AdapterExperts, ModelExperts, context_lengths
from ensemw2s.ensemble.saving import check_saving_options, load_parts, save_ensemble
from ensemw2s.inference.decoding import Sampling, fused_sample, require_valid
from ensemw2s.inference.labelling import LabelSettings, label_questions
from ensemw2s.models.base_reference import check_base, settled
from ensemw2s.models.heads import only_positions, own_head
from ensemw2s.models.loading import CACHE, load_model
from ensemw2s.models.mixture import Experts, Pass, StackedExperts, repeat_rows
from ensemw2s.models.sharing import turn_of
from ensemw2s.ops.checks import COMBINES
from ensemw2s.ops.products import faster_linear_layers
from ensemw2s.runtime.meter import count

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

# What transformers' `loss_function` takes beside logits and labels.
_LOSS_KWARGS = ("num_items_in_batch", "ignore_index", "shift_labels")
# Outputs that each expert has by itself.
_INNER_OUTPUTS = ("output_hidden_states", "output_attentions")


class TokenEnsemble(PreTrainedModel, GenerationMixin):
    """A mixture of T causal language models that behaves like one.

    `forward` returns the mixture's log-probabilities as `.logits` (float32; `log_softmax` leaves them unchanged), and
    `generate` does what it does for any transformers model. Build one with `from_adapters` or `from_models`, or load
    a saved one with `from_pretrained`.

    Any number of threads may use an ensemble, its slices and others on the same base at once, each as if it were alone.
    A call keeps to the experts that were there when it began.

    Args:
        config: weights and combination.
        experts: the T experts.

    Raises:
        TypeError: no experts beside the config.
        ValueError: no expert, a number of weights other than T, a weight that is not positive and finite, or an
            unknown `combine`.
    """

    config_class = EnsembleConfig
    base_model_prefix = "experts"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    accepts_loss_kwargs = True
    # Of the ensemble as one call of `generate` sees it: whether the fused loop may be taken, and the prompts' number.
    _fused = True
    _prompts: int | None = None

    def __init__(self, config: EnsembleConfig, experts: Experts | None = None) -> None:
        if experts is None:
            raise TypeError(
                "a configuration alone makes no ensemble, whose experts are models that exist: use "
                "TokenEnsemble.from_pretrained, from_adapters or from_models"
            )
        _check(config.expert_weights, config.combine, len(experts))
        super().__init__(config)
        self.experts = experts
        self.config._attn_implementation = experts.expert_config(0)._attn_implementation
        self.config.dtype = self.dtype
        self.loss_type = "ForCausalLM"
        settings: Any = experts.carrier(0).generation_config
        self.generation_config = GenerationConfig.from_dict(settings.to_dict())
        # As the experts are: others may be running them, so that nothing is set there.
        self.training = False
        self.post_init()

    def init_weights(self) -> None:
        """Leave the experts' weights as they are; `post_init` would have them drawn anew."""

    def train(self, mode: bool = True) -> TokenEnsemble:
        """Set the mode of the ensemble, and of its experts too unless all are frozen and `mode` is true.

        Others may be running frozen experts, whose dropout would change what they give and teach nobody.
        """
        if mode and not any(weight.requires_grad for weight in self.parameters()):
            self.training = True
            return self
        return super().train(mode)

    def get_input_embeddings(self) -> torch.nn.Module:
        """Raise NotImplementedError, as all that reads, replaces or resizes embeddings does: there are several."""
        raise NotImplementedError(
            "the experts of an ensemble share no embedding: ask one of them, as in "
            "ensemble.experts.carrier(0).get_input_embeddings(); or resize the models before they become an ensemble"
        )

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Raise NotImplementedError; see `get_input_embeddings`."""
        self.get_input_embeddings()

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError, as `load_adapter` does: it would change every expert."""
        raise NotImplementedError(
            "an adapter on a whole ensemble would change every expert: append it as one more with add_expert(folder, "
            "expert_weight), or train a student"
        )

    load_adapter = add_adapter

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError, as `generate_batch` does: its paged cache is of one model."""
        raise NotImplementedError(
            "continuous batching (generate_batch, transformers serve --continuous-batching) has a paged cache for one "
            "model, and an ensemble has several: call generate with a batch that is padded on the left, or label"
        )

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
            base_reference: `source`, and perhaps `keep_layers` and `dtype`, with which `ensemw2s.load_model` loads
                `base` again. With it a saved ensemble refers to its base instead of holding a copy: to a folder by
                its path, relative if it is beside or below the ensemble's, absolute otherwise **[choice]**.

        Raises:
            FileNotFoundError: an adapter's folder lacks its weights or its `adapter_config.json`.
            ValueError: a damaged adapter, or one that does not fit the base or would change it for all experts;
                another key in `base_reference`.
        """
        reference = settled(check_base(base_reference, "base_reference"))
        _check(expert_weights, combine, len(folders))
        experts = AdapterExperts(base, folders)
        settings = {"expert_weights": expert_weights, "combine": combine, "base": reference}
        return cls(EnsembleConfig.of(experts, **settings), experts)

    @classmethod
    def from_models(
        cls, models: Sequence[PreTrainedModel], expert_weights: Sequence[float], *, combine: str = "prob"
    ) -> TokenEnsemble:
        """Build an ensemble from whole models over one vocabulary and in one dtype."""
        experts = ModelExperts(models)
        _check(expert_weights, combine, len(experts))
        return cls(EnsembleConfig.of(experts, expert_weights=expert_weights, combine=combine), experts)

    @property
    def num_experts(self) -> int:
        """Return T."""
        return len(self.experts)

    @property
    def expert_weights(self) -> list[float]:
        """Return the T expert weights, not normalised; `reweighted` gives an ensemble with others."""
        return list(self.config.expert_weights)

    @property
    def question_format(self) -> QuestionFormat:
        """How the experts were asked in their training, which `label` keeps to; set it for experts made elsewhere."""
        return format_of(self)

    @question_format.setter
    def question_format(self, question_format: QuestionFormat) -> None:
        self.config.question_format = checked_format(question_format).describe()

    def mixture_weights(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the expert weights as float32 [T] on `device`, not normalised."""
        return torch.tensor(self.config.expert_weights, dtype=torch.float32, device=device)

    def add_expert(
        self, expert: str | os.PathLike[str] | PreTrainedModel, expert_weight: float, **model_init_kwargs: Any
    ) -> None:
        """Append one expert, in place. Caches made before know nothing of it.

        Args:
            expert: for adapters, a folder written by peft for the same base; for whole models, a model or a source
                of `ensemw2s.load_model`.
            expert_weight: a positive float, on the scale of `config.expert_weights`.
            model_init_kwargs: passed on to `ensemw2s.load_model` where a source is given.

        Raises:
            FileNotFoundError, ValueError: as `from_adapters` and `from_models` do; the ensemble stays as it was.
            TypeError: a model given to an ensemble of adapters, or `model_init_kwargs` that nothing reads.
        """
        with turn_of(self):
            expert_weights = [*self.config.expert_weights, float(expert_weight)]
            _check(expert_weights, self.config.combine, self.num_experts + 1)
            if model_init_kwargs and (isinstance(self.experts, AdapterExperts) or isinstance(expert, PreTrainedModel)):
                raise TypeError(f"nothing is loaded that {', '.join(model_init_kwargs)} could change: leave it out")
            # Calls under way go on with the old ones.
            experts: Any = self.experts.selected(range(self.num_experts))
            if isinstance(experts, AdapterExperts):
                if isinstance(expert, PreTrainedModel):
                    raise TypeError("the experts are adapters on one base: give the folder of an adapter, not a model")
                experts.add(expert)
            else:
                model: Any = expert
                if not isinstance(expert, PreTrainedModel):
                    model = load_model(expert, **{"dtype": self.dtype, **model_init_kwargs})
                experts.add(model.to(self.device))
            self.config.max_position_embeddings = min(context_lengths(experts).values(), default=None)
            self.config.expert_weights = expert_weights
            self.experts = experts

    def snapshot(self) -> TokenEnsemble:
        """Return the ensemble as it is now, sharing its weights: experts that are added later are not in it."""
        experts, weights = self._now()
        taken: TokenEnsemble = copy.copy(self)
        taken.__dict__["_modules"] = {**self._modules, "experts": experts}
        taken.config = copy.copy(self.config)
        taken.config.expert_weights = weights
        return taken

    def _now(self) -> tuple[Experts, list[float]]:
        """Return the experts and their weights, as many of one as of the other."""
        experts, weights = self.experts, self.config.expert_weights
        if len(experts) != len(weights):
            # Perhaps one is just being added.
            with turn_of(self):
                experts, weights = self.experts, self.config.expert_weights
        if len(experts) != len(weights):
            raise ValueError(
                f"config.expert_weights has {len(weights)} values for {len(experts)} experts: give one each, and add "
                "experts with add_expert"
            )
        return experts, weights

    def without(self, index: int) -> TokenEnsemble:
        """Return the ensemble of all experts but number `index` (from 0; -1 is the last), sharing their weights.

        Raises:
            IndexError: no such expert.
            ValueError: it is the only one.
        """
        _, weights = self._now()
        if not -len(weights) <= index < len(weights):
            raise IndexError(f"there is no expert {index}: {len(weights)} experts are numbered from 0")
        return self[[t for t in range(len(weights)) if t != index % len(weights)]]

    def __len__(self) -> int:
        """Return T, as `num_experts` does."""
        return self.num_experts

    def __getitem__(self, index: slice | Sequence[int]) -> TokenEnsemble:
        """Return the ensemble of some experts, sharing their weights: `ensemble[:3]`, or `ensemble[[0, 2]]`.

        Raises:
            IndexError: no such expert.
            TypeError: one number, or something else that is neither a slice nor a list of numbers.
            ValueError: no expert, or one twice.
        """
        _, weights = self._now()
        everyone = range(len(weights))
        if isinstance(index, slice):
            chosen = list(everyone[index])
        elif isinstance(index, list | tuple) and all(type(number) is int for number in index):
            if not all(-len(weights) <= number < len(weights) for number in index):
                raise IndexError(
                    f"{list(index)} names an expert that is not there: {len(weights)} experts are numbered from 0 (an "
                    "expert no better than the model before training is not added)"
                )
            chosen = [everyone[number] for number in index]
        else:
            raise TypeError(
                f"an ensemble is sliced, as in ensemble[:3] or ensemble[[0, 2]]; got {index!r}. One expert by itself "
                "is ensemble[[0]]; `with ensemble.experts.expert(0) as model:` gives its model"
            )
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"{index} names an expert twice: name each once, and give it a weight by reweighted")
        return self.reweighted([weights[number] for number in chosen], chosen)

    def reweighted(self, expert_weights: Sequence[float], indices: Sequence[int] | None = None) -> TokenEnsemble:
        """Return an ensemble of the experts `indices` (all of them if None) with other weights, sharing theirs."""
        experts, _ = self._now()
        experts = experts.selected(range(len(experts)) if indices is None else indices)
        _check(expert_weights, self.config.combine, len(experts))
        settings = {name: getattr(self.config, name) for name in ("combine", "base", "question_format")}
        chosen = TokenEnsemble(EnsembleConfig.of(experts, expert_weights=expert_weights, **settings), experts)
        chosen.generation_config = copy.deepcopy(self.generation_config)
        return chosen

    def new_cache(self) -> EnsembleCache:
        """Return an empty cache for all experts, with the adapters as they are now."""
        return _new_cache(self.experts)

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

        Raises:
            ValueError: more tokens than an expert reads, or (on the CPU, where looking costs nothing) ids outside the
                vocabulary; a cache of other experts or rows.
        """
        texts = input_ids, attention_mask, position_ids
        return self._run(self.experts, list(indices), *texts, positions, cache, last_only)

    def _run(
        self,
        experts: Experts,
        indices: list[int],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: EnsembleCache | None,
        last_only: bool,
    ) -> list[torch.Tensor]:
        """Do what `expert_logits` does, with these experts."""
        if cache is not None:
            cache.require_fit(experts.members(), input_ids.shape[0])
        self._check_input(input_ids, attention_mask, cache)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs["use_cache"] = cache is not None
        if position_ids is not None:
            # One row for all, as transformers gives them, would not fit rows that are stacked.
            inputs["position_ids"] = position_ids.expand(input_ids.shape[0], -1)
        if last_only:
            inputs["logits_to_keep"] = 1
        every = [Pass((index,)) for index in indices] if cache is None else cache.passes
        passes = [each for each in every if not set(indices).isdisjoint(each.experts)]
        caches = {} if cache is None else {index: part for each, part in cache.parts() for index in each.experts}

        def run(model: torch.nn.Module, index: int) -> torch.Tensor:
            own = {} if cache is None else {CACHE: caches[index]}
            frozen = None if cache is None else cache.frozen
            with faster_linear_layers(model, input_ids.numel(), frozen):
                if positions is None:
                    logits = model(**inputs, **own).logits
                else:
                    with own_head(model) as mine, only_positions(mine, positions):
                        logits = mine(**inputs, **own).logits
            count(experts.carrier(index), input_ids, attention_mask, logits.shape[:-1].numel())
            return logits

        logits = experts.run(passes, run, lambda each: _stacked_logits(each.stacked, caches[each.experts[0]], inputs))
        return [logits[index] for index in indices]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the mixture's log-probabilities as float32 `.logits` [B, L, V] (or those that are kept).

        Args:
            input_ids: int64 [B, L].
            attention_mask: int64 [B, past + L].
            position_ids: int64 [B, L].
            cache: an `EnsembleCache`; None or another empty cache starts one if `use_cache` is true.
            labels: int64 [B, L], -100 where ignored; the loss is the mean negative log-probability of the next label.
            use_cache: return a cache (the default is not to).
            logits_to_keep: 0 for all positions, k for the last k, or an int64 [n] of positions.
            past_key_values: what transformers before 5.24 calls `cache`.
            kwargs: `return_dict` (False, here or in the config, gives a tuple); `num_items_in_batch`, `ignore_index`
                and `shift_labels` for the loss, as `loss_function` takes them; `cache_position`, which transformers
                passes along and no ensemble needs.

        Raises:
            FloatingPointError: an expert gives NaN, +inf or no finite logit at a position that is no padding; names
                row and expert. On the CPU alone and not where it is compiled, or within `generate`: elsewhere looking
                would make the program wait for the device, and all log-probabilities of such a position are NaN
                **[choice]**.
            TypeError: any other keyword with a value, such as `inputs_embeds`: experts share no embedding; hidden
                states or attentions, here or in the config; or both `cache` and `past_key_values`.
            ValueError: `labels` with `combine="vote"`, whose log-probabilities are -inf off the vote, with
                `logits_to_keep`, or in training with experts that are all frozen; a filled cache that is not an
                `EnsembleCache`, or one of other experts or rows.
        """
        losses = {name: kwargs.pop(name) for name in _LOSS_KWARGS if kwargs.get(name) is not None}
        wants_loss = labels is not None or "shift_labels" in losses
        input_ids = self._asked_for(input_ids, kwargs)
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
        kept: Any = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if wants_loss:
            self._check_loss(kept)
        experts, weights = self._now()
        seen = _own_cache(cache=cache, past_key_values=past_key_values)
        if seen is None and use_cache:
            seen = _new_cache(experts)
        texts = input_ids, attention_mask, position_ids
        logits = self._run(experts, list(range(len(weights))), *texts, None, seen, last_only)
        if not last_only:
            logits = [row[:, kept] for row in logits]
        device = logits[0].device
        log_probs = ops.mixture_log_probs(
            logits, torch.tensor(weights, dtype=torch.float32, device=device), combine=self.config.combine
        )
        if self._prompts is not None or (device.type == "cpu" and not torch.compiler.is_compiling()):
            if attention_mask is not None and attention_mask.dim() == 2:
                attention_mask = attention_mask[:, -input_ids.shape[1] :][:, kept]
            _require_numbers(log_probs, logits, attention_mask, self.row_names(len(input_ids)))
        loss = None
        if wants_loss:
            loss = self.loss_function(logits=log_probs, labels=labels, vocab_size=log_probs.shape[-1], **losses)
        return CausalLMOutputWithPast(loss=loss, logits=log_probs, **{CACHE: seen})

    def _asked_for(self, input_ids: torch.Tensor | None, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return the token ids; raise TypeError for what keywords or config ask of `forward` and it cannot give."""
        said = {name: kwargs.get(name) for name in _INNER_OUTPUTS}
        inner = [name for name, on in said.items() if (getattr(self.config, name, False) if on is None else on)]
        if inner:
            raise TypeError(
                f"{' and '.join(inner)}: each expert has its own, and an ensemble none; run one expert, as in "
                "`with ensemble.experts.expert(0) as model: model(...)`"
            )
        # A switch that is off asks for nothing.
        asked = {name for name, value in kwargs.items() if value is not None and value is not False}
        unknown = sorted(asked - {"cache_position"})
        if unknown:
            raise TypeError(f"an ensemble's forward does not know {', '.join(unknown)}: leave them out")
        if input_ids is None:
            raise TypeError("input_ids is missing: an ensemble reads token ids, as its experts share no embedding")
        return input_ids

    def _check_loss(self, kept: slice | torch.Tensor) -> None:
        """Raise ValueError where there is no loss, or nobody to learn from it."""
        if self.config.combine == "vote":
            raise ValueError('combine="vote" has no loss: its distribution is 0 off the vote; use "prob" or "logprob"')
        if kept != slice(0, None):
            raise ValueError("labels need the logits of every position: leave logits_to_keep out")
        if self.training and torch.is_grad_enabled() and not any(weight.requires_grad for weight in self.parameters()):
            raise ValueError(
                "the ensemble is in training mode but its experts are frozen, so that this loss teaches nobody: train "
                "experts with BoostingTrainer and students with StudentTrainer; call eval() to measure; or unfreeze "
                "with requires_grad_()"
            )

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *, fused: bool = True, **kwargs: Any) -> Any:
        """Generate token ids as any transformers model does.

        Plain greedy decoding and sampling with temperature, top-k, top-p and min-p end each step in one fused op
        (`ops.mixture_sample`); anything else takes transformers' own loops. Prompt and answer together are never
        longer than the shortest context of the experts: generation stops there, with a warning **[choice]**.

        What the call leaves open is taken from the ensemble's `generation_config`, as for any transformers model. It
        is a copy of expert 1's, with everything that stands there: sampling, a repetition penalty (Qwen2.5 comes with
        one), several end tokens, each of which ends a text. To do without, set it on the ensemble, e.g.
        `ensemble.generation_config.repetition_penalty = 1.0`.

        Args:
            inputs: int64 [B, length] prompts, or pass `input_ids`; left-padded if their lengths differ.
            fused: False always takes transformers' own loops.
            kwargs: as for `transformers.GenerationMixin.generate`. A cache may be called `cache` or
                `past_key_values`, whatever transformers calls it.

        Raises:
            FloatingPointError: an expert gives NaN, +inf or no finite logit for a text that has not ended, on any
                path; names row (from 0, of the prompts) and expert.
            TypeError: `inputs_embeds`; both `cache` and `past_key_values`, or something else than a cache.
            ValueError: beam search with `combine="vote"`; a prompt that fills an expert's context; ids outside the
                vocabulary; a `cache_implementation`; a cache of another model, other experts or rows, or one that
                leaves no token of the prompt to read.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise TypeError("inputs_embeds: the experts of an ensemble share no embedding; give input_ids")
        call = self.snapshot()
        cache = _own_cache(**{name: kwargs.pop(name, None) for name in ("cache", "past_key_values")})
        settings = call._settings(kwargs)
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None:
            kwargs |= call._length_arguments(prompt, kwargs.get("attention_mask"), cache, settings)
        if (settings.num_beams or 1) > 1 and call.config.combine == "vote":
            raise ValueError(
                'combine="vote" cannot rank beams: it gives one token all the mass; use "prob" or "logprob"'
            )
        if cache is None and settings.use_cache is not False:
            cache = call.new_cache()
        if cache is not None:
            kwargs[CACHE] = cache
        call._fused, call._prompts = fused, 1 if prompt is None else len(prompt)
        return GenerationMixin.generate(call, inputs, **kwargs)

    def row_names(self, count: int) -> list[str]:
        """Return what messages call the rows of a batch; within `generate`, several rows may go on from one prompt."""
        copies = max(1, count // (self._prompts or count or 1))
        return [f"row {row // copies} of the batch" for row in range(count)]

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode greedily or by sampling: what transformers' `generate` calls once everything is prepared."""
        # What the fused op cannot do (another logits processor, returned scores, no cache) goes to transformers' own
        # loop, which draws from the same distribution. `tokenizer` has done its work in the stopping criteria.
        sampling = Sampling.from_processors(logits_processor, bool(generation_config.do_sample))
        cached = isinstance(model_kwargs.get(CACHE), EnsembleCache)
        general = synced_gpus or generation_config.return_dict_in_generate or not cached or not self._fused
        if general or sampling is None:
            prepared = logits_processor, stopping_criteria, generation_config
            return super()._sample(input_ids, *prepared, synced_gpus, streamer, **model_kwargs)
        names = self.row_names(len(input_ids))
        return fused_sample(
            self, input_ids, names, sampling, stopping_criteria, generation_config, streamer, **model_kwargs
        )

    def _settings(self, kwargs: dict[str, Any]) -> GenerationConfig:
        """Return what `generate` will make of its arguments, and take out a `cache_implementation` that is ours."""
        settings = copy.deepcopy(self.generation_config)
        given = kwargs.get("generation_config")
        if given is not None:
            settings.update(**{name: value for name, value in given.to_dict().items() if value is not None})
        settings.update(**kwargs)
        # "dynamic_full" is what transformers before 5.24 names where an ensemble is an assistant.
        if settings.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise ValueError(
                f"cache_implementation={settings.cache_implementation!r} does not work with an ensemble, whose cache "
                "holds one dynamic cache per expert: leave it out"
            )
        if settings.cache_implementation is not None:
            # The default by its name, which transformers refuses beside the cache that it gets.
            kwargs.pop("cache_implementation", None)
            kwargs["generation_config"] = copy.deepcopy(given or self.generation_config)
            kwargs["generation_config"].cache_implementation = None
        return settings

    def label(
        self,
        questions: Any,
        processing_class: PreTrainedTokenizerBase,
        *,
        question_format: QuestionFormat | None = None,
        max_new_tokens: int = 32,
        batch_size: int = 32,
        sampling: Sampling | None = None,
        top_logprobs: int | None = None,
        top_temperature: float = 1.0,
        output_file: str | os.PathLike[str] | None = None,
        description: str | None = "labelling",
    ) -> Dataset:
        """Answer questions; the answers are pseudo-labels for a student (method, phase 3).

        Questions are decoded in batches of similar prompt length, which several processes share out; those with a
        column `choices` are answered by likelihood (`ensemw2s.inference.choices`) with one of their choices.

        Where `generate()` obeys the ensemble's `generation_config`, `label()` is greedy unless `sampling` says
        otherwise, whatever that config says of sampling and of lengths. Every end token id of the config, one or
        several, and the tokenizer's ends an answer. A setting that would change the distribution (a repetition penalty,
        n-grams that must not come again, bad words, suppressed or forced tokens, a least length, beams, ...) is
        refused. So `label()` and greedy `generate()` give the same tokens, up to the first end token.

        With `output_file`, finished rows are appended to it (JSON lines) as they come, and a later call goes on behind
        them, whatever its number of processes. Each process but the main one has a file of its own beside it, until all
        are done. What decides an answer is described in `<output_file>.run.json`: experts and base (by a hash of all
        their weights, which reads each once), expert weights, `combine`, questions, format, tokenizer, and the settings
        below. A later call that differs in any of it is refused. `batch_size` is no part of it: it moves answers only
        where two tokens tie to within rounding, which in 16 bits is not rare **[choice]**.

        Args:
            questions: columns `prompt` and optionally `choices` and `id`, in any shape that
                `ensemw2s.data.shapes.as_dataset` takes; an `answer` decides nothing but the `id` that is made where
                there is none.
            processing_class: the experts' tokenizer.
            question_format: how a question becomes tokens; None is the ensemble's own. Another one comes with a
                warning.
            max_new_tokens: the longest pseudo-answer, the format's `answer_prefix` and the end token included.
            batch_size: questions decoded together.
            sampling: how tokens are chosen; None is greedy. Question i (in the dataset's order) draws from seed
                `sampling.seed + i`, whatever batch it falls in.
            top_logprobs: keep the mixture's k likeliest tokens at every answer token, for a student of
                `variant="soft"`; None keeps none.
            top_temperature: divides each expert's logits in what `top_logprobs` keeps; it chooses no token.
            output_file: where to keep finished rows; `ensemw2s.inference.label_files.read_labels` reads it.
            description: the name of the progress bar; None shows none.

        Returns:
            One row per question, in the order of `questions`: `id`, `prompt`, `answer` (the text that the tokens add to
            the prompt, without the format's `answer_prefix`, special tokens and the end; its own white space is kept),
            `answer_ids` (list of int32, the chosen tokens, with whichever end token came: text may become other tokens
            again **[choice]**), `num_tokens` (their number), `finished` (an end token came in time), `confidence` (mean
            log-probability per token under the mixture, nats, before temperature and filters), `agreement` (share of
            (token, expert) pairs in which the expert gives the chosen token more than half of its probability)
            **[choice]** and `expert_agreement` (T floats, the same for each expert); with `top_logprobs`, for each
            answer token also `top_token_ids` (k int32) and `top_log_probs` (k float32, nats, falling; the other tokens
            have `1 - sum(exp)` together), and `top_temperature`. With choices there is a column `choices` too,
            `confidence` is the log (nats) of the answer's share of the choices' probability, so `exp(confidence)` is
            their softmax, and an expert agrees if it would choose the same.

        Raises:
            FloatingPointError: an expert gives NaN or no finite logit; names the questions.
            ValueError: `output_file` holds rows of another run (says what differs) or damaged ones (names file and
                line); a generation config that changes the distribution; `top_logprobs` is out of range, or the
                ensemble votes; the tokenizer is not the experts', or cannot turn tokens into text; a prompt and its
                answer do not fit the experts' context; `sampling` or `top_logprobs` for questions with choices; or
                answers that would have no end, because the format has no end token and there are no choices;
                questions that `check_questions` refuses; or a number outside its range.
            TypeError: questions in another shape; a number that is none, or not a whole one.
        """
        question_format, sampling = format_of(self, question_format), sampling or Sampling()
        settings = LabelSettings(question_format, max_new_tokens, batch_size, sampling, top_logprobs, top_temperature)
        return label_questions(
            self.snapshot(), questions, processing_class, settings, output_file=output_file, description=description
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        record: Mapping[str, Any] | None = None,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the ensemble to one folder, whole or not at all; `push_to_hub` does so first.

        What an ensemble that was saved there before consists of is replaced; everything else in the folder stays. A
        kill leaves the one or the other whole (see `ensemw2s.models.own_files`).

        Args:
            save_directory: a new folder, that of an ensemble, or one without a model.
            is_main_process: False writes nothing, as the main process does it.
            processing_class: the experts' tokenizer, saved along.
            record: a JSON-able account of the boosting run, saved as `boosting.json`.
            max_shard_size: the largest file of a whole model's weights, e.g. "2GB"; None leaves it to transformers.
            kwargs: other arguments of transformers' `save_pretrained`, at values that mean what is done anyway
                (`safe_serialization=True`, `state_dict=None`, ...).

        Raises:
            DiskFullError: the disk is full; what was at `save_directory` before is untouched.
            FileExistsError: another model, or a file that no ensemble of ours wrote, is in the way.
            PermissionError: the folder cannot be written.
            TypeError: a keyword that transformers' `save_pretrained` does not have.
            ValueError: `processing_class` knows tokens that the experts do not; a value of one of `kwargs` that an
                ensemble cannot honour.
        """
        check_saving_options(kwargs)
        if not is_main_process:
            return
        save_ensemble(self, save_directory, processing_class, record, max_shard_size)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the ensemble; see `transformers.PreTrainedModel.push_to_hub`.

        Raises:
            ValueError: the base model is referred to as a folder, which nobody else has.
        """
        if self.config.base is not None and Path(self.config.base["source"]).is_absolute():
            raise ValueError(
                f"the experts' base model is the folder {self.config.base['source']}, which nobody else has: build the "
                "ensemble without base_reference, so that its base is saved with it, or refer to a model on the hub"
            )
        return super().push_to_hub(repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: EnsembleConfig | None = None,
        subfolder: str = "",
        output_loading_info: bool = False,
        **model_init_kwargs: Any,
    ) -> Any:
        """Load a saved ensemble from a folder or the hub.

        A stranger's folder is safe to load: no code of its is run, nothing is unpickled, and what its files may ask for
        is an allow-list (see `ensemw2s.models.saved`).

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or a hub id.
            config: used in place of the saved one.
            subfolder: where in it the ensemble lies.
            output_loading_info: return the ensemble and transformers' account of what did not fit, which is empty:
                weights that are missing, too many or of other shapes are errors here.
            model_init_kwargs: `combine` and `expert_weights`, in place of the saved ones; others are passed on to each
                model's `from_pretrained` (`dtype`, `attn_implementation`, ...), but for `revision` and
                `force_download`, which concern the ensemble alone. `trust_remote_code` is off unless
                it is passed. `source` names the base model of adapters, if it is not where the ensemble says.

        Raises:
            FileNotFoundError: the folder, its base model, an expert's weights or a part of them are missing; names
                which.
            OSError: a file cannot be read.
            ValueError: weights or settings that are damaged, settings that are the caller's to make, or a number of
                expert weights other than that of the experts saved; names file and key, or the expert.
        """
        own = {name: model_init_kwargs.pop(name) for name in ("combine", "expert_weights") if name in model_init_kwargs}
        config, experts, generation_config = load_parts(
            pretrained_model_name_or_path, config, subfolder, model_init_kwargs
        )
        config.update(own)
        _check(config.expert_weights, config.combine, len(experts))
        ensemble = cls(config, experts)
        if generation_config is not None:
            ensemble.generation_config = generation_config
        if output_loading_info:
            kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
            return ensemble, {kind: [] if kind == "error_msgs" else set() for kind in kinds}
        return ensemble

    def _length_arguments(
        self, prompt: torch.Tensor, mask: torch.Tensor | None, cache: EnsembleCache | None, settings: GenerationConfig
    ) -> dict[str, int]:
        """Return the length arguments of `generate` that keep to the shortest context of the experts.

        Raises ValueError for a prompt that the experts cannot read, or that leaves nothing to read or to write.
        """
        self._check_ids(prompt)
        length, window = _longest(prompt, mask), self.config.max_position_embeddings
        if window is not None and length >= window:
            raise ValueError(
                f"the prompt has {length} tokens but expert {self._narrowest()} reads at most {window}, answer "
                "included: shorten the prompt"
            )
        seen = cache.get_seq_length() if cache is not None else 0
        total = prompt.shape[1] if mask is None else mask.shape[1]
        if seen and seen >= total:
            raise ValueError(
                f"the cache holds {seen} tokens and the prompt {total}, so none is left to read: pass the whole text "
                "as input_ids, or its new part with an attention_mask over the whole; or drop the cache's last token "
                "with cache.crop(-1)"
            )
        if window is None:
            return {}
        room = window - length
        if settings.max_new_tokens is not None:
            name, value, most = "max_new_tokens", settings.max_new_tokens, room
        else:
            name, value, most = "max_length", settings.max_length or 0, prompt.shape[1] + room
        if value <= most:
            return {}
        warnings.warn(
            f"{name}={value} reaches beyond the {window} tokens that expert {self._narrowest()} reads: generation "
            f"stops there, after at most {room} new tokens",
            stacklevel=4,
        )
        return {name: most}

    def _check_input(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: EnsembleCache | None
    ) -> None:
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_ids(input_ids)
        window = self.config.max_position_embeddings
        length = input_ids.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        # Padding is counted only where it may matter: on a GPU, looking at the mask waits for it.
        if window is not None and length > window:
            length = _longest(input_ids, attention_mask) if attention_mask is not None else length
            if length > window:
                raise ValueError(
                    f"the text has {length} tokens but expert {self._narrowest()} reads at most {window}: shorten it"
                )

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        if not input_ids.numel():
            return
        low, high = (int(value) for value in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"input_ids holds {low if low < 0 else high}, but the experts' vocabulary has "
                f"{self.config.vocab_size} tokens, numbered from 0: encode the text with the experts' own tokenizer"
            )

    def _narrowest(self) -> int:
        """Return the number, from 1, of the expert with the shortest context."""
        lengths = context_lengths(self.experts)
        return min(lengths, key=lengths.__getitem__) + 1


def _longest(input_ids: torch.Tensor, mask: torch.Tensor | None) -> int:
    """Return the number of tokens of the longest row, padding left out."""
    return input_ids.shape[1] if mask is None else int(mask.sum(1).max())


@torch.compiler.disable
def _new_cache(experts: Experts) -> EnsembleCache:
    return EnsembleCache(experts)


def _own_cache(**given: Any) -> EnsembleCache | None:
    """Return the one cache among the arguments that may hold one; None for an empty one of transformers' own."""
    caches = {name: cache for name, cache in given.items() if cache is not None}
    if len(caches) > 1:
        raise TypeError(f"{' and '.join(caches)} are two names of one argument: give one of them")
    for name, cache in caches.items():
        if isinstance(cache, EnsembleCache):
            return cache
        if not isinstance(cache, Cache):
            raise TypeError(
                f"{name} is a {type(cache).__name__}: expected an EnsembleCache, as of ensemble.new_cache()"
            )
        if cache.get_seq_length():
            raise ValueError(
                f"{name} is a filled {type(cache).__name__}: an ensemble needs the EnsembleCache that it returned, or "
                "the one from ensemble.new_cache()"
            )
    return None


@torch.compiler.disable
def _require_numbers(
    log_probs: torch.Tensor, logits: Sequence[torch.Tensor], mask: torch.Tensor | None, names: Sequence[str]
) -> None:
    """Raise FloatingPointError where a distribution, [B, L, V], is none, leaving out padding."""
    # All of a distribution is NaN or none of it.
    valid = ~log_probs[..., 0].isnan()
    if mask is not None and mask.dim() == 2:
        valid |= (mask == 0).to(valid.device)
    require_valid(valid, names, logits)


# Every call has a stacked model of its own, which would be compiled anew.
@torch.compiler.disable
def _stacked_logits(stacked: StackedExperts, cache: Cache, inputs: dict[str, Any]) -> Sequence[torch.Tensor]:
    """Run stacked experts in one forward pass and return the logits of each."""
    repeated = repeat_rows(inputs, stacked.count)
    with stacked.model() as model:
        logits = model(**repeated, **{CACHE: cache}).logits
    count(stacked.base, repeated["input_ids"], repeated["attention_mask"], logits.shape[:-1].numel())
    return logits.unflatten(0, (stacked.count, -1)).unbind(0)


def _check(expert_weights: Sequence[float], combine: str, num_experts: int) -> None:
    if num_experts == 0:
        raise ValueError("an ensemble needs at least one expert, got none")
    if len(expert_weights) != num_experts:
        raise ValueError(f"expert_weights has {len(expert_weights)} values for {num_experts} experts: give one each")
    bad = [weight for weight in expert_weights if not 0 < weight < float("inf")]
    if bad:
        raise ValueError(f"expert_weights must be positive and finite, got {bad[0]}: leave such an expert out")
    if combine not in COMBINES:
        raise ValueError(f"combine must be one of {', '.join(COMBINES)}, got {combine!r}")


AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig)
AutoModelForCausalLM.register(EnsembleConfig, TokenEnsemble)
