"""Token-by-token decoding of an ensemble that ends every step in one fused op, and pseudo-answers made with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ensemw2s import ops, processes
from ensemw2s.choices import choose_answers, tokenize_choices
from ensemw2s.claims import one_at_a_time
from ensemw2s.data import PromptCollator, QuestionFormat, tokenize_prompts
from ensemw2s.distillation import TOP_COLUMNS, top_tokens
from ensemw2s.experts import damaged, expert_names, refuse_damaged
from ensemw2s.identity import describe_experts, digest_columns, digest_tokenizer, digest_values
from ensemw2s.label_files import LabelFile, packed_row, short, unpacked_row
from ensemw2s.models import CACHE
from ensemw2s.tokens import end_tokens, require_readable
from ensemw2s.values import check_fields, check_number

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.ensemble import EnsembleCache, TokenEnsemble

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
# An expert that gives a token more than half of its probability has it as its argmax, whatever the rest is.
_AGREES = 0.5


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the mixture; the defaults are greedy. Filters act in the order of the fields."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_processors(cls, processors: LogitsProcessorList, do_sample: bool) -> Sampling | None:
        """Read transformers' warpers; None if there is anything that the fused op does not do, or in another order."""
        if not do_sample:
            return cls() if not processors else None
        known = [
            (TemperatureLogitsWarper, "temperature"),
            (TopKLogitsWarper, "top_k"),
            (TopPLogitsWarper, "top_p"),
            (MinPLogitsWarper, "min_p"),
        ]
        order = [kind for kind, _ in known]
        kinds = [type(processor) for processor in processors]
        if any(kind not in order for kind in kinds) or kinds != sorted(set(kinds), key=order.index):
            return None
        # A warper that keeps more than one token at least does something else than the op.
        if any(getattr(processor, "min_tokens_to_keep", 1) != 1 for processor in processors):
            return None
        names = dict(known)
        values = {names[type(p)]: getattr(p, names[type(p)]) for p in processors}
        return cls(**{"temperature": 1.0, **values})


class MixtureDecoder:
    """One batch being decoded: every expert's cache, the attention mask, and the step counter.

    Args:
        ensemble: T experts with their weights.
        input_ids: int64 [B, length], left-padded prompts, or the part of them that `cache` does not hold.
        attention_mask: int64 [B, length of the whole prompts].
        seeds: int64 [B]; row b's draws depend on seeds[b] and the step alone.
        sampling: how tokens are chosen.
        cache: an empty cache, or one that already holds the beginning of the prompts.
    """

    def __init__(
        self,
        ensemble: TokenEnsemble,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        seeds: torch.Tensor,
        sampling: Sampling,
        cache: EnsembleCache | None = None,
    ) -> None:
        self.ensemble = ensemble
        self.attention_mask = attention_mask
        self.seeds = seeds
        self.sampling = sampling
        self.cache = ensemble.new_cache() if cache is None else cache
        self.weights = ensemble.mixture_weights(input_ids.device)
        # The prompt may be the whole text, or only what follows the text that the cache holds.
        self.pending = input_ids[:, self.cache.get_seq_length() - attention_mask.shape[1] :]
        self.position = 0

    def logits(self) -> list[torch.Tensor]:
        """Run the experts on what they have not seen and return their T logits [B, V] for the next token."""
        places = (self.attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -self.pending.shape[1] :]
        logits = self.ensemble.expert_logits(
            range(self.ensemble.num_experts),
            self.pending,
            self.attention_mask,
            position_ids=places,
            cache=self.cache,
            last_only=True,
        )
        return [row[:, -1] for row in logits]

    def choose(self, logits: list[torch.Tensor]) -> Any:
        """Choose B tokens from the mixture: `ops.mixture_sample`'s named tuple."""
        positions = torch.full_like(self.seeds, self.position)
        return ops.mixture_sample(
            logits,
            self.weights,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
            seeds=self.seeds,
            positions=positions,
            combine=self.ensemble.config.combine,
        )

    def step(self) -> Any:
        """Run the experts and choose B tokens; see `choose`."""
        return self.choose(self.logits())

    def append(self, tokens: torch.Tensor) -> None:
        """Make `tokens` (int64 [B]) the next input of every expert."""
        self.pending = tokens[:, None]
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.attention_mask[:, :1])], dim=1)
        self.position += 1


def require_valid(valid: torch.Tensor, names: Sequence[str], logits: Sequence[torch.Tensor]) -> None:
    """Raise FloatingPointError, naming rows and experts, unless all rows are valid.

    Args:
        valid: bool [B] or [B, L]: the mixture is a distribution there.
        names: what messages call the B rows.
        logits: of T experts, [B, V] or [B, L, V].
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


def require_tokenizer(ensemble: TokenEnsemble, processing_class: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token of `processing_class`, its end token above all, is one that experts know."""
    size, end = ensemble.config.vocab_size, processing_class.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end token, so no answer could end: set processing_class.eos_token")
    largest = max([end, *processing_class.get_vocab().values()])
    if largest >= size:
        raise ValueError(
            f"the tokenizer has token ids up to {largest} (end token {end}), but the experts' vocabulary has {size} "
            "tokens, numbered from 0: pass the tokenizer that the experts were trained with"
        )


def require_room(ensemble: TokenEnsemble, prompts: Dataset, max_new_tokens: int) -> None:
    """Raise ValueError, naming the question, if a prompt and its answer do not fit the experts' context together."""
    window = ensemble.config.max_position_embeddings
    for row in prompts if window is not None else ():
        length = len(row["input_ids"])
        if length + max_new_tokens > window:
            raise ValueError(
                f"question {row['id']!r} has {length} tokens, which with max_new_tokens={max_new_tokens} is beyond the "
                f"{window} that the experts read: leave it out, or lower max_new_tokens"
            )


def fused_sample(
    model: TokenEnsemble,
    input_ids: torch.Tensor,
    sampling: Sampling,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Decode in place of transformers' sampling loop, writing no distribution over the vocabulary.

    Args:
        model: the ensemble.
        input_ids: int64 [B, length].
        sampling: how tokens are chosen.
        stopping_criteria: transformers', called with the tokens so far and no scores.
        generation_config: as transformers' `generate` has prepared it.
        streamer: is given each step's tokens.
        model_kwargs: the attention mask, if there is padding, and an `EnsembleCache`.

    Returns:
        int64 [B, length + steps]; rows that have ended are padded.
    """
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        # `generate` drops a mask without padding, and notes how long it was.
        length = getattr(generation_config, "_mask_length", None) or input_ids.shape[1]
        mask = input_ids.new_ones(len(input_ids), length)
    decoder = MixtureDecoder(
        model,
        input_ids,
        mask,
        ops.draw_seeds(len(input_ids), input_ids.device),
        sampling,
        model_kwargs[CACHE],
    )
    pad = generation_config._pad_token_tensor
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    names = model.row_names(len(input_ids))
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


def require_distinct(ids: Sequence[Any]) -> None:
    """Raise ValueError, naming it, if an id is there twice: one of its questions would get the other's answer."""
    seen: set[Any] = set()
    for row_id in ids:
        if row_id in seen:
            raise ValueError(f"questions has the id {row_id!r} more than once: ids must be unique")
        seen.add(row_id)


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
                f"ensemble.generation_config.{name} is {short(value)} (it began as a copy of expert 1's generation "
                "config). generate() obeys it, label() asks for the mixture itself and does not: to label, set "
                f"ensemble.generation_config.{name} = {nothing} (in a saved ensemble, in its generation_config.json)"
            )


@one_at_a_time("output_file")
def label_questions(
    ensemble: TokenEnsemble,
    questions: Dataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    question_format: QuestionFormat | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    sampling: Sampling | None = None,
    seed: int = 0,
    top_logprobs: int | None = None,
    top_temperature: float = 1.0,
    output_file: str | os.PathLike[str] | None = None,
    description: str | None = "labelling",
) -> Dataset:
    """Let the ensemble answer questions; the answers are pseudo-labels for a student (method, phase 3).

    Questions are decoded in batches of similar prompt length, which several processes share out; those with a column
    `choices` are answered by likelihood (`ensemw2s.choices`) with one of their choices.

    **The rule for `generate()` and `label()`.** `generate()` obeys the ensemble's `generation_config` (a copy of expert
    1's), as any transformers model does. `label()` is greedy unless `sampling` says otherwise, whatever that config
    says of sampling and of lengths. Every end token id of the config, one or several, and the tokenizer's ends an
    answer. A setting that would change the distribution (a repetition penalty, n-grams that must not come again, bad
    words, suppressed or forced tokens, a least length, beams, ...) is refused. So `label()` and greedy `generate()`
    give the same tokens, up to the first end token.

    With `output_file`, finished rows are appended to it (JSON lines) as they come, and a later call goes on behind
    them, whatever its number of processes. Each process but the main one has a file of its own beside it, until all are
    done. What decides an answer is described in `<output_file>.run.json`: experts and base (by a hash of all their
    weights, which reads each once), expert weights, `combine`, questions, format, tokenizer, and the settings below. A
    later call that differs in any of it is refused. `batch_size` is no part of it: it moves answers only where two
    tokens tie to the last bits **[choice]**.

    Args:
        ensemble: T experts with their weights.
        questions: columns `prompt`, `id` and optionally `choices`; any `answer` is ignored.
        processing_class: the experts' tokenizer.
        question_format: how a question becomes tokens; None is the default format.
        max_new_tokens: the longest pseudo-answer, its end token included.
        batch_size: questions decoded together.
        sampling: how tokens are chosen; None is greedy.
        seed: question i (in the dataset's order) draws from seed `seed + i`, whatever batch it falls in.
        top_logprobs: keep the mixture's k likeliest tokens at every answer token, for a student of
            `variant="soft"`; None keeps none.
        top_temperature: divides each expert's logits in what `top_logprobs` keeps; it chooses no token.
        output_file: where to keep finished rows; `label_files.read_labels` reads it.
        description: the name of the progress bar; None shows none.

    Returns:
        One row per question, in the order of `questions`: `id`, `prompt`, `answer` (the text that the tokens add to the
        prompt, without the format's `answer_prefix`, special tokens and the end; its own white space is kept),
        `answer_ids` (list of int32, the chosen tokens, with whichever end token came: text may become other tokens
        again **[choice]**), `num_tokens` (their number), `finished` (an end token came in time), `confidence` (mean
        log-probability per token under the mixture, nats, before temperature and filters), `agreement` (share of
        (token, expert) pairs in which the expert gives the chosen token more than half of its probability) **[choice]**
        and `expert_agreement` (T floats, the same for each expert); with `top_logprobs`, for each answer token also
        `top_token_ids` (k int32) and `top_log_probs` (k float32, nats, falling; the other tokens have
        `1 - sum(exp)` together), and `top_temperature`. With choices there is a column `choices` too, `confidence` is
        the log (nats) of the answer's share of the choices' probability, so `exp(confidence)` is their softmax, and an
        expert agrees if it would choose the same.

    Raises:
        FloatingPointError: an expert gives NaN or no finite logit; names the questions.
        ValueError: `output_file` holds rows of another run (says what differs) or damaged ones (names file and line);
            a generation config that changes the distribution; `top_logprobs` is out of range, or the ensemble votes;
            the tokenizer is not the experts', or cannot turn tokens into text; a prompt and its answer do not fit the
            experts' context; `sampling` or `top_logprobs` for questions with choices; or answers that would have no
            end, because the format has no end token and there are no choices; ids that are there twice; or a number
            outside its range.
    """
    numbers = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "top_logprobs": top_logprobs}
    for name, value in numbers.items():
        if name != "top_logprobs" or value is not None:
            check_number(name, value, whole=True)
    check_number("seed", seed, "first_seed", whole=True)
    check_number("top_temperature", top_temperature)
    if top_logprobs is None and top_temperature != 1:
        raise ValueError(
            f"top_temperature={top_temperature} does nothing without top_logprobs: set it, or leave both out"
        )
    require_tokenizer(ensemble, processing_class)
    if len(questions) == 0:
        raise ValueError("there are no questions to label: expected at least one")
    question_format = question_format or QuestionFormat()
    prompts = tokenize_prompts(questions, processing_class, question_format, "questions", max_new_tokens)
    choices = None
    decoding: dict[str, Any] = {}
    if "choices" in questions.column_names:
        if sampling not in (None, Sampling()) or top_logprobs is not None:
            raise ValueError(
                f"questions with choices are answered by likelihood, with neither sampling ({sampling}) nor "
                f"top_logprobs ({top_logprobs}): leave both out"
            )
        choices = tokenize_choices(questions, processing_class, question_format)
    elif question_format.end_token:
        require_room(ensemble, prompts, max_new_tokens)
        require_plain(ensemble.generation_config)
        require_readable(question_format.prompt(questions[0]["prompt"], processing_class))
        decoding = {
            "max_new_tokens": max_new_tokens,
            "sampling": sampling or Sampling(),
            "seed": seed,
            "top": None if top_logprobs is None else (top_logprobs, top_temperature),
            "ends": end_tokens(processing_class, ensemble.generation_config),
        }
    else:
        raise ValueError(
            "the format has end_token=False, so that decoded answers would have no end: use end_token=True, or give "
            "the questions a column `choices`"
        )

    def describe() -> dict[str, Any]:
        tokens = list(prompts["input_ids"]) if choices is None else [[row.prompt, row.choices] for row in choices]
        return _description(ensemble, questions, processing_class, question_format, tokens, decoding)

    def answer(batch: list[int]) -> Iterator[dict[str, Any]]:
        if choices is None:
            return _label_batch(ensemble, questions, prompts, batch, processing_class, question_format, decoding)
        return choose_answers(ensemble, questions, choices, batch, processing_class)

    require_distinct(prompts["id"])
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]["input_ids"]), i))
    # Batches are cut before finished rows are left out, so that a continued run meets the same batches.
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    file = None if output_file is None else LabelFile(Path(output_file), describe, questions)
    rows = _answered(prompts["id"], batches, answer, file, description)
    from datasets import Dataset

    return Dataset.from_list([rows[row_id] for row_id in prompts["id"]])


def _description(
    ensemble: TokenEnsemble,
    questions: Dataset,
    processing_class: PreTrainedTokenizerBase,
    question_format: QuestionFormat,
    tokens: list[Any],
    decoding: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what decides the answers, as plain JSON; `decoding` is empty where they are choices."""
    columns = [name for name in ("id", "prompt", "choices") if name in questions.column_names]
    found = {
        **describe_experts(ensemble.experts),
        "expert_weights": list(ensemble.config.expert_weights),
        "combine": ensemble.config.combine,
        "questions": digest_columns(questions, columns),
        "format": asdict(question_format),
        "tokenizer": digest_tokenizer(processing_class),
        "prompt_tokens": digest_values(tokens),
    }
    if decoding:
        sampling = decoding["sampling"]
        found |= {
            "max_new_tokens": decoding["max_new_tokens"],
            "sampling": asdict(sampling),
            # Greedy answers draw nothing.
            "seed": decoding["seed"] if sampling.temperature > 0 else None,
            "top_logprobs": decoding["top"] and decoding["top"][0],
            "top_temperature": decoding["top"] and float(decoding["top"][1]),
            "end_tokens": decoding["ends"],
        }
    return found


def _answered(
    ids: Sequence[str],
    batches: list[list[int]],
    answer: Callable[[list[int]], Iterator[dict[str, Any]]],
    file: LabelFile | None,
    description: str | None,
) -> dict[str, dict[str, Any]]:
    """Return a row for every question, by its id, from `file` or made by `answer`; processes share the batches out."""
    found, digest = ([], "") if file is None else processes.on_main(file.resume)
    rows = {row["id"]: unpacked_row(row) for row in found}
    todo = processes.share([batch for batch in batches if any(ids[i] not in rows for i in batch)])
    mine: dict[str, dict[str, Any]] = {}
    bar = tqdm(
        total=len(rows) + sum(len(batch) for batch in todo),
        initial=len(rows),
        desc=description,
        unit="question",
        leave=False,
        disable=description is None or not processes.is_main(),
    )
    for batch in todo:
        fresh = [row for row in answer(batch) if row["id"] not in rows]
        mine.update((row["id"], row) for row in fresh)
        if file is not None:
            file.append(map(packed_row, fresh), digest, processes.index())
        bar.update(len(fresh))
    bar.close()
    for share in processes.gather(mine):
        rows |= share
    if file is not None and processes.count() > 1:
        order = [ids[i] for batch in batches for i in batch]
        processes.on_main(file.join, [packed_row(rows[row_id]) for row_id in order], digest)
    return rows


@torch.no_grad()
def _label_batch(
    ensemble: TokenEnsemble,
    questions: Dataset,
    prompts: Dataset,
    batch: list[int],
    processing_class: PreTrainedTokenizerBase,
    question_format: QuestionFormat,
    decoding: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    device, top = ensemble.device, decoding["top"]
    pad = processing_class.eos_token_id
    ends = torch.tensor(decoding["ends"], device=device)
    inputs = PromptCollator(pad)([{"input_ids": prompts[i]["input_ids"]} for i in batch])
    seeds = torch.tensor([decoding["seed"] + i for i in batch], dtype=torch.int64, device=device)
    decoder = MixtureDecoder(
        ensemble,
        inputs["input_ids"].to(device),
        inputs["attention_mask"].to(device),
        seeds,
        decoding["sampling"],
    )
    running = torch.ones(len(batch), dtype=torch.bool, device=device)
    tokens, log_probs, agreement, counted, kept = [], [], [], [], []
    for _ in range(decoding["max_new_tokens"]):
        logits = decoder.logits()
        choice = decoder.choose(logits)
        require_valid(choice.valid | ~running, [f"question {prompts[i]['id']!r}" for i in batch], logits)
        tokens.append(choice.tokens)
        log_probs.append(choice.log_probs)
        agreement.append((choice.expert_log_probs.exp() > _AGREES).double())
        counted.append(running.clone())
        if top is not None:
            kept.append(top_tokens(ensemble, logits, *top))
        running &= ~torch.isin(choice.tokens, ends)
        if not bool(running.any()):
            break
        # Rows that are done repeat an end token: it is in no other row's context.
        decoder.append(torch.where(running, choice.tokens, pad))
    mask = torch.stack(counted, 1)
    length = mask.sum(1)
    confidence = (torch.stack(log_probs, 1).double() * mask).sum(1) / length
    shares = (torch.stack(agreement, 2) * mask).sum(2) / length
    ids = torch.stack(tokens, 1).int().cpu().numpy()
    caches = [torch.stack(parts, 1).cpu().numpy() for parts in zip(*kept, strict=True)]
    for row, i in enumerate(batch):
        count, finished = int(length[row]), not bool(running[row])
        prompt = question_format.prompt(questions[i]["prompt"], processing_class)
        answer = ids[row, : count - finished].tolist()
        cache = {name: values[row, :count] for name, values in zip(TOP_COLUMNS, caches, strict=True)} if top else {}
        yield {
            "id": prompts[i]["id"],
            "prompt": questions[i]["prompt"],
            "answer": question_format.answer_text(answer, prompt),
            "answer_ids": ids[row, :count],
            "num_tokens": count,
            "finished": finished,
            "confidence": float(confidence[row]),
            "agreement": float(shares[:, row].mean()),
            "expert_agreement": shares[:, row].tolist(),
            **cache,
            **({"top_temperature": float(top[1])} if top else {}),
        }
