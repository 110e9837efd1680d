"""Many experts behind one interface, against each expert loaded by itself."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ensemw2s.ensemble.experts import AdapterExperts, ModelExperts
from ensemw2s.ensemble.stacked import _linear
from ensemw2s.models.adapters import ADAPTER_WEIGHTS
from ensemw2s.models.mixture import Pass, StackedExperts
from ensemw2s.models.saved import MODEL_WEIGHTS, require_weights
from ensemw2s.ops.products import FrozenWeights
from tests.tiny import END, VOCAB, gpt2, llama, saved_adapters

IDS = torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def of(experts: AdapterExperts | ModelExperts, index: int) -> Tensor:
    with experts.expert(index) as model:
        return logits(model)


def random_adapter(base: PreTrainedModel, folder: Path, **settings: Any) -> Tensor:
    """Save an adapter with random weights for `base` and return its logits; `base` is used up."""
    torch.manual_seed(len(str(folder)))
    model = get_peft_model(base, LoraConfig(**{"r": 3, "init_lora_weights": False} | settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn_like(weight))
    model.eval().save_pretrained(folder)
    return logits(model)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Adapters


def test_every_expert_equals_its_adapter_loaded_alone_in_whatever_order(tmp_path: Path) -> None:
    folders = saved_adapters(tmp_path)
    alone = [logits(PeftModel.from_pretrained(llama(0), str(folder)).eval()) for folder in folders]
    assert all(not torch.allclose(a, b, atol=0.1) for a, b in itertools.combinations(alone, 2))
    experts = AdapterExperts(llama(0), folders)
    assert len(experts) == 3
    for index in [0, 1, 2, 2, 0, 2, 1, 1, 0]:
        assert torch.equal(of(experts, index), alone[index]), index
    backwards = AdapterExperts(llama(0), folders[::-1])
    assert all(torch.equal(of(backwards, 2 - index), alone[index]) for index in range(3))


def test_experts_that_are_added_later_leave_the_earlier_ones_as_they_were(tmp_path: Path) -> None:
    folders = saved_adapters(tmp_path)
    together = AdapterExperts(llama(0), folders)
    experts = AdapterExperts(llama(0))
    assert len(experts) == 0
    for count, folder in enumerate(folders, 1):
        experts.add(folder)
        assert len(experts) == count
        assert all(torch.equal(of(experts, index), of(together, index)) for index in range(count))


def test_selected_experts_keep_their_order_and_share_the_base(tmp_path: Path) -> None:
    folders = saved_adapters(tmp_path)
    experts = AdapterExperts(llama(0), folders)
    all_three = [of(experts, index) for index in range(3)]
    chosen = experts.selected([2, 0])
    assert len(chosen) == 2
    assert torch.equal(of(chosen, 0), all_three[2])
    assert torch.equal(of(chosen, 1), all_three[0])
    assert chosen.base is experts.base
    assert torch.equal(of(chosen.selected([1]), 0), all_three[0])
    # Neither call disturbed the experts that were selected from.
    assert all(torch.equal(of(experts, index), all_three[index]) for index in range(3))


def test_an_expert_added_to_a_selection_overwrites_none_of_the_others(tmp_path: Path) -> None:
    folders = saved_adapters(tmp_path)
    alone = [logits(PeftModel.from_pretrained(llama(0), str(folder)).eval()) for folder in folders]
    experts = AdapterExperts(llama(0), folders[:2])
    chosen = experts.selected([0])
    chosen.add(folders[2])
    assert [torch.equal(of(chosen, i), alone[j]) for i, j in [(0, 0), (1, 2)]] == [True, True]
    assert [torch.equal(of(experts, i), alone[i]) for i in range(2)] == [True, True]


def test_experts_do_not_train_and_are_in_evaluation_mode(tmp_path: Path) -> None:
    random_adapter(llama(0), tmp_path / "whole-head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapters = AdapterExperts(llama(0).train(), [*saved_adapters(tmp_path), tmp_path / "whole-head"])
    for experts in (adapters, ModelExperts([llama(0).train(), gpt2(1)])):
        for index in range(len(experts)):
            with experts.expert(index) as model:
                assert not any(module.training for module in model.modules())
                assert not any(weight.requires_grad for weight in model.parameters())


def test_a_saved_adapter_loads_as_any_adapter_of_peft_does(tmp_path: Path) -> None:
    experts = AdapterExperts(llama(0), saved_adapters(tmp_path))
    for index in (2, 0, 1):
        folder = tmp_path / f"again-{index}"
        experts.save_expert(index, folder)
        assert (folder / ADAPTER_WEIGHTS).is_file()
        assert not [path for path in folder.iterdir() if path.is_dir()]
        assert torch.equal(logits(PeftModel.from_pretrained(llama(0), str(folder)).eval()), of(experts, index))


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (llama, {"target_modules": ["q_proj", "down_proj"]}),
        (llama, {"target_modules": ["q_proj", "lm_head"]}),
        (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (llama, {"target_modules": ["q_proj"], "use_dora": True}),
        (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
    ids=["lora", "on-the-head", "on-the-embedding", "whole-head", "dora", "gpt2-tied-head"],
)
def test_the_saved_base_gives_the_logits_of_the_untouched_base(
    tmp_path: Path, build: Any, settings: dict[str, Any]
) -> None:
    untouched = logits(build(0))
    adapted = random_adapter(build(0), tmp_path / "adapter", **settings)
    assert not torch.allclose(adapted, untouched, atol=0.1)
    experts = AdapterExperts(build(0), [tmp_path / "adapter"])
    experts.save_base(tmp_path / "base")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(saved), untouched)
    build(0).save_pretrained(tmp_path / "plain")
    names = [load_file(tmp_path / folder / MODEL_WEIGHTS[0]).keys() for folder in ("base", "plain")]
    assert names[0] == names[1]
    # The experts go on working, and work on the saved base.
    assert torch.equal(of(experts, 0), adapted)
    assert torch.equal(of(AdapterExperts(saved, [tmp_path / "adapter"]), 0), adapted)


def test_a_base_without_adapters_is_saved_as_it_is(tmp_path: Path) -> None:
    AdapterExperts(llama(3)).save_base(tmp_path / "base")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), logits(llama(3)))


# Whole models


def test_model_experts_are_the_models_themselves(tmp_path: Path) -> None:
    models = [llama(0), gpt2(1), llama(2)]
    expected = [logits(model) for model in models]
    experts = ModelExperts(models)
    assert len(experts) == 3
    assert [torch.equal(of(experts, i), expected[i]) for i in (2, 0, 1)] == [True] * 3
    assert experts.expert_config(1) is models[1].config
    chosen = experts.selected([2, 1])
    assert [torch.equal(of(chosen, i), expected[j]) for i, j in [(0, 2), (1, 1)]] == [True] * 2
    assert chosen.models[0] is models[2]
    experts.save_expert(1, tmp_path / "second")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "second")), expected[1])


def test_models_over_different_vocabularies_do_not_mix() -> None:
    with pytest.raises(ValueError, match=rf"expert 2 has a vocabulary of 57 tokens, expert 1 one of {VOCAB}: .*share"):
        ModelExperts([llama(0), llama(1, vocab_size=57)])


# Weights that are not there


def test_an_adapter_folder_without_safetensors_weights_is_refused(tmp_path: Path) -> None:
    good, empty, pickled = saved_adapters(tmp_path)
    (empty / ADAPTER_WEIGHTS).write_bytes(b"")
    (pickled / ADAPTER_WEIGHTS).rename(pickled / "adapter_model.bin")
    for folder in (empty, pickled, tmp_path / "nowhere"):
        experts = AdapterExperts(llama(0), [good])
        before = of(experts, 0)
        with pytest.raises(
            FileNotFoundError, match=rf"expert 2: {folder} holds no weights \(expected {ADAPTER_WEIGHTS}"
        ):
            experts.add(folder)
        assert len(experts) == 1
        assert torch.equal(of(experts, 0), before)


@pytest.mark.parametrize("name", MODEL_WEIGHTS)
def test_either_file_of_weights_will_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="expert 1"):
        require_weights(tmp_path, MODEL_WEIGHTS, "expert 1")
    (tmp_path / name).write_text("weights")
    require_weights(tmp_path, MODEL_WEIGHTS, "expert 1")


def test_the_end_token_of_the_shared_configuration_survives(tmp_path: Path) -> None:
    experts = AdapterExperts(llama(0), saved_adapters(tmp_path, count=1))
    assert experts.expert_config(0).eos_token_id == END
    assert experts.expert_config(0).vocab_size == VOCAB


def whole(experts: AdapterExperts) -> StackedExperts:
    """Return all experts as one model."""
    (only,) = experts.passes()
    assert only.stacked is not None and only.experts == tuple(range(len(experts)))
    return only.stacked


class TestStacked:
    """Adapters run as one model give what they give one after the other."""

    @torch.no_grad()
    def assert_like_one_after_the_other(self, experts: AdapterExperts) -> None:
        # In float64, where only a mistake makes a difference.
        experts.double()
        stacked = whole(experts)
        with stacked.model() as model:
            together = model(input_ids=IDS.repeat(len(experts), 1), use_cache=False).logits
        for index, rows in enumerate(together.unflatten(0, (len(experts), -1))):
            torch.testing.assert_close(rows, of(experts, index), rtol=1e-10, atol=1e-10)

    def test_equal_adapters(self, tmp_path: Path) -> None:
        self.assert_like_one_after_the_other(AdapterExperts(llama(0), saved_adapters(tmp_path)))

    def test_adapters_of_other_ranks_scales_and_layers(self, tmp_path: Path) -> None:
        settings = [
            {"r": 3, "target_modules": ["q_proj"]},
            {"r": 7, "target_modules": ["q_proj", "up_proj", "lm_head"], "lora_alpha": 40},
            {"r": 2, "target_modules": ["o_proj"], "use_rslora": True},
        ]
        folders = [tmp_path / f"adapter-{t}" for t in range(3)]
        for folder, own in zip(folders, settings, strict=True):
            random_adapter(llama(0), folder, **own)
        self.assert_like_one_after_the_other(AdapterExperts(llama(0), folders))

    def test_selected_adapters_are_stacked_in_their_order(self, tmp_path: Path) -> None:
        experts = AdapterExperts(llama(0), saved_adapters(tmp_path))
        self.assert_like_one_after_the_other(experts.selected([2, 0]))

    def test_the_model_is_left_as_it_was(self, tmp_path: Path) -> None:
        experts = AdapterExperts(llama(0), saved_adapters(tmp_path))
        before = of(experts, 1)
        stacked = whole(experts)
        with pytest.raises(RuntimeError, match="stop"), stacked.model():
            raise RuntimeError("stop")
        assert torch.equal(of(experts, 1), before)

    @pytest.mark.parametrize(
        "settings",
        [
            {"target_modules": ["q_proj"], "use_dora": True},
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"target_modules": ["q_proj", "embed_tokens"]},
            {"target_modules": ["q_proj"], "lora_bias": True},
        ],
        ids=["dora", "whole-module", "embedding", "bias"],
    )
    @pytest.mark.parametrize("place", [0, 1, 2])
    @torch.no_grad()
    def test_what_is_more_than_a_product_runs_by_itself_and_the_others_together(
        self, tmp_path: Path, settings: dict[str, Any], place: int
    ) -> None:
        folders = [tmp_path / str(t) for t in range(3)]
        for t, folder in enumerate(folders):
            random_adapter(llama(0), folder, **(settings if t == place else {"target_modules": ["q_proj", "v_proj"]}))
        experts = AdapterExperts(llama(0), folders).double()
        plain = tuple(t for t in range(3) if t != place)
        stack, alone = experts.passes()
        assert stack.experts == plain and alone == Pass((place,))
        assert stack.stacked is not None
        # The one that runs by itself may be the active one when the others run.
        for index in (place, plain[0]):
            of(experts, index)
            with stack.stacked.model() as model:
                together = model(input_ids=IDS.repeat(2, 1), use_cache=False).logits
            for t, rows in zip(plain, together.unflatten(0, (2, -1)), strict=True):
                torch.testing.assert_close(rows, of(experts, t), rtol=1e-10, atol=1e-10)

    def test_one_adapter_is_stacked_too(self, tmp_path: Path) -> None:
        self.assert_like_one_after_the_other(AdapterExperts(llama(0), saved_adapters(tmp_path, 1)))

    def test_a_base_of_another_kind_of_layer_with_biases(self, tmp_path: Path) -> None:
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder in folders:
            random_adapter(gpt2(0), folder, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        self.assert_like_one_after_the_other(AdapterExperts(gpt2(0), folders))

    def test_whole_models_and_a_base_without_adapters_are_not_stacked(self) -> None:
        assert ModelExperts([llama(0), llama(1)]).passes() == [Pass((0,)), Pass((1,))]
        assert AdapterExperts(llama(0)).passes() == []

    def test_adapters_of_one_shape_are_held_once(self, tmp_path: Path) -> None:
        experts = AdapterExperts(llama(0), saved_adapters(tmp_path))
        before = [of(experts, index) for index in range(3)]
        experts.passes()
        weights = [weight for name, weight in experts.base.named_parameters() if "lora_" in name]
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
        assert len(storages) == len(weights) // 3
        assert sum(storages.values()) == sum(weight.numel() * 4 for weight in weights)
        for some in (experts, experts.selected([1, 2]), experts.selected([2, 0])):
            some.passes()
        assert {weight.untyped_storage().data_ptr() for weight in weights} == storages.keys()
        assert all(torch.equal(of(experts, index), before[index]) for index in range(3))

    def test_stacked_adapters_can_be_trained_saved_moved_and_joined_by_others(self, tmp_path: Path) -> None:
        folders = saved_adapters(tmp_path)
        experts = AdapterExperts(llama(0), folders[:2])
        with torch.inference_mode():
            experts.passes()
        weight = next(value for name, value in experts.base.named_parameters() if "lora_B.expert_1" in name)
        weight.requires_grad_()
        with experts.expert(0) as model:
            logits_of_one = model(input_ids=IDS).logits
        logits_of_one.sum().backward()
        with torch.no_grad():
            weight -= 0.1 * weight.grad
        weight.requires_grad_(False)
        experts.save_expert(0, tmp_path / "trained")
        assert torch.equal(
            logits(PeftModel.from_pretrained(llama(0), str(tmp_path / "trained")).eval()), of(experts, 0)
        )
        experts.add(folders[2])
        self.assert_like_one_after_the_other(experts)

    def test_layers_that_someone_has_wrapped_are_left_alone(self, tmp_path: Path) -> None:
        experts = AdapterExperts(llama(0), saved_adapters(tmp_path))
        inner = experts.base.get_base_model()
        calls = []
        head_forward = inner.lm_head.forward
        inner.lm_head.forward = lambda x: calls.append("head") or head_forward(x)
        layer = inner.model.layers[0].self_attn.q_proj
        layer.base_layer.register_forward_hook(lambda *_: calls.append("hook"))
        self.assert_like_one_after_the_other(experts)
        assert calls.count("head") == calls.count("hook") == 4
        assert "forward" in vars(inner.lm_head)
        layer.forward = layer.forward
        assert experts.passes() == [Pass((0,)), Pass((1,)), Pass((2,))]

    def test_a_wrapped_layer_that_holds_another_adapter_alone_leaves_nothing_stacked(self, tmp_path: Path) -> None:
        folders = saved_adapters(tmp_path, 2)
        random_adapter(llama(0), tmp_path / "other", target_modules=["q_proj", "embed_tokens"])
        experts = AdapterExperts(llama(0), [*folders, tmp_path / "other"])
        assert [each.experts for each in experts.passes()] == [(0, 1), (2,)]
        layer = experts.base.get_base_model().model.embed_tokens
        layer.forward = layer.forward
        assert experts.passes() == [Pass((0,)), Pass((1,)), Pass((2,))]


class TestFewRows:
    """Products of few rows are made the other way round on several threads."""

    @pytest.mark.parametrize("rows", [1, 2, 8, 64, 65])
    @pytest.mark.parametrize("bias", [False, True])
    def test_a_linear_layer_in_float32(self, rows: int, bias: bool, two_threads: None) -> None:
        layer = nn.Linear(37, 53, bias=bias)
        x = torch.randn(rows, 1, 37)
        exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        result = _linear(FrozenWeights(), layer, x)
        assert result.shape == (rows, 1, 53)
        assert (result.double() - exact).abs().max() <= 2 * (layer(x).double() - exact).abs().max() + 1e-6

    def test_it_is_the_other_way_round_by_mkl(self, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, weights = nn.Linear(8, 6), FrozenWeights()
        monkeypatch.setenv("ENSEMW2S_PRODUCTS", "torch")
        assert _linear(weights, layer, torch.randn(5, 8)).stride() == (1, 5)
        assert _linear(weights, layer, torch.randn(65, 8)).is_contiguous()
        assert _linear(weights, layer.double(), torch.randn(5, 8).double()).is_contiguous()


class TestSideBySide:
    """Whole models share out the threads of a CPU."""

    def experts(self) -> ModelExperts:
        return ModelExperts([llama(0), gpt2(1), llama(2)])

    @torch.no_grad()
    def test_they_give_what_they_give_one_after_the_other(self, two_threads: None) -> None:
        experts = self.experts()
        seen = []

        def run(model: nn.Module, index: int) -> Tensor:
            seen.append((threading.current_thread().name, torch.get_num_threads()))
            return logits(model)

        for indices in ([0, 1, 2], [2, 0]):
            for index, result in zip(indices, experts.map(run, indices), strict=True):
                torch.testing.assert_close(result, of(experts, index), rtol=1e-5, atol=1e-5)
        assert all(name.startswith("expert") and threads == 1 for name, threads in seen)
        assert torch.get_num_threads() == 2

    def test_with_gradients_or_one_thread_they_run_in_turn(self, two_threads: None) -> None:
        def thread(model: nn.Module, index: int) -> str:
            return threading.current_thread().name

        main = threading.current_thread().name
        assert self.experts().map(thread, [0, 1]) == [main, main]
        with torch.no_grad():
            assert self.experts().map(thread, [0]) == [main]
            torch.set_num_threads(1)
            assert self.experts().map(thread, [0, 1]) == [main, main]

    def test_the_modes_of_the_caller_hold(self, two_threads: None) -> None:
        def modes(model: nn.Module, index: int) -> tuple[Any, ...]:
            enabled = torch.is_autocast_enabled("cpu")
            return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), enabled, torch.get_autocast_dtype("cpu")

        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.float16):
            assert set(self.experts().map(modes, [0, 1, 2])) == {(False, True, True, torch.float16)}
        with torch.no_grad():
            plain = set(self.experts().map(modes, [0, 1, 2]))
        assert {mode[:3] for mode in plain} == {(False, False, False)}

    @torch.no_grad()
    def test_an_error_in_one_of_them_is_raised(self, two_threads: None) -> None:
        def run(model: nn.Module, index: int) -> None:
            raise ArithmeticError(f"in expert {index}")

        with pytest.raises(ArithmeticError, match="in expert 0"):
            self.experts().map(run, [0, 1, 2])

    @torch.no_grad()
    def test_a_forked_process_has_threads_of_its_own(self, two_threads: None) -> None:
        experts = self.experts()
        experts.map(lambda model, index: index, [0, 1])
        child = os.fork()
        if not child:
            os._exit(0 if experts.map(lambda model, index: index, [0, 1]) == [0, 1] else 1)
        assert os.waitpid(child, 0)[1] == 0
