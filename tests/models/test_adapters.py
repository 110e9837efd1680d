"""Adapters that can be experts: what is refused before training, and saved ones that are taken whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ensemw2s import BoostingConfig, BoostingTrainer, TokenEnsemble
from ensemw2s.ensemble.experts import AdapterExperts
from ensemw2s.experiments.config import build_config
from ensemw2s.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, attach_adapter, check_peft_config
from ensemw2s.student.trainer import StudentConfig, StudentTrainer, load_trained
from tests.faults.folders import adapters_work
from tests.reference import WEIGHTS, ragged_prompts
from tests.tiny import FORMAT, llama, lora, questions, saved_adapters, tokenizer

# Refused before any training

IMPOSSIBLE: list[tuple[Callable[[], PeftConfig], str]] = [
    (lambda: LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the weights of the base model"),
    (lambda: LoraConfig(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4' changes the weights"),
    (lambda: LoraConfig(init_lora_weights="olora"), "init_lora_weights='olora' changes the weights"),
    (lambda: LoraConfig(init_lora_weights="corda"), "init_lora_weights='corda' changes .* or needs a pass over data"),
    (lambda: LoraConfig(init_lora_weights="eva"), "init_lora_weights='eva' changes .* or needs a pass over data"),
    (lambda: LoraConfig(bias="lora_only"), "bias='lora_only' trains biases of the base model"),
    (lambda: LoraConfig(bias="all"), "bias='all' trains biases"),
    (lambda: LoraConfig(layer_replication=[(0, 2)]), r"layer_replication=\[\(0, 2\)\] does not work with experts"),
    (lambda: LoraConfig(task_type="SEQ_CLS"), "task_type='SEQ_CLS' is for models that do not write text"),
    (lambda: LoraConfig(r=0), "r must be a whole number, at least 1, got 0"),
    (lambda: PromptTuningConfig(num_virtual_tokens=2), "kind 'PROMPT_TUNING' cannot be experts .* use peft.LoraConfig"),
    (lambda: PrefixTuningConfig(num_virtual_tokens=2), "kind 'PREFIX_TUNING' cannot be experts"),
]


@pytest.mark.parametrize(("make", "expected"), IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
def test_what_cannot_be_an_expert_is_refused_by_the_trainers(
    make: Callable[[], PeftConfig], expected: str, tmp_path: Path
) -> None:
    made: dict[str, Any] = {"processing_class": tokenizer(), "peft_config": make(), "question_format": FORMAT}
    with pytest.raises(ValueError, match=f"peft_config: .*{expected}"):
        BoostingTrainer(llama(0), BoostingConfig(output_dir=str(tmp_path), use_cpu=True), questions(4), **made)
    with pytest.raises(ValueError, match=f"peft_config: .*{expected}"):
        StudentTrainer(llama(0), StudentConfig(output_dir=str(tmp_path), use_cpu=True), questions(4), **made)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"init_lora_weights": "pissa"}, "lora: init_lora_weights='pissa' changes"),
        ({"bias": "lora_only"}, "lora: bias='lora_only' trains biases"),
        ({"init_lora_weights": "loftq"}, r"lora\..*: .*loftq_config"),
        ({"megatron_config": {"a": 1}}, "lora: "),
    ],
)
def test_an_experiment_refuses_it_by_its_key(settings: dict[str, Any], expected: str) -> None:
    sizes = dict.fromkeys(("train", "validation", "test_id", "unlabelled", "test_ood"), 4)
    data = {"sizes": sizes, "easy": {"file": "e.jsonl"}, "hard": {"file": "h.jsonl"}}
    run = {"name": "x", "weak": {"source": "weak"}, "strong": {"source": "strong"}, "data": data}
    with pytest.raises(ValueError, match=expected):
        build_config({**run, "lora": settings})
    assert build_config({**run, "lora": {"r": 4}}).lora == {"r": 4}


def test_adapters_that_cannot_be_merged_are_refused_where_they_would_be(tmp_path: Path) -> None:
    args = BoostingConfig(output_dir=str(tmp_path), use_cpu=True, num_rounds=2)
    with pytest.raises(ValueError, match=r"peft_config: with a model for each round .* cannot do with lora_bias"):
        BoostingTrainer(
            [llama(0), llama(1)],
            args,
            questions(4),
            processing_class=tokenizer(),
            peft_config=LoraConfig(lora_bias=True),
        )
    check_peft_config(LoraConfig(lora_bias=True), "peft_config")


@pytest.mark.parametrize(
    ("kind", "settings"), [("VERA", {}), ("IA3", {"feedforward_modules": ["down_proj"]}),
                           ("LORA", {"trainable_token_indices": [3, 5]})]
)  # fmt: skip
def test_other_kinds_than_lora_train_mix_save_and_load(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    # All others are tried by the long pass of the battery.
    adapters_work(tmp_path, kind, settings)


def test_a_student_with_such_an_adapter_comes_back_the_same(tmp_path: Path) -> None:
    args = StudentConfig(
        output_dir=str(tmp_path), use_cpu=True, num_train_epochs=1, learning_rate=0.1, disable_tqdm=True
    )
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    options: dict[str, Any] = {"processing_class": tokenizer(), "question_format": FORMAT, "peft_config": config}
    trainer = StudentTrainer(llama(0), args, questions(6), **options)
    trained = trainer.train()
    trainer.save_model(tmp_path / "student")
    llama(0).save_pretrained(tmp_path / "base")
    back = load_trained(tmp_path / "student", str(tmp_path / "base"))
    assert torch.equal(logits(back), logits(trained))


# Saved adapters that do not fit


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=ragged_prompts(3)[0].clamp_min(2)).logits


def picture(model: nn.Module) -> list[Any]:
    """All that can be seen of a model: modules and their plain settings, weights, and what of them is trained."""
    seen: list[Any] = []
    for name, module in model.named_modules():
        settings = {
            # A set's own text depends on the order in which it was filled.
            key: repr(sorted(value, key=repr) if isinstance(value, set) else value)
            for key, value in vars(module).items()
            if isinstance(value, dict | list | set | str)
        }
        modules = {key: type(child).__name__ for key, child in module.named_children()}
        seen.append(
            (name, type(module).__name__, modules, {k: v for k, v in settings.items() if k[0] != "_" or "adapter" in k})
        )
    for name, weight in model.named_parameters():
        assert not weight.is_meta, name
        seen.append((name, weight.requires_grad, weight.detach().clone()))
    return seen


def assert_same_picture(before: list[Any], after: list[Any]) -> None:
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        if isinstance(one[-1], torch.Tensor):
            assert one[:-1] == other[:-1] and torch.equal(one[-1], other[-1]), one[0]
        else:
            assert one == other, one[0]


def edit(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], folder: Path) -> None:
    file = folder / ADAPTER_WEIGHTS
    save_file(change(load_file(file)), file)


def configure(settings: dict[str, Any], folder: Path) -> None:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: edit(lambda weights: {k: v for k, v in weights.items() if part not in k}, folder)


def with_first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    return lambda folder: edit(lambda weights: weights | {name: change(weights[name])}, folder)


STRANGE = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
FIRST = r"base_model\.model\.model\.layers\.0\.mlp\.down_proj\.lora_A\.weight"
DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (without("layers.1.mlp.down_proj.lora_B"), r"lacks base_model\S+layers\.1\.mlp\.down_proj\.lora_B\S+ .1 tensors"),
    (without("lora_A"), r"lacks base_model\S+ .*4 tensors in all"),
    (without("lm_head"), r"lacks base_model\.model\.lm_head\.weight"),
    (lambda f: edit(lambda w: w | {STRANGE: torch.zeros(4, 32)}, f), rf"holds besides what belongs there {STRANGE}"),
    (with_first(lambda w: w[:-1]), "does not fit the base model .*size mismatch"),
    (with_first(lambda w: w.to(torch.int32)), rf"holds {FIRST} as I32, expected F16, BF16, F32"),
    (with_first(lambda w: w.to(torch.float64)), rf"holds {FIRST} as F64"),
    (with_first(lambda w: w * float("nan")), rf"{FIRST} holds NaN or infinite weights"),
    (lambda f: configure({"modules_to_save": ["embed_tokens", "lm_head"]}, f), r"lacks base_model\S+embed_tokens"),
    (lambda f: configure({"modules_to_save": None}, f), r"brings its own lm_head\.weight"),
    (lambda f: configure({"target_modules": ["q_proj"]}, f), r"besides what belongs there base_model\S+down_proj"),
    (lambda f: configure({"target_modules": ["q_proj", "down_proj", "v_proj"]}, f), r"lacks base_model\S+v_proj"),
    # Not every release of peft refuses it by itself.
    (
        lambda f: configure({"target_modules": ["nothing"]}, f),
        "does not fit the base model .No modules were targeted|besides what belongs there",
    ),
    (lambda f: configure({"r": 5}, f), "does not fit the base model .*size mismatch"),
    (lambda f: configure({"use_dora": True}, f), "lacks .*lora_magnitude_vector"),
    (lambda f: configure({"init_lora_weights": "pissa"}, f), "'pissa' changes the weights of the base model"),
    (lambda f: configure({"peft_type": "PROMPT_TUNING"}, f), "peft_type 'PROMPT_TUNING' is no kind of adapter"),
    (lambda f: configure({"megatron_config": {"a": 1}}, f), "megatron_config"),
    (lambda f: configure({"lora_alpha": float("nan")}, f), "lora_alpha cannot be nan"),
    (lambda f: configure({"unheard_of": 3}, f), "'unheard_of' is no setting of this version of peft"),
]  # fmt: skip


@pytest.fixture
def whole_head(tmp_path: Path) -> Path:
    """An adapter with a head of its own."""
    config = lora()
    config.modules_to_save = ["lm_head"]
    model = get_peft_model(llama(0), config)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "whole-head")
    return tmp_path / "whole-head"


@pytest.mark.parametrize(("damage", "expected"), DAMAGE, ids=range(len(DAMAGE)))
def test_an_adapter_that_does_not_fit_leaves_everything_as_it_was(
    damage: Callable[[Path], None], expected: str, whole_head: Path, of_adapters: TokenEnsemble
) -> None:
    ids, mask = ragged_prompts(3)
    damage(whole_head)
    before, plain = logits(of_adapters), llama(0)
    pictures = picture(of_adapters), picture(plain)
    drawn = of_adapters.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
    with pytest.raises(ValueError, match=rf"expert 4.*{expected}"):
        of_adapters.add_expert(whole_head, 1.0)
    with pytest.raises(ValueError, match=rf"expert 1.*{expected}"):
        AdapterExperts(plain, [whole_head])
    assert of_adapters.config.expert_weights == WEIGHTS and of_adapters.num_experts == 3
    assert_same_picture(pictures[1], picture(plain))
    assert not hasattr(plain, "peft_config")
    assert_same_picture(pictures[0], picture(of_adapters))
    assert torch.equal(logits(of_adapters), before)
    assert torch.equal(of_adapters.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4), drawn)


def test_after_a_refusal_a_good_adapter_is_added_as_ever(whole_head: Path, tmp_path: Path) -> None:
    good = saved_adapters(tmp_path)
    expected = TokenEnsemble.from_adapters(llama(0), [*good, whole_head], [*WEIGHTS, 1.0])
    base = llama(0)
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in whole_head.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    without("lora_B")(bad)
    with pytest.raises(ValueError, match="lacks"):
        TokenEnsemble.from_adapters(base, [bad], [1.0])
    ensemble = TokenEnsemble.from_adapters(base, good, WEIGHTS)
    for _ in range(2):
        with pytest.raises(ValueError, match="lacks"):
            ensemble.add_expert(bad, 1.0)
    ensemble.add_expert(whole_head, 1.0)
    assert torch.equal(logits(ensemble), logits(expected))


def test_an_interrupted_addition_leaves_everything_as_it_was(
    of_adapters: TokenEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = picture(of_adapters)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ensemw2s.models.adapters.get_peft_model_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        of_adapters.add_expert(saved_adapters(tmp_path, 1)[0], 1.0)
    assert_same_picture(before, picture(of_adapters))


def test_what_a_newer_peft_says_by_its_defaults_is_let_pass(tmp_path: Path) -> None:
    (folder,) = saved_adapters(tmp_path, 1)
    alone = logits(TokenEnsemble.from_adapters(llama(0), [folder], [1.0]))
    configure({"a_setting_to_come": None, "another": False, "peft_version": "99.0"}, folder)
    assert torch.equal(logits(TokenEnsemble.from_adapters(llama(0), [folder], [1.0])), alone)


def test_an_adapter_to_train_further_is_checked_alike(tmp_path: Path) -> None:
    (folder,) = saved_adapters(tmp_path, 1)
    model: PreTrainedModel = llama(0)
    trained = attach_adapter(model, folder, "the expert", trainable=True)
    assert {name.split(".")[-3] for name, weight in trained.named_parameters() if weight.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    without("lora_B")(folder)
    with pytest.raises(ValueError, match=r"the expert: .* lacks .*lora_B\.weight"):
        attach_adapter(llama(0), folder, "the expert", trainable=True)
