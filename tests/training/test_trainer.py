"""Fine-tuning on weighted answer tokens, against gradients worked out in float64 one row at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from ensemw2s.data.batches import AnswerCollator, LengthBucketSampler, next_token_mask
from ensemw2s.data.tokens import tokenize_questions
from ensemw2s.models.heads import only_positions
from ensemw2s.models.loading import load_model
from ensemw2s.training.arguments import AnswerTrainingArguments
from ensemw2s.training.fine_tune import fine_tune
from ensemw2s.training.trainer import AnswerTrainer
from tests.tiny import END, FORMAT, PAD, VOCAB, gpt2, llama, lora, questions, saved_model, tokenizer


def gpt_neox(seed: int = 0) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.4, bos_token_id=END, eos_token_id=END,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    """Its logits are bent by a soft cap behind the head, which is tied to the embeddings."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.4, pad_token_id=PAD,
        eos_token_id=END, bos_token_id=END, final_logit_softcapping=2.0, attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "gpt_neox": gpt_neox, "gemma2": gemma2}


def arguments(folder: Path, **settings: Any) -> AnswerTrainingArguments:
    """Plain gradient descent by default: after one step the weights have moved by the gradient."""
    defaults = {
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True,
        "num_train_epochs": 1, "per_device_train_batch_size": 4, "disable_tqdm": True,
    }  # fmt: skip
    return AnswerTrainingArguments(output_dir=str(folder), **(defaults | settings))


def ragged(count: int, seed: int) -> tuple[Dataset, list[np.ndarray]]:
    """Random examples of 3 to 14 tokens, in which padding and end tokens occur too, and a weight per answer token."""
    rng = np.random.default_rng(seed)
    rows, weights = [], []
    for _ in range(count):
        prompt, answer = rng.integers(2, 8), rng.integers(1, 7)
        rows.append({"input_ids": rng.integers(0, VOCAB, prompt + answer).tolist(), "prompt_length": int(prompt)})
        # Counts as a draw gives them: many zeros, but no row without weight.
        weights.append(rng.poisson(0.8, answer) * rng.uniform(0.1, 2.0, answer) + (np.arange(answer) == 0) * 0.5)
    return Dataset.from_list(rows), weights


def features(examples: Dataset, weights: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    return [{**row, "token_weights": weight} for row, weight in zip(examples, weights, strict=True)]


def slow_loss(model: nn.Module, examples: Dataset, weights: Sequence[np.ndarray]) -> Tensor:
    """Return sum w CE / sum w in float64, each row by itself and without padding; `model` is float64."""
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for row, row_weights in zip(examples, weights, strict=True):
        ids = torch.tensor(row["input_ids"])
        log_probs = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
        for j, weight in enumerate(np.asarray(row_weights, dtype=np.float32).tolist()):
            place = row["prompt_length"] + j
            total = total - weight * log_probs[place - 1, ids[place]]
            mass += weight
    return total / mass


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def run(folder: Path, examples: Dataset, weights: Sequence[np.ndarray] | None = None, **settings: Any) -> nn.Module:
    """Fine-tune a fresh `llama(0)`; `model`, `peft_config` and `pad` are taken out of `settings`."""
    options = {"peft_config": settings.pop("peft_config", None), "pad_token_id": settings.pop("pad", PAD)}
    model = MODELS[settings.pop("model", "llama")](0)
    args = arguments(folder, **settings)
    # Whatever was drawn before the call is of no account.
    torch.seed()
    model, _ = fine_tune(model, examples, args, seed=3, description="test", token_weights=weights, **options)
    return model


# The loss


@pytest.mark.parametrize("pad", [PAD, END], ids=["pad", "pad-is-end"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_weighted_mean_of_cross_entropies(tmp_path: Path, name: str, pad: int) -> None:
    model = MODELS[name](1)
    trainer = AnswerTrainer(model=model, args=arguments(tmp_path))
    for seed in range(3):
        examples, weights = ragged(6, seed)
        batch = AnswerCollator(pad)(features(examples, weights))
        with torch.no_grad():
            loss = trainer.compute_loss(model, batch)
            expected = slow_loss(copy.deepcopy(model).double(), examples, weights)
        assert loss.item() == pytest.approx(expected.item(), rel=2e-6)


@pytest.mark.parametrize("pad", [PAD, END], ids=["pad", "pad-is-end"])
def test_one_step_of_gradient_descent_follows_the_float64_gradient(tmp_path: Path, pad: int) -> None:
    examples, weights = ragged(6, seed=5)
    trained = run(tmp_path, examples, weights, pad=pad, per_device_train_batch_size=6)
    reference = llama(0).double()
    slow_loss(reference, examples, weights).backward()
    start = dict(llama(0).named_parameters())
    gradients = dict(reference.named_parameters())
    for name, weight in trained.named_parameters():
        step = (start[name] - weight).double() / 0.1
        torch.testing.assert_close(step, gradients[name].grad, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_examples_without_weights_count_every_answer_token_once(tmp_path: Path) -> None:
    examples, weights = ragged(5, seed=6)
    plain = run(tmp_path, examples)
    ones = run(tmp_path, examples, [np.ones(len(row)) for row in weights])
    assert_same_bits(trained_weights(plain), trained_weights(ones))


# Accumulation


@pytest.mark.parametrize("count", [8, 11], ids=["even", "last-step-short"])
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(
    tmp_path: Path, peft_config: LoraConfig | None, count: int
) -> None:
    examples, weights = ragged(count, seed=7)
    # Micro-batches whose means would differ: the weights span three orders of magnitude.
    weights = [row * 10.0 ** (i % 4 - 2) for i, row in enumerate(weights)]
    steps = {}
    for size, accumulated in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        settings |= {"num_train_epochs": 2, "learning_rate": 0.01, "peft_config": peft_config}
        weights_now = trained_weights(run(tmp_path, examples, weights, **settings))
        steps[size] = torch.cat([weight.flatten() for weight in weights_now.values()])
    start = trained_weights(run(tmp_path, examples, weights, learning_rate=0.0, peft_config=peft_config))
    moved = torch.cat([weight.flatten() for weight in start.values()]) - steps[8]
    assert moved.norm() > 1e-3
    for size in (4, 2, 1):
        assert (steps[size] - steps[8]).norm() < 1e-4 * moved.norm(), f"micro-batches of {size}"


# Every weight counts


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_one_tokens_weight_changes_the_gradient(
    tmp_path: Path, accumulated: int, bf16: bool, peft_config: LoraConfig | None
) -> None:
    examples, weights = ragged(6, seed=8)
    settings = {
        "per_device_train_batch_size": 6 // accumulated, "gradient_accumulation_steps": accumulated, "bf16": bf16,
        "peft_config": peft_config,
    }  # fmt: skip
    before = trained_weights(run(tmp_path, examples, weights, **settings))
    for row in (0, 5):
        changed = [w.copy() for w in weights]
        changed[row][0] *= 3
        after = trained_weights(run(tmp_path, examples, changed, **settings))
        moved = max((after[name] - before[name]).abs().max().item() for name in before)
        assert moved > 1e-4, f"row {row}"


@pytest.mark.parametrize("model", ["llama", "gemma2"], ids=["hidden-states", "logits"])
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "peft_config": lora(), "bf16": True},
        {
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 3,
            "train_sampling_strategy": "group_by_length",
        },
    ],
    ids=["checkpointing", "checkpointing-lora-bf16", "accumulation"],
)
def test_one_tokens_weight_changes_the_gradient_in_every_mode(
    tmp_path: Path, model: str, settings: dict[str, Any]
) -> None:
    examples, weights = ragged(6, seed=8)
    settings = {"per_device_train_batch_size": 6, "model": model} | settings
    before = trained_weights(run(tmp_path, examples, weights, **settings))
    for row in range(6):
        changed = [w.copy() for w in weights]
        changed[row][0] *= 3
        after = trained_weights(run(tmp_path, examples, changed, **settings))
        moved = max((after[name] - before[name]).abs().max().item() for name in before)
        assert moved > 1e-4, f"row {row}"


def test_gradient_checkpointing_gives_the_same_step(tmp_path: Path) -> None:
    examples, weights = ragged(6, seed=8)
    plain, recomputed = (
        trained_weights(run(tmp_path, examples, weights, gradient_checkpointing=on)) for on in (False, True)
    )
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_tokens_of_weight_zero_give_no_gradient(tmp_path: Path, accumulated: int, bf16: bool) -> None:
    examples, weights = ragged(6, seed=9)
    # The last token of a row is nobody's context: without weight, what it is cannot matter.
    weights = [np.append(row, 0.0) for row in weights]
    longer = [
        examples.map(
            lambda row, i, shift=shift: {"input_ids": [*row["input_ids"], (i + shift) % VOCAB]}, with_indices=True
        )
        for shift in (2, 9)
    ]
    settings = {
        "per_device_train_batch_size": 6 // accumulated,
        "gradient_accumulation_steps": accumulated,
        "bf16": bf16,
    }
    one, other = (trained_weights(run(tmp_path, rows, weights, **settings)) for rows in longer)
    assert_same_bits(one, other)


@pytest.mark.parametrize("settings", [{"weight_decay": 0.0}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_a_step_without_any_weight_leaves_the_model_as_it_was(tmp_path: Path, settings: dict[str, Any]) -> None:
    examples, weights = ragged(1, seed=10)
    model = llama(0)
    trainer = AnswerTrainer(model=model, args=arguments(tmp_path, **settings))
    batch = AnswerCollator(PAD)(features(examples, [weights[0] * 0]))
    _, total = trainer.get_batch_samples(iter([batch, batch]), 2, torch.device("cpu"))
    assert total == 0
    loss = trainer.training_step(model, batch, total)
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    # In the middle of a run too: as many updates as rows with weight.
    rows = Dataset.from_list([examples[0]] * 3)
    ran = run(tmp_path, rows, [weights[0], weights[0] * 0, weights[0]], per_device_train_batch_size=1, **settings)
    two = run(tmp_path, rows.select([0, 2]), [weights[0], weights[0]], per_device_train_batch_size=1, **settings)
    assert all(p.isfinite().all() for p in ran.parameters())
    if "gradient_accumulation_steps" not in settings:
        assert_same_bits(trained_weights(ran), trained_weights(two))


# Bad weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-1], r"3 rows .* for 4 examples .*one weight per answer token"),
        (lambda w: [*w[:-1], w[-1][:-1]], "one weight per answer token"),
        (lambda w: [*w[:-1], -w[-1] - 1], r"at least 0 and not all 0; they run from -"),
        (lambda w: [*w[:-1], w[-1] * np.nan], "finite"),
        (lambda w: [*w[:-1], w[-1] + np.inf], "finite"),
        (lambda w: [row * 0 for row in w], "not all 0"),
    ],
    ids=["too-few-rows", "short-row", "negative", "nan", "infinite", "all-zero"],
)
def test_token_weights_that_cannot_be_meant_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    examples, weights = ragged(4, seed=11)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, examples, change(weights))


# Reproducibility


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj"])])
def test_one_seed_gives_the_same_bits_whatever_the_number_of_workers(
    tmp_path: Path, peft_config: LoraConfig | None
) -> None:
    examples, weights = ragged(10, seed=12)
    settings = {"peft_config": peft_config, "num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    results = [
        trained_weights(run(tmp_path, examples, weights, dataloader_num_workers=workers, **settings))
        for workers in (0, 2, 0)
    ]
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_another_seed_gives_another_order_and_another_adapter(tmp_path: Path) -> None:
    examples, weights = ragged(10, seed=13)
    options: dict[str, Any] = {"pad_token_id": PAD, "description": "test", "token_weights": weights}
    args = arguments(tmp_path, seed=99)
    one, other = (fine_tune(llama(0), examples, args, seed=seed, **options)[0] for seed in (1, 2))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    # At a learning rate of 0 an adapter stays as it was drawn.
    args = arguments(tmp_path, learning_rate=0.0)
    adapters = [fine_tune(llama(0), examples, args, seed=seed, peft_config=lora(), **options)[0] for seed in (1, 2)]
    left, right = (trained_weights(adapter) for adapter in adapters)
    name = next(name for name in left if "lora_A" in name)
    assert (left[name] - right[name]).abs().max() > 1e-2


# Divergence


@pytest.mark.parametrize("ids", [False, True], ids=["rows", "ids"])
def test_a_nan_loss_stops_at_its_step_names_the_examples_and_says_what_to_do(tmp_path: Path, ids: bool) -> None:
    examples, _ = ragged(12, seed=14)
    names = [f"q{i}" for i in range(12)] if ids else [str(i) for i in range(12)]
    if ids:
        examples = examples.add_column("id", names)
    settings = {"per_device_train_batch_size": 6, "train_sampling_strategy": "group_by_length"}
    args = arguments(tmp_path, learning_rate=1e20, num_train_epochs=3, **settings)
    message = (
        rf"^weak expert 2: the training loss is (nan|inf) at step (\d+), in the batch of {'id' if ids else 'row'} "
        r"(\w+), (\w+), (\w+), (\w+), (\w+) and 1 more\. Lower the learning rate \(now 1e\+20\)"
    )
    with pytest.raises(FloatingPointError, match=message) as caught:
        fine_tune(llama(0), examples, args, pad_token_id=PAD, seed=0, description="weak expert 2")
    found = re.match(message, str(caught.value))
    step, named = int(found.group(2)), list(found.groups()[2:])
    # The batch is the one that the order of this seed puts there.
    sampler = LengthBucketSampler([len(row) for row in examples["input_ids"]], 6, seed=0)
    sampler.set_epoch((step - 1) // 2)
    start = (step - 1) % 2 * 6
    assert named == [names[i] for i in list(sampler)[start : start + 5]]


def test_a_nan_weight_is_found_at_the_first_step_and_not_trained_on(tmp_path: Path) -> None:
    examples, _ = ragged(8, seed=15)
    model = llama(0)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "norm" not in name}
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        fine_tune(model, examples, arguments(tmp_path), pad_token_id=PAD, seed=0, description="test")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "norm" not in name)


def test_a_last_step_that_overflows_is_found_too(tmp_path: Path) -> None:
    examples, _ = ragged(4, seed=16)
    args = arguments(tmp_path, learning_rate=1e38, max_steps=1, weight_decay=1e38)
    with pytest.raises(FloatingPointError, match=r"test: the last step made weights NaN or infinite\. Lower"):
        fine_tune(llama(0), examples, args, pad_token_id=PAD, seed=0, description="test")


# Logits of some positions only


@pytest.mark.parametrize("name", MODELS)
def test_only_positions_are_the_rows_of_the_full_logits(name: str) -> None:
    model = MODELS[name](2)
    ids = torch.randint(0, VOCAB, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    with torch.no_grad():
        full = model(ids).logits
        with only_positions(model, mask):
            some = model(ids).logits
        again = model(ids).logits
    assert some.shape == (int(mask.sum()), VOCAB)
    torch.testing.assert_close(some, full[mask], rtol=1e-5, atol=1e-5)
    assert torch.equal(again, full)


@pytest.mark.parametrize("head", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_only_positions_reach_a_head_that_an_adapter_wraps(head: dict[str, Any]) -> None:
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(llama(0), LoraConfig(**({"target_modules": ["q_proj"]} | head), init_lora_weights=False))
    model.eval()
    ids = torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[[0, 2], [6, 1]] = True
    with torch.no_grad():
        full = model(input_ids=ids).logits
        with only_positions(model, mask):
            some = model(input_ids=ids).logits
    torch.testing.assert_close(some, full[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "peft"])
def test_the_hook_is_gone_after_an_exception(wrapped: bool) -> None:
    from peft import get_peft_model

    model: Any = get_peft_model(llama(0), lora()).eval() if wrapped else llama(0)
    ids = torch.randint(2, VOCAB, (2, 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full = model(input_ids=ids).logits
        with pytest.raises(RuntimeError, match="out of memory"), only_positions(model, torch.ones_like(ids).bool()):
            raise RuntimeError("out of memory")
        assert torch.equal(model(input_ids=ids).logits, full)


def test_a_model_without_a_head_is_refused() -> None:
    body = llama(0).model
    with pytest.raises(TypeError, match="LlamaModel has no output embeddings"), only_positions(body, torch.ones(1, 1)):
        pass


def test_the_next_token_mask_looks_one_ahead() -> None:
    labels = torch.tensor([[-100, -100, 5, -100, 7], [3, 4, -100, -100, -100]])
    expected = [[False, True, False, True, False], [True, False, False, False, False]]
    assert next_token_mask(labels).tolist() == expected


# What the caller sees


def test_the_callers_arguments_and_adapter_configuration_stay_as_they_were(tmp_path: Path) -> None:
    examples, weights = ragged(4, seed=17)
    args, peft_config = arguments(tmp_path, seed=41), lora()
    # peft notes down where a model was loaded from.
    pretrained = load_model(saved_model(tmp_path / "model"))
    before = copy.deepcopy((args.to_dict(), peft_config.to_dict(), examples.column_names))
    options: dict[str, Any] = {"pad_token_id": PAD, "seed": 7, "description": "test", "token_weights": weights}
    model, _ = fine_tune(pretrained, examples, args, peft_config=peft_config, **options)
    assert isinstance(model, PeftModel)
    assert (args.to_dict(), peft_config.to_dict(), examples.column_names) == before


def test_training_returns_the_model_ready_for_use(tmp_path: Path) -> None:
    examples = tokenize_questions(questions(4), tokenizer(), FORMAT)
    model = llama(0)
    trained, _ = fine_tune(model, examples, arguments(tmp_path), pad_token_id=END, seed=0, description="test")
    assert trained is model
    assert isinstance(trained, PreTrainedModel)
    assert not any(module.training for module in trained.modules())


@pytest.mark.parametrize(
    ("settings", "passes"),
    [({"num_train_epochs": 3}, 3.0), ({"max_steps": 2}, 1.0), ({"num_train_epochs": 0.5}, 0.5)],
)
def test_the_cost_counts_the_tokens_that_were_seen(tmp_path: Path, settings: dict[str, Any], passes: float) -> None:
    # Rows of one length, so that any two batches hold the same number of tokens; a row of padding follows from none.
    examples = Dataset.from_list([{"input_ids": [5, 6, 7, 8, END], "prompt_length": 2}] * 8)
    args = arguments(tmp_path, **settings)
    _, cost = fine_tune(llama(0), examples, args, pad_token_id=PAD, seed=0, description="test")
    assert cost.tokens == 8 * 5 * passes
    assert cost.seconds > 0
    assert cost.flops == pytest.approx(6 * llama(0).num_parameters(exclude_embeddings=True) * cost.tokens, rel=0.35)


def test_the_cost_leaves_padding_out(tmp_path: Path) -> None:
    examples, _ = ragged(7, seed=18)
    _, cost = fine_tune(llama(0), examples, arguments(tmp_path), pad_token_id=PAD, seed=0, description="test")
    assert cost.tokens == sum(len(ids) for ids in examples["input_ids"])


def test_the_progress_bar_has_the_phases_name_and_all_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples, _ = ragged(8, seed=19)
    for disabled in (False, True):
        args = arguments(tmp_path, disable_tqdm=disabled, logging_steps=1)
        fine_tune(llama(0), examples, args, pad_token_id=PAD, seed=0, description="training expert 2 of 3")
        shown = capsys.readouterr()
        assert shown.out == ""
        assert ("training expert 2 of 3" in shown.err) is not disabled
        assert ("2/2" in shown.err and "loss=" in shown.err) is not disabled


@pytest.mark.parametrize("settings", [{"dataloader_drop_last": True, "per_device_train_batch_size": 64}])
def test_a_training_without_a_step_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    examples, weights = ragged(5, seed=0)
    with pytest.raises(
        ValueError,
        match=r"^[^:]+: not one step was made on 5 examples.*dataloader_drop_last=True",
    ):
        run(tmp_path, examples, weights, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_epochs": -1}, "num_train_epochs must be above 0 and finite, got -1"),
        ({"max_steps": 0}, "max_steps must be -1 or at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0, got nan"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"train_sampling_strategy": "sorted"}, "train_sampling_strategy must be one of random, sequential"),
    ],
)
def test_arguments_that_would_void_a_training_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)
