"""Token-by-token decoding of an ensemble that ends every step in one fused op, and pseudo-answers made with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ensemw2s import ops
from ensemw2s.choices import choose_answers, tokenize_choices
from ensemw2s.data import PromptCollator, QuestionFormat, tokenize_prompts
from ensemw2s.files import append_json_lines, read_complete_lines
from ensemw2s.models import CACHE

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ensemw2s.ensemble import EnsembleCache, TokenEnsemble

# An expert that gives a token more than half of its probability has it as its argmax, whatever the rest is.
_AGREES = 0.5


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the mixture; the defaults are greedy. Filters act in the order of the fields."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

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
        input_ids: int64 [B, length], left-padded prompts.
        attention_mask: int64 [B, length].
        seeds: int64 [B]; row b's draws depend on seeds[b] and the step alone.
        sampling: how tokens are chosen.
        cache: an empty cache, or one that already holds a prefix of `input_ids`.
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
        self.pending = input_ids[:, self.cache.get_seq_length() :]
        self.position = 0

    def step(self) -> Any:
        """Run the experts on what they have not seen and choose B tokens: `ops.mixture_sample`'s named tuple."""
        places = (self.attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -self.pending.shape[1] :]
        logits = self.ensemble.expert_logits(
            range(self.ensemble.num_experts),
            self.pending,
            self.attention_mask,
            position_ids=places,
            cache=self.cache,
            last_only=True,
        )
        positions = torch.full_like(self.seeds, self.position)
        return ops.mixture_sample(
            [row[:, -1] for row in logits],
            self.weights,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
            seeds=self.seeds,
            positions=positions,
            combine=self.ensemble.config.combine,
        )

    def append(self, tokens: torch.Tensor) -> None:
        """Make `tokens` (int64 [B]) the next input of every expert."""
        self.pending = tokens[:, None]
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.attention_mask[:, :1])], dim=1)
        self.position += 1


def require_valid(valid: torch.Tensor, names: list[str]) -> None:
    """Raise FloatingPointError naming the rows in which an expert gave NaN or no finite logit."""
    if not bool(valid.all()):
        bad = [name for name, ok in zip(names, valid.tolist(), strict=True) if not ok]
        raise FloatingPointError(
            f"an expert gave NaN or no finite logit for {', '.join(bad[:5])}"
            f"{' and more' if len(bad) > 5 else ''}: its weights are damaged or overflow in their dtype; "
            "load the experts in float32, or train that expert again"
        )


def fused_sample(
    model: TokenEnsemble,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode in place of transformers' sampling loop, writing no distribution over the vocabulary.

    `generate` calls this with everything prepared. What the fused op cannot do (another logits processor, returned
    scores) goes to transformers' own loop, which draws from the same distribution.
    """
    sampling = Sampling.from_processors(logits_processor, bool(generation_config.do_sample))
    if sampling is None or generation_config.return_dict_in_generate:
        return model._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=streamer,
            **model_kwargs,
        )
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
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
    while bool(running.any()):
        choice = decoder.step()
        require_valid(choice.valid | ~running, [f"row {row} of the batch" for row in range(len(input_ids))])
        tokens = choice.tokens if pad is None else torch.where(running, choice.tokens, pad)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        running &= ~stopping_criteria(input_ids, None)
        decoder.append(tokens)
    if streamer is not None:
        streamer.end()
    return input_ids


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
    output_file: str | os.PathLike[str] | None = None,
    description: str | None = "labelling",
) -> Dataset:
    """Let the ensemble answer questions; the answers are pseudo-labels for a student (method, phase 3).

    Questions are decoded in batches of similar prompt length; those with a column `choices` are answered by likelihood
    (`ensemw2s.choices`) with one of their choices. With `output_file`, finished rows are appended to it
    (JSON lines) as they come, and a later call goes on behind them.

    Args:
        ensemble: T experts with their weights.
        questions: columns `prompt`, `id` and optionally `choices`; any `answer` is ignored.
        processing_class: the experts' tokenizer.
        question_format: how a question becomes tokens; None is the default format.
        max_new_tokens: the longest pseudo-answer, its end token included.
        batch_size: questions decoded together.
        sampling: how tokens are chosen; None is greedy.
        seed: question i (in the dataset's order) draws from seed `seed + i`, whatever batch it falls in.
        output_file: where to keep finished rows.
        description: the name of the progress bar; None shows none.

    Returns:
        One row per question, in the order of `questions`: `id`, `prompt`, `answer` (text), `num_tokens` (end token
        included), `finished` (the end token came in time), `confidence` (mean log-probability per token under the
        mixture, nats, before temperature and filters), `agreement` (share of (token, expert) pairs in which the
        expert gives the chosen token more than half of its probability) **[choice]**. With choices there is a column
        `choices` too, `confidence` is the log (nats) of the answer's share of the choices' probability, so
        `exp(confidence)` is their softmax, and `agreement` the share of experts that would choose the same.

    Raises:
        FloatingPointError: an expert gives NaN or no finite logit; names the questions.
        ValueError: `output_file` holds rows of other questions; `sampling` for questions with choices; or answers
            that would have no end, because the format has no end token and there are no choices.
    """
    question_format = question_format or QuestionFormat()
    prompts = tokenize_prompts(questions, processing_class, question_format, "questions")
    choices = None
    if "choices" in questions.column_names:
        if sampling not in (None, Sampling()):
            raise ValueError(
                f"questions with choices are answered by likelihood, not by {sampling}: leave sampling out"
            )
        choices = tokenize_choices(questions, processing_class, question_format)
    elif not question_format.end_token:
        raise ValueError(
            "the format has end_token=False, so that decoded answers would have no end: use end_token=True, or give "
            "the questions a column `choices`"
        )
    rows = {row["id"]: row for row in (read_complete_lines(output_file) if output_file else [])}
    strangers = rows.keys() - set(prompts["id"])
    if strangers:
        raise ValueError(
            f"{output_file} holds answers to questions that are not in this dataset, e.g. id {min(strangers)!r}: "
            "it belongs to another run; name another file or delete this one"
        )
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]["input_ids"]), i))
    # Batches are cut before finished rows are left out, so that a continued run meets the same batches.
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    todo = [batch for batch in batches if any(prompts[i]["id"] not in rows for i in batch)]
    bar = tqdm(
        total=len(order),
        initial=len(rows),
        desc=description,
        unit="question",
        leave=False,
        disable=description is None,
    )
    for batch in todo:
        if choices is None:
            made = _label_batch(ensemble, questions, prompts, batch, processing_class, max_new_tokens, sampling, seed)
        else:
            made = choose_answers(ensemble, questions, choices, batch, processing_class)
        fresh = list(made)
        fresh = [row for row in fresh if row["id"] not in rows]
        rows.update((row["id"], row) for row in fresh)
        if output_file:
            append_json_lines(output_file, fresh)
        bar.update(len(fresh))
    bar.close()
    from datasets import Dataset

    return Dataset.from_list([rows[row_id] for row_id in prompts["id"]])


@torch.no_grad()
def _label_batch(  # type: ignore[no-untyped-def]
    ensemble, questions, prompts, batch, processing_class, max_new_tokens, sampling, seed
) -> Iterator[dict[str, Any]]:
    device = ensemble.device
    end = processing_class.eos_token_id
    inputs = PromptCollator(end)([{"input_ids": prompts[i]["input_ids"]} for i in batch])
    seeds = torch.tensor([seed + i for i in batch], dtype=torch.int64, device=device)
    decoder = MixtureDecoder(
        ensemble,
        inputs["input_ids"].to(device),
        inputs["attention_mask"].to(device),
        seeds,
        sampling or Sampling(),
    )
    running = torch.ones(len(batch), dtype=torch.bool, device=device)
    tokens, log_probs, agreement, counted = [], [], [], []
    for _ in range(max_new_tokens):
        choice = decoder.step()
        require_valid(choice.valid | ~running, [f"question {prompts[i]['id']!r}" for i in batch])
        tokens.append(choice.tokens)
        log_probs.append(choice.log_probs)
        agreement.append((choice.expert_log_probs.exp() > _AGREES).float().mean(0))
        counted.append(running.clone())
        running &= choice.tokens != end
        if not bool(running.any()):
            break
        # Rows that are done repeat their end token: it is in no other row's context.
        decoder.append(torch.where(running, choice.tokens, end))
    mask = torch.stack(counted, 1)
    length = mask.sum(1)
    confidence = (torch.stack(log_probs, 1).double() * mask).sum(1) / length
    share = (torch.stack(agreement, 1).double() * mask).sum(1) / length
    ids = torch.stack(tokens, 1)
    for row, i in enumerate(batch):
        answer = [token for token in ids[row, : length[row]].tolist() if token != end]
        yield {
            "id": prompts[i]["id"],
            "prompt": questions[i]["prompt"],
            "answer": processing_class.decode(answer, skip_special_tokens=True).strip(),
            "num_tokens": int(length[row]),
            "finished": not bool(running[row]),
            "confidence": float(confidence[row]),
            "agreement": float(share[row]),
        }
