"""Token-by-token decoding of a mixture that ends every step in one fused op, and pseudo-answers made with it."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ensemw2s import ops
from ensemw2s.inference.reading import read_prompts, run_experts
from ensemw2s.models.loading import CACHE, check_processing_class
from ensemw2s.models.mixture import damaged, expert_names, refuse_damaged
from ensemw2s.runtime.values import Uses, check_fields, check_in_use, shown

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedTokenizerBase

    from ensemw2s.models.mixture import Mixture


# Settings of a generation config that play no part in `label`: how `generate` samples (`label` is told by `sampling`),
# how long its texts are (`max_new_tokens`), how it computes, what it returns, what is for beams or assistants alone.
_NO_PART_IN_LABELS = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "max_length", "max_new_tokens", "early_stopping", "length_penalty", "use_cache", "cache_implementation",
    "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory", "compile_config", "disable_compile",
    "continuous_batching_config", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
    "renormalize_logits", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "transformers_version",
}  # fmt: skip
# These do nothing at 1.
_ONE_DOES_NOTHING = {
    "repetition_penalty", "encoder_repetition_penalty", "num_beams", "num_beam_groups", "num_return_sequences",
    "guidance_scale",
}  # fmt: skip
# With every other setting, 0 does nothing.
_ZERO_DOES_SOMETHING = {"forced_bos_token_id", "forced_eos_token_id", "max_time"}
_USES_OF_FILTERS: Uses = dict.fromkeys(
    ("top_k", "top_p", "min_p"),
    (lambda sampling: sampling.temperature > 0, "a temperature above 0 (0 takes the likeliest token)"),
)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the mixture; the defaults are greedy. Filters act in the order of the fields.

    Of several questions, number i draws from `seed + i`. Greedy decoding draws nothing.

    Raises:
        ValueError: a value out of its range, or a filter beside a temperature of 0, where it has no effect.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, numbers.Integral) and not isinstance(self.seed, bool):
            # NumPy's, too.
            object.__setattr__(self, "seed", int(self.seed))
        check_fields(self)
        check_in_use(self, _USES_OF_FILTERS)

    @classmethod
    def from_processors(cls, processors: LogitsProcessorList, do_sample: bool) -> Sampling | None:
        """Read transformers' warpers; None if there is anything that the fused op does not do, or in another order."""
        if not do_sample:
            return cls() if not processors else None
        names: dict[type, str] = {
            TemperatureLogitsWarper: "temperature",
            TopKLogitsWarper: "top_k",
            TopPLogitsWarper: "top_p",
            MinPLogitsWarper: "min_p",
        }
        kinds = [type(processor) for processor in processors]
        if kinds != [kind for kind in names if kind in kinds]:
            return None
        # A warper that keeps more than one token at least does something else than the op.
        if any(getattr(processor, "min_tokens_to_keep", 1) != 1 for processor in processors):
            return None
        values = {names[type(p)]: getattr(p, names[type(p)]) for p in processors}
        return cls(**{"temperature": 1.0, **values})


class MixtureDecoder:
    """One batch being decoded: every expert's cache, the attention mask, and the step counter.

    Args:
        ensemble: T models with their weights.
        input_ids: int64 [B, length], left-padded prompts, or the part of them that `cache` does not hold.
        attention_mask: int64 [B, length of the whole prompts].
        seeds: int64 [B]; row b's draws depend on seeds[b] and the step alone.
        sampling: how tokens are chosen.
        cache: an empty cache, or one that already holds the beginning of the prompts.
    """

    def __init__(
        self,
        ensemble: Mixture,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        seeds: torch.Tensor,
        sampling: Sampling,
        cache: Cache | None = None,
    ) -> None:
        self.ensemble = ensemble
        self.attention_mask = attention_mask
        self.seeds = seeds
        self.sampling = sampling
        self.cache = ensemble.new_cache() if cache is None else cache
        self.expert_weights = ensemble.mixture_weights(input_ids.device)
        # The prompt may be the whole text, or only what follows the text that the cache holds.
        self.pending = input_ids[:, self.cache.get_seq_length() - attention_mask.shape[1] :]
        self.position = 0

    def logits(self) -> list[torch.Tensor]:
        """Run the experts on what they have not seen and return their T logits [B, V] for the next token."""
        is_first = self.cache.get_seq_length() == 0
        read = read_prompts if is_first else run_experts
        logits = read(self.ensemble, self.pending, self.attention_mask, self.cache)
        return [row[:, -1] for row in logits]

    def choose(self, logits: list[torch.Tensor]) -> Any:
        """Choose B tokens from the mixture: `ops.mixture_sample`'s named tuple."""
        return ops.mixture_sample(
            logits,
            self.expert_weights,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
            seeds=self.seeds,
            positions=torch.full_like(self.seeds, self.position),
            combine=self.ensemble.config.combine,
        )

    def append(self, tokens: torch.Tensor) -> None:
        """Make `tokens` (int64 [B]) the next input of every expert."""
        self.pending = tokens[:, None]
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.attention_mask[:, :1])], dim=1)
        self.position += 1


def require_valid(valid: torch.Tensor, names: Sequence[str], logits: Sequence[torch.Tensor]) -> None:
    """Raise FloatingPointError, naming rows and experts, unless all of `valid`, bool [B] or [B, L], is true.

    `names` are what messages call the B rows; `logits`, T of [B, V] or [B, L, V], tell which experts are damaged.
    """
    if bool(valid.all()):
        return
    bad = ~valid
    damage = (damaged(logits) & bad.to(logits[0].device)).reshape(len(logits), len(bad), -1).any(-1)
    refuse_damaged(damage, expert_names(range(len(logits))), names)
    rows = [name for name, is_bad in zip(names, bad.reshape(len(bad), -1).any(-1).tolist(), strict=True) if is_bad]
    raise FloatingPointError(
        f"the experts' mixture gives no token a probability for {', '.join(rows[:5])}{' and more' * (len(rows) > 5)}: "
        'every token is impossible for one of them; combine them by "prob"'
    )


def require_tokenizer(processing_class: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ValueError unless every token of `processing_class`, its end token above all, is one that models know.

    TypeError if it is no tokenizer.
    """
    check_processing_class(processing_class)
    end = processing_class.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end token, so no answer could end: set processing_class.eos_token")
    largest = max([end, *processing_class.get_vocab().values()])
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer has token ids up to {largest} (end token {end}), but the model's vocabulary has "
            f"{vocab_size} tokens, numbered from 0: pass the tokenizer that the model was trained with, or make "
            "room for it before training (model.resize_token_embeddings(len(tokenizer)))"
        )


def fused_sample(
    mixture: Mixture,
    input_ids: torch.Tensor,
    names: Sequence[str],
    sampling: Sampling,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Decode in place of transformers' sampling loop, writing no distribution over the vocabulary.

    Args:
        mixture: T models with their weights.
        input_ids: int64 [B, length].
        names: what messages call the B rows.
        sampling: how tokens are chosen.
        stopping_criteria: transformers', called with the tokens so far and no scores.
        generation_config: as transformers' `generate` has prepared it.
        streamer: is given each step's tokens.
        model_kwargs: the attention mask, if there is padding, and a cache of the mixture's.

    Returns:
        int64 [B, length + steps]; rows that have ended are padded.
    """
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        # `generate` drops a mask without padding, and notes how long it was.
        length = getattr(generation_config, "_mask_length", None) or input_ids.shape[1]
        mask = input_ids.new_ones(len(input_ids), length)
    seeds = ops.draw_seeds(len(input_ids), input_ids.device)
    decoder = MixtureDecoder(mixture, input_ids, mask, seeds, sampling, model_kwargs[CACHE])
    pad = generation_config._pad_token_tensor
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while bool(running.any()):
        logits = decoder.logits()
        choice = decoder.choose(logits)
        require_valid(choice.valid | ~running, names, logits)
        tokens = choice.tokens if pad is None else torch.where(running, choice.tokens, pad)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        running &= ~stopping_criteria(input_ids, None)
        decoder.append(tokens)
    if streamer is not None:
        streamer.end()
    return input_ids


def require_plain(generation_config: GenerationConfig) -> None:
    """Raise ValueError, naming it, for a setting with which `generate` would not draw from the mixture itself."""
    known = vars(GenerationConfig())
    for name, value in vars(generation_config).items():
        if name.startswith("_") or name not in known or name in _NO_PART_IN_LABELS:
            continue
        nothing = 1.0 if name in _ONE_DOES_NOTHING else None
        zero_counts = name in _ZERO_DOES_SOMETHING and value is not None
        if (value or zero_counts) and value != nothing:
            raise ValueError(
                f"ensemble.generation_config.{name} is {shown(value)} (it began as a copy of expert 1's generation "
                "config). generate() obeys it, label() asks for the mixture itself and does not: to label, set "
                f"ensemble.generation_config.{name} = {nothing} (in a saved ensemble, in its generation_config.json)"
            )
