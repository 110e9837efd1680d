"""Counted work against torch's own counter on real passes, and what a run records."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from ensemw2s import TokenEnsemble
from ensemw2s.data.batches import AnswerCollator, next_token_mask
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.inference.scoring import score_examples
from ensemw2s.models.heads import only_positions
from ensemw2s.runtime import meter
from ensemw2s.training.arguments import AnswerTrainingArguments
from ensemw2s.training.fine_tune import fine_tune
from tests.tiny import END, FORMAT, gpt2, llama, lora, questions, saved_adapters, tokenizer


def eager(model: Any) -> Any:
    """Attention as plain matrix products: torch has no formula for its fused attention on a CPU."""
    model.set_attn_implementation("eager")
    return model


def batch_of(rows: int, seed: int) -> dict[str, torch.Tensor]:
    return AnswerCollator(END)(list(tokenize_questions(questions(rows, seed=seed), tokenizer(), FORMAT)))


def torch_count(model: Any, batch: dict[str, torch.Tensor], training: bool) -> int:
    """FLOPs of one real pass, by torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        with only_positions(model, next_token_mask(batch["labels"])):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        if training:
            logits.sum().backward()
    return counter.get_total_flops()


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "lora": lambda: get_peft_model(llama(), lora()),
    "all linear layers": lambda: get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear")),
    "a trained head": lambda: get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"])
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_flops_equal_torchs_counter_on_a_real_pass(make: Any, training: bool) -> None:
    model = eager(make())
    batch = batch_of(5, seed=17)
    head = int(next_token_mask(batch["labels"]).sum())
    work = meter.Work.of_pass(*batch["input_ids"].shape, 0, head)
    expected = torch_count(model, batch, training)
    # Masks and rotary angles are products too, in some models, of a few numbers.
    assert meter.model_flops(model, training=training).of(work) == pytest.approx(expected, rel=0.01)


def test_counting_changes_neither_the_model_nor_the_random_state() -> None:
    model = get_peft_model(llama(0), LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"])).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    assert meter.model_flops(model, training=True).token > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {str(weight.device) for weight in model.parameters()} == {"cpu"}


def test_training_counts_every_step(tmp_path: Path) -> None:
    args = AnswerTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=3, disable_tqdm=True,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    rows = tokenize_questions(questions(12), tokenizer(), FORMAT)
    # All rows are one long, so that it does not matter which share a batch.
    rows = rows.map(lambda row: {"input_ids": ([5] * 30)[: 30 - len(row["input_ids"])] + row["input_ids"]})
    rows = rows.map(lambda row: {"prompt_length": 26})
    model = eager(llama(0))
    expected = torch_count(copy.deepcopy(model), AnswerCollator(END)(list(rows)), training=True)
    with meter.metered() as outer:
        _, spent = fine_tune(model, rows, args, pad_token_id=END, seed=0, description="t")
    assert spent.flops == pytest.approx(3 * expected, rel=0.01)
    assert (outer.flops, outer.tokens) == (spent.flops, spent.tokens)
    assert spent.tokens == 3 * 12 * 30


def test_scoring_and_decoding_count_every_expert(tmp_path: Path) -> None:
    rows = questions(6, seed=3)
    examples = tokenize_questions(rows, tokenizer(), FORMAT)
    tokens = sum(map(len, examples["input_ids"]))
    adapters = TokenEnsemble.from_adapters(llama(0), saved_adapters(tmp_path), [1.0, 2.0, 3.0])
    # The same experts as whole models run one after the other; adapters run as one model on stacked rows.
    models = TokenEnsemble.from_models([llama(0), llama(1), llama(2)], [1.0, 2.0, 3.0])
    with meter.metered() as scoring:
        score_examples(models, examples, pad_token_id=END)
    assert scoring.tokens == 3 * tokens
    with meter.metered() as alone:
        score_examples(llama(0), examples, pad_token_id=END)
    assert (alone.tokens, alone.flops) == (tokens, scoring.flops / 3)
    spent = []
    for ensemble in (adapters, models):
        with meter.metered() as decoding:
            labels = ensemble.label(rows, tokenizer(), question_format=FORMAT, max_new_tokens=4, description=None)
        steps = max(labels["num_tokens"])
        prompts = sum(len(FORMAT.prompt(row["prompt"], tokenizer()).ids) for row in rows)
        assert decoding.tokens == 3 * (prompts + 6 * (steps - 1))
        length = max(len(FORMAT.prompt(row["prompt"], tokenizer()).ids) for row in rows)
        work = meter.Work.of_pass(18, length, 0, 18)
        for step in range(1, steps):
            work += meter.Work.of_pass(18, 1, 0, 18, past=length + step - 1)
        with ensemble.experts.expert(0) as model:
            assert decoding.flops == pytest.approx(meter.model_flops(model).of(work), rel=1e-9)
        spent.append(decoding.flops)
    assert spent[0] > spent[1]


def test_decoding_equals_torchs_counter() -> None:
    model = eager(llama(0))
    ensemble = TokenEnsemble.from_models([model], [1.0])
    rows = questions(5, seed=6)
    options: dict[str, Any] = {"question_format": FORMAT, "max_new_tokens": 5, "description": None}
    with FlopCounterMode(display=False) as counter, meter.metered() as spent:
        ensemble.label(rows, tokenizer(), **options)
    assert spent.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_meters_are_nested_and_nothing_is_counted_outside() -> None:
    model, ids = llama(0), torch.ones(2, 3, dtype=torch.int64)
    meter.count(model, ids, None, 6)
    with meter.metered() as outer:
        with meter.metered() as inner:
            meter.count(model, ids, None, 6)
        meter.count(model, ids, torch.tensor([[0, 1, 1], [1, 1, 1]]), 6)
    assert (inner.tokens, outer.tokens) == (6, 11)
    assert outer.flops == 2 * inner.flops > 0


def test_a_model_that_cannot_be_counted_does_not_stop_a_run() -> None:
    class Peeking(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * x.flatten()[0].item()

    model = llama(0)
    model.lm_head = Peeking(32, model.config.vocab_size, bias=False)
    with meter.metered() as spent, pytest.warns(UserWarning, match="FLOPs of LlamaForCausalLM cannot be counted"):
        meter.count(model, torch.ones(2, 3, dtype=torch.int64), None, 6)
    assert spent.record() == {"tokens": 6, "flops": None}


PEAKS = """
import numpy as np
from ensemw2s.runtime import meter
with meter.peak_memory() as idle:
    pass
with meter.peak_memory() as busy:
    block = np.ones(40_000_000)  # 320 MB
    del block
with meter.peak_memory() as after:
    pass
print(*idle, *busy, *after)
"""


def test_peak_memory_sees_what_came_and_went() -> None:
    """In a process of its own, whose memory nothing else fills and frees."""
    run = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    idle, busy, after = map(int, run.stdout.split())
    assert busy - idle > 250e6
    assert after < busy - 250e6


def test_a_kernel_that_cannot_reset_the_peak_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, text: str) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.warns(UserWarning, match="peaks never fall"), meter.peak_memory() as peak:
        pass
    assert peak[0] > 1e7


def test_a_block_that_is_measured_says_all_four() -> None:
    model = llama(0)
    with meter.peak_memory() as peak, meter.measured() as record:
        meter.count(model, torch.ones(2, 3, dtype=torch.int64), None, 6)
    assert set(record) == {"seconds", "tokens", "flops"}
    assert peak[0] > 1 << 20
    assert record["tokens"] == 6
    assert 0 < record["seconds"] < 60
    assert not math.isnan(json.loads(json.dumps(record))["flops"])
